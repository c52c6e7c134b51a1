"""Whole preparations: documents cleaned, compared, packed; what is left out is kept, and a report says how much."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from md4.errors import UserError
from pipelines import cleaning, duplicates, inspect, rejects
from pipelines.config import DataConfig, check_packing, prepared_path
from pipelines.full_order import FullOrder
from pipelines.manifest import MANIFEST, Manifest
from pipelines.part_records import Job, Whole
from pipelines.prepare import prepare
from pipelines.shards import ShardSet, read_shard, verify
from pipelines.storage import Folder
from pipelines.stream import batches
from pipelines.text_part import prepare_text
from pipelines.units import Unit
from pipelines.vocabularies import Characters
from tests.pipelines.test_prepare import config, contents, in_file_order, quietly, write_corpus
from tests.shared import shared

HOOK = """
def clean(text):
    return None if text.startswith("a number") else text.replace("the", "an")
"""


def repeated(folder: Path) -> Path:
    """A corpus with copies, some only after normalisation, an empty file, and one that a hook is to leave out."""
    write_corpus(folder, files=24, words=50)
    for number in (3, 9, 15):
        text = (folder / f"{number:03d}.txt").read_text()
        (folder / f"copy-{number}.txt").write_text(text.replace(" ", "  ") + " !")
    (folder / "empty.txt").write_text("?!")
    (folder / "zz.txt").write_text("a number of words " * 20)
    return folder


@pytest.mark.ray
def test_what_is_left_out_does_not_depend_on_parts(ray_cluster, tmp_path, monkeypatch):
    """Cleaned by a hook that only this process can import; compared with a set() of cleaned texts."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "hooks_of_this_test.py").write_text(HOOK)
    corpus = repeated(tmp_path / "corpus")
    found = {}
    for part_bytes in (1000, 10**6):
        data = config(
            corpus, tmp_path, part_bytes=part_bytes, clean=("whitespace", "hooks_of_this_test:clean"), deduplicate=True
        )
        said: list[str] = []
        root = prepare(data, said.append)
        manifest = verify(root)
        parts = len(list((root / "parts").iterdir()))
        left = [record for number in range(parts) for record in rejects.read(Folder(root), number)]
        assert sorted((record.name, record.reason) for record in left) == [
            (f"copy-{number}.txt", "duplicate") for number in (15, 3, 9)
        ] + [("empty.txt", "empty"), ("zz.txt", "cleaned away")]
        assert manifest.rejected == {"cleaned away": 1, "duplicate": 3, "empty": 1}
        assert any("1 cleaned away, 3 duplicate, 1 empty" in line for line in said)
        assert sum(split.documents for split in manifest.splits.values()) == 24
        found[parts] = {name: split.characters for name, split in manifest.splits.items()}
        assert "the" not in Characters().decode(in_file_order(root, "train")).split()
        left_file = next((root / "rejects").iterdir())
        before = contents(root)
        left_file.unlink()  # as by a crash
        (root / MANIFEST).unlink()
        prepare(data, quietly)
        assert contents(root) == before
    texts = {
        Characters().normalise(" ".join(file.read_text().split()).replace("the", "an"))
        for file in corpus.glob("[0-9]*.txt")
    }
    assert len(found) == 2
    for characters in found.values():
        assert sum(characters.values()) == sum(map(len, texts))
    one, other = found.values()
    assert one == other


@pytest.mark.ray
def test_a_hook_that_raises_stops_the_preparation(ray_cluster, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "hooks_that_fail.py").write_text("def clean(text):\n    raise KeyError('x')")
    data = config(write_corpus(tmp_path / "corpus", files=2), tmp_path, clean=("hooks_that_fail:clean",))
    with pytest.raises(UserError, match=r"'hooks_that_fail:clean' raised KeyError on the document '000.txt'") as caught:
        prepare(data, quietly)
    assert "\n" not in str(caught.value)


@pytest.mark.ray
def test_windows_from_preparation_to_batches(ray_cluster, tmp_path):
    corpus = write_corpus(tmp_path / "corpus", files=4, words=300)
    data = config(corpus, tmp_path, part_bytes=10**6, packing="windows", validation=0, test=0)
    root = prepare(data, quietly)
    train = ShardSet(root)
    stream = Characters().encode(" ".join(file.read_text() for file in sorted(corpus.iterdir())))
    assert train.rows == len(stream) - 31  # whole documents, in the order of the corpus
    order = FullOrder(train.rows, 64, 8, 3, train.fingerprint)
    for batch in batches(root, "train", order, 0, 4, 0, 1):
        assert batch.tokens.tolist() == [stream[row : row + 32].tolist() for row in batch.rows]
    said = inspect.describe(root)
    assert f"windows: a training row begins at every token of {train.stored_rows:,} stored rows" in said
    assert inspect.rows(train, np.array([5])) == [Characters().decode(stream[5:37])]

    other = prepare(data.model_copy(update={"stride": 5, "path": str(write_corpus(tmp_path / "b", seed=2))}), quietly)
    with pytest.raises(UserError, match="stride is 1 and 5"):
        inspect.merge(root, other, tmp_path / "new")
    other = prepare(data.model_copy(update={"path": str(write_corpus(tmp_path / "b", seed=2))}), quietly)
    merged = inspect.merge(root, other, tmp_path / "new")
    assert merged.splits["train"].rows == train.rows + ShardSet(other).rows == ShardSet(tmp_path / "new").rows
    both = ShardSet(tmp_path / "new").read(np.array([train.rows - 1, train.rows]))
    assert both.tolist() == [stream[-32:].tolist(), ShardSet(other).read(np.array([0]))[0].tolist()]


@pytest.mark.ray
def test_the_report(ray_cluster, tmp_path):
    corpus = write_corpus(tmp_path / "corpus", files=20, words=80)
    (corpus / "long.txt").write_text("word " * 900)
    (corpus / "none.txt").write_text("...")
    root = prepare(config(corpus, tmp_path, part_bytes=10**4, document_chars=10**4, max_chars=2000), quietly)
    report = json.loads((root / "report.json").read_text())
    manifest = Manifest.load(root)
    for name, split in manifest.splits.items():
        found = report["splits"][name]
        assert {key: found[key] for key in ("documents", "characters", "tokens", "rows", "dropped_tokens")} == {
            key: getattr(split, key) for key in ("documents", "characters", "tokens", "rows", "dropped_tokens")
        }
    assert sum(one["documents"] for one in report["documents_by_length"]) == 21
    sizes = {file.name: len(Characters().normalise(file.read_text())) for file in corpus.iterdir()}
    sizes["long.txt"] = 1999  # to the end of a word
    assert {one["name"]: one["tokens"] for one in report["longest_documents"]} == dict(
        sorted(sizes.items(), key=lambda pair: (-pair[1], pair[0]))[:10]
    )
    (bin_of_long,) = [one for one in report["documents_by_length"] if one["from"] <= 1999 <= one["to"]]
    assert bin_of_long == {"from": 1024, "to": 2047, "documents": 1}
    frequent = report["most_frequent_tokens"]
    assert frequent[0]["text"] == " "
    assert [one["count"] for one in frequent] == sorted((one["count"] for one in frequent), reverse=True)
    assert report["truncated_documents"] == 1
    assert report["rejected_examples"] == {"empty": ["none.txt: nothing is left of it in the vocabulary"]}
    assert report["tokens_per_second"] > 0
    text = (root / "report.md").read_text()
    assert "| `long.txt` |" in text.replace("| 1,999 ", "")
    assert "`none.txt: nothing is left of it in the vocabulary`" in text
    said = inspect.describe(root)
    assert "long.txt (1,999 tokens)" in said
    assert "1 empty" in said
    (root / "report.json").unlink()
    assert "long.txt" not in inspect.describe(root)


# -- without Ray: one part --------------------------------------------------------------------------------------------


def units(folder: Path, texts: dict[str, str], splits: dict[str, str] | None = None) -> list[Unit]:
    made = []
    for name, text in texts.items():
        (folder / name).write_text(text)
        made.append(Unit("text", str(folder / name), name, 0, len(text.encode()), 1, (splits or {}).get(name)))
    return made


def job(root: Path, own_splits: tuple[str, ...] = (), **settings) -> Job:
    data = DataConfig(source="text", path="unused", **({"length": 16, "validation": 0, "test": 0} | settings))
    return Job(Folder(root), "", data, Whole(own_splits=list(own_splits), class_names=None), cleaning.pickled([]))


def test_one_document_a_row_with_byte_pairs(tmp_path, monkeypatch):
    monkeypatch.setenv("MD4_GPT2", str(shared("data", "gpt2-bpe")))
    texts = {"a": "Hello world", "b": "one two three four " * 8, "c": "Hello world " * 7 + "Hello", "d": "x"}
    end = 50256
    for long, rows in (("cut", 4), ("split", 3 + 3), ("drop", 3)):
        work = job(tmp_path / long, vocabulary="gpt2", packing="document", long=long)
        record = prepare_text(work, 0, units(tmp_path, texts))
        train = record.splits["train"]
        assert train.rows == rows
        assert train.tokens + train.padding_tokens == train.rows * 16 + train.dropped_tokens
        assert record.rejects.counts == ({"longer than a row": 1} if long == "drop" else {})
    stored = np.concatenate([read_shard(tmp_path / "drop", shard) for shard in train.shards])
    assert [15496, 995, *[end] * 14] in stored.tolist()
    assert rejects.read(Folder(tmp_path / "drop"), 0)[0].detail == "33 tokens, and a row has 16"


def test_packing_by_document_needs_an_end_of_text():
    with pytest.raises(UserError, match="vocabulary=text8 lacks: gpt2 has one"):
        check_packing(DataConfig(packing="document"))
    check_packing(DataConfig(packing="document", vocabulary="gpt2"))


def test_a_source_keeps_its_own_splits(tmp_path):
    texts = {name: f"document {name} has some words" for name in ("a", "b", "c")}
    part = units(tmp_path, texts, {"a": "train", "b": "test", "c": "validation"})
    record = prepare_text(job(tmp_path, ("test", "train", "validation"), test=0.9), 0, part)
    assert [split.documents for split in record.splits.values()] == [1, 1, 1]


def test_settings_of_text_do_not_rename_sets_of_images():
    plain = prepared_path(DataConfig(source="digits"))
    assert prepared_path(DataConfig(source="digits", deduplicate=True)) == plain


def test_what_equals_a_held_out_document_is_said(tmp_path):
    part = units(tmp_path, {"a": "one two", "b": "one two", "c": "one two"}, {"a": "train", "b": "test", "c": "train"})
    work = job(tmp_path / "set", ("test", "train"), deduplicate=True)
    duplicates.hash_part(work, 0, part)
    duplicates.compare_bucket(work.root, 0, 1, 1, "")
    record = prepare_text(replace(work, buckets=1), 0, part)
    assert [split.documents for split in record.splits.values()] == [0, 0, 1]
    assert record.rejects.examples == {
        "duplicate of a held-out document": ["a: of document 1 of part 0", "c: of document 1 of part 0"]
    }


def test_text8_in_windows(tmp_path):
    """A piece of the real one: stored once, a row begins at every character."""
    text = shared("data", "text8", "text8.first3010294").read_text()[:100_000].strip()
    record = prepare_text(job(tmp_path / "set", length=256, packing="windows"), 0, units(tmp_path, {"text8": text}))
    train = record.splits["train"]
    assert train.rows == len(text) - 255
    assert train.stored_rows == -(-len(text) // 256)
    assert (train.tokens, train.dropped_tokens) == (len(text), 0)
