"""Lines, JSON lines, parquet, arrow and tars: the documents that went in, in pieces of any size, here and in S3."""

import gzip
import io
import json
import lzma
import tarfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from md4.errors import UserError
from pipelines import archives
from pipelines.archives import Damaged, unpacked
from pipelines.documents import Reading
from pipelines.sources import open_source, read
from pipelines.storage import Folder
from pipelines.text.recipe import Recipe
from tests.pipelines.pictures import write_tar
from tests.shared import shared

PIECE = 2**22
SKIP = Recipe(damaged="skip")


def readings(kind: str, path: Path | str, piece: int = PIECE, recipe: Recipe | None = None) -> list[Reading]:
    return [read(unit, recipe) for unit in open_source(kind, str(path), recipe).list_units(piece)]


def texts(kind: str, path: Path | str, piece: int = PIECE, recipe: Recipe | None = None) -> list[str]:
    return [document.text for reading in readings(kind, path, piece, recipe) for document in reading.documents]


def json_lines(rows: list[str], end: str = "\n") -> bytes:
    return "".join(
        json.dumps({"id": i, "text": row}, ensure_ascii=i % 2 == 0) + end for i, row in enumerate(rows)
    ).encode()


ROWS = ["one", "two\nlines", "Ångström \U0001f600", "", "x" * 300, "last"]


@settings(max_examples=30, deadline=None)
@given(
    st.lists(st.text(max_size=20), min_size=1, max_size=12),
    st.integers(5, 200),
    st.sampled_from(["\n", "\r\n", "\n\n"]),
)
def test_json_lines_in_pieces(tmp_path_factory, rows, piece, end):
    file = tmp_path_factory.getbasetemp() / "rows.jsonl"
    file.write_bytes(json_lines(rows, end))
    assert texts("jsonl", file, piece) == rows


@pytest.mark.parametrize("piece", [7, PIECE])
def test_lines_in_pieces(tmp_path, piece):
    file = tmp_path / "a.txt"
    file.write_bytes(b"one\n\n two words\r\nlast without an end")
    assert texts("lines", file, piece) == ["one", " two words", "last without an end"]


def test_packed_files(tmp_path):
    data = json_lines(ROWS)
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(data))
    frames = b"".join(zstandard.ZstdCompressor().compress(part) for part in (data[:50], data[50:]))
    (tmp_path / "b.jsonl.zst").write_bytes(frames)
    assert texts("jsonl", tmp_path, 10) == ROWS * 2
    (tmp_path / "c.txt.gz").write_bytes(gzip.compress(b"some words"))
    assert texts("text", tmp_path, 3) == ["some words"]


def test_records_are_named_and_counted(tmp_path):
    lines = [b'{"text": "good"}', b'{"text": 3}', b'{"body": "x"}', b"[1]", b'{"text": ', b'{"text": "\xe9"}']
    lines += [b'{"text": "\\ud800"}', b'{"text": "also good"}']
    (tmp_path / "a.jsonl").write_bytes(b"\n".join(lines))
    (reading,) = readings("jsonl", tmp_path, recipe=SKIP)
    assert [document.name for document in reading.documents] == ["a.jsonl:1", "a.jsonl:8"]
    assert [(one.name, one.reason) for one in reading.rejected] == [
        ("a.jsonl:2", "no text"), ("a.jsonl:3", "no text"), ("a.jsonl:4", "malformed line"),
        ("a.jsonl:5", "malformed line"), ("a.jsonl:6", "not UTF-8"), ("a.jsonl:7", "not UTF-8"),
    ]  # fmt: skip
    assert reading.rejected[1].excerpt == '{"body": "x"}'
    with pytest.raises(UserError, match=r"'a.jsonl:2': its field 'text' is a int.*data.damaged=skip"):
        texts("jsonl", tmp_path)
    assert texts("jsonl", tmp_path, recipe=Recipe("body", "skip")) == ["x"]
    (tmp_path / "a.jsonl").unlink()
    (tmp_path / "b.txt").write_bytes(b"caf\xe9")
    (reading,) = readings("text", tmp_path, recipe=SKIP)
    assert (reading.documents, reading.rejected[0].reason) == ([], "not UTF-8")


def test_splits_that_all_files_tell(tmp_path):
    for name in ("train-0", "validation-0", "test-0"):
        (tmp_path / f"{name}.jsonl").write_bytes(json_lines(ROWS))
    assert [unit.split for unit in open_source("jsonl", str(tmp_path)).list_units(PIECE)] == [
        "test",
        "train",
        "validation",
    ]
    (tmp_path / "more.jsonl").write_bytes(json_lines(ROWS))
    assert {unit.split for unit in open_source("jsonl", str(tmp_path)).list_units(PIECE)} == {None}


# -- tables ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [pa.string(), pa.large_string(), pa.dictionary(pa.int32(), pa.string())])
@pytest.mark.parametrize("piece", [1, 700, PIECE])
def test_parquet(tmp_path, kind, piece):
    rows = [f"document {i} " + "word " * (i % 7) for i in range(50)]
    table = pa.table({"id": list(range(50)), "text": pa.array(rows).cast(kind)})
    pq.write_table(table, tmp_path / "train-00000-of-00001.parquet", row_group_size=8)
    units = open_source("parquet", str(tmp_path)).list_units(piece)
    assert {unit.split for unit in units} == {"train"}
    assert len(units) == {1: 7, PIECE: 1}.get(piece, len(units))
    found = [document for unit in units for document in read(unit).documents]
    assert [document.text for document in found] == rows
    assert found[49].name == "train-00000-of-00001.parquet:49"


def test_wrong_tables(tmp_path):
    file = tmp_path / "a.parquet"
    pq.write_table(pa.table({"text": pa.array(["a", None, "b"]), "n": [1, 2, 3]}), file)
    (reading,) = readings("parquet", file, recipe=SKIP)
    assert ([d.text for d in reading.documents], [r.name for r in reading.rejected]) == (["a", "b"], ["a.parquet:1"])
    with pytest.raises(
        UserError, match=r"no column 'n' of text \(data.text_column\); it has text \(string\), n \(int64\)"
    ):
        texts("parquet", file, recipe=Recipe("n"))
    bad = pa.Array.from_buffers(
        pa.string(), 2, [None, pa.array([0, 1, 2], pa.int32()).buffers()[1], pa.py_buffer(b"a\xe9")]
    )
    pq.write_table(pa.table({"text": bad}), file)
    (reading,) = readings("parquet", file, recipe=SKIP)
    assert ([d.text for d in reading.documents], reading.rejected[0].reason) == (["a"], "not UTF-8")
    file.write_bytes(b"PAR1 and nothing else PAR1")
    with pytest.raises(UserError, match=r"a\.parquet' cannot be read as parquet"):
        texts("parquet", file)


def save_to_disk(folder: Path, rows: list[str], split: str) -> None:
    """A dataset as `datasets` 2 to 4 save it: arrow streams, and a state.json that names them."""
    folder.mkdir(parents=True)
    names = [f"data-{i:05d}-of-00002.arrow" for i in range(2)]
    for name, part in zip(names, (rows[:3], rows[3:]), strict=True):
        table = pa.table({"text": part})
        with pa.OSFile(str(folder / name), "wb") as out, pa.ipc.new_stream(out, table.schema) as writer:
            writer.write_table(table, max_chunksize=2)
    state = {"_data_files": [{"filename": name} for name in names], "_split": split, "_indices_data_files": None}
    (folder / "state.json").write_text(json.dumps(state))
    (folder / "dataset_info.json").write_text("{}")


def test_saved_datasets(tmp_path):
    save_to_disk(tmp_path / "one", ROWS, "validation")
    (tmp_path / "one" / "cache-123.arrow").write_bytes(b"left over")
    assert texts("huggingface", tmp_path / "one") == ROWS
    assert {u.split for u in open_source("huggingface", str(tmp_path / "one")).list_units(1)} == {"validation"}
    for split in ("train", "test"):
        save_to_disk(tmp_path / "two" / split, [f"{split} {row}" for row in ROWS], split)
    (tmp_path / "two" / "dataset_dict.json").write_text('{"splits": ["train", "test"]}')
    units = open_source("huggingface", str(tmp_path / "two")).list_units(1)
    assert [unit.split for unit in units] == ["test", "test", "train", "train"]
    assert [d.text for unit in units if unit.split == "train" for d in read(unit).documents] == [
        f"train {row}" for row in ROWS
    ]


# -- tars ------------------------------------------------------------------------------------------------------------


def test_tars_of_texts(tmp_path):
    write_tar(
        tmp_path / "a.tar", {"1.txt": b"one", "1.json": b"{}", "2.txt.gz": gzip.compress(b"two"), "../3.txt": b"out"}
    )
    (reading,) = readings("text-webdataset", tmp_path, recipe=SKIP)
    assert [document.text for document in reading.documents] == ["one", "two"]
    assert [one.reason for one in reading.rejected] == ["unsafe name"]
    with pytest.raises(UserError, match=r"3\.txt': its name leads out"):
        texts("text-webdataset", tmp_path)


def nested(names: dict[str, dict[str, bytes]]) -> bytes:
    """OpenWebText's form: a tar of .xz files, each a tar of texts."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as tar:
        for name, members in names.items():
            inner = io.BytesIO()
            with tarfile.open(fileobj=inner, mode="w") as texts_of:
                for member, data in members.items():
                    info = tarfile.TarInfo(member)
                    info.size = len(data)
                    texts_of.addfile(info, io.BytesIO(data))
            data = lzma.compress(inner.getvalue())
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return out.getvalue()


def test_archives_of_archives(tmp_path):
    parts = {
        "openwebtext/urlsf_subset00-1_data.xz": {"1.txt": b"one", "2.txt": b"two"},
        "openwebtext/b.xz": {"3.txt": b"three"},
    }
    (tmp_path / "urlsf_subset00.tar").write_bytes(nested(parts))
    assert [[d.text for d in one.documents] for one in readings("text-archives", tmp_path)] == [
        ["one", "two"],
        ["three"],
    ]


# -- hostile ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("end", ["gz", "zst", "xz"])
def test_bombs_and_cut_files(tmp_path, monkeypatch, end):
    monkeypatch.setattr(archives, "FREE_BYTES", 2**22)
    packers = {"gz": gzip.compress, "zst": zstandard.ZstdCompressor().compress, "xz": lzma.compress}
    bomb = packers[end](bytes(2**22 + 1))
    assert len(bomb) < 10**5
    (tmp_path / f"a.jsonl.{end}").write_bytes(bomb)
    with pytest.raises(Damaged, match=r"unpacks to more than 4,194,304 bytes, 100 times its size"):
        unpacked(bomb, f"a.{end}")
    sound = packers[end](b"some text of some length, not much")
    with pytest.raises(Damaged, match="cannot be unpacked"):
        unpacked(sound[:-3], f"a.{end}")
    assert unpacked(sound, f"a.{end}") == b"some text of some length, not much"
    if end != "xz":
        with pytest.raises(UserError, match=r"unpacks to more than .*data\.damaged=skip"):
            texts("jsonl", tmp_path)
        assert readings("jsonl", tmp_path, recipe=SKIP)[0].rejected[0].reason == "unpacks to too much"


def test_links_that_lead_out_are_not_followed(tmp_path):
    (tmp_path / "secret.txt").write_text("secret")
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "a.txt").write_text("words")
    (folder / "b.txt").symlink_to("a.txt")
    assert texts("text", folder) == ["words", "words"]
    (folder / "c.txt").symlink_to("../secret.txt")
    with pytest.raises(UserError, match=r"c\.txt' is a link that leads out of"):
        texts("text", folder)
    (folder / "c.txt").unlink()
    (folder / "d").symlink_to("..")  # links to folders are not entered
    assert texts("text", folder) == ["words", "words"]


# -- in S3 -----------------------------------------------------------------------------------------------------------


def test_the_same_from_s3(tmp_path, s3):
    """Every format, in pieces; and failures of the network pass."""
    rows = [f"document {i} " + "word " * (i % 9) for i in range(40)]
    (tmp_path / "a.jsonl").write_bytes(json_lines(rows))
    (tmp_path / "b.txt").write_text("\n".join(rows))
    (tmp_path / "c.jsonl.zst").write_bytes(zstandard.ZstdCompressor().compress(json_lines(rows)))
    pq.write_table(pa.table({"text": rows}), tmp_path / "d.parquet", row_group_size=8)
    write_tar(tmp_path / "e.tar", {f"{i}.txt": row.encode() for i, row in enumerate(rows)})
    save_to_disk(tmp_path / "saved", rows, "train")
    remote = Folder("s3://bucket/corpus")
    for file in tmp_path.rglob("*"):
        if file.is_file():
            remote.write(file.relative_to(tmp_path).as_posix(), file.read_bytes())
    s3.fails(0.1)
    cases = [("jsonl", ""), ("jsonl", "/a.jsonl"), ("text", ""), ("lines", "/b.txt"), ("parquet", "")]
    cases += [("text-webdataset", ""), ("huggingface", "/saved")]
    for kind, below in cases:
        here = [(u.name, u.start, u.stop) for u in open_source(kind, f"{tmp_path}{below}").list_units(500)]
        there = open_source(kind, f"s3://bucket/corpus{below}").list_units(500)
        assert [(u.name, u.start, u.stop) for u in there] == here
        for unit, reading in zip(there, readings(kind, f"{tmp_path}{below}", 500), strict=True):
            assert read(unit) == reading
    s3.fails(0)
    big = b"".join(b"%d some words\n" % i for i in range(200_000))
    remote.write("big.txt", big)
    units = open_source("text", "s3://bucket/corpus/big.txt").list_units(2**18)
    s3.fails(0)
    assert read(units[3]).documents[0].text in big.decode()
    with pytest.raises(UserError, match="'s3://bucket/nothing' does not exist"):
        open_source("text", "s3://bucket/nothing").list_units(1)


# -- real files ------------------------------------------------------------------------------------------------------


def test_a_foreign_tar_of_texts():
    (reading,) = readings("text-webdataset", shared("data", "webdataset", "testgz.tar"))
    assert len(reading.documents) == 1000
    assert all(document.text for document in reading.documents)


@pytest.mark.parametrize(("name", "articles"), [("valid.txt", 60), ("test.txt", 60)])
@pytest.mark.parametrize("piece", [100_000, PIECE])
def test_wikitext(name, articles, piece):
    file = shared("data", "wikitext-2", name)
    found = texts("wikitext", file, piece)
    assert "".join(found) == file.read_text()[2:]  # a blank line stands before the first
    assert len(found) == articles
    assert all(text.startswith(" = ") and not text.startswith(" = =") for text in found)


def test_one_billion_words():
    file = shared("data", "lm1b-heldout", "1b_benchmark.dev.tokens")
    found = texts("lines", file, 100_000)
    assert found == [line for line in file.read_text().split("\n") if line]
    assert len(found) == 12_216
