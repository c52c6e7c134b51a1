"""Sets described, shown and merged; and the verbs of `md4 data`."""

import sys

import numpy as np
import pytest
from PIL import Image

from md4.errors import UserError
from orchestration.cli import main
from pipelines import inspect, ngrams, shards
from pipelines.manifest import FORMAT, MANIFEST, VERSION, Manifest, PixelFacts, SourceFacts, Split
from pipelines.shards import ShardSet, verify
from pipelines.storage import Folder
from pipelines.vocabularies import Characters
from tests.pipelines.small import GROUP, some_rows, write_set
from tests.pipelines.test_shards import damage
from tests.s3 import BUCKET


def md4(monkeypatch, capsys, *arguments: object) -> str:
    monkeypatch.setattr(sys, "argv", ["md4", "data", *map(str, arguments)])
    main()
    return capsys.readouterr().out


def write_pixels(root, count: int, seed: int = 0, classes: int = 3, **changes) -> np.ndarray:
    """A set of labelled images 2 x 3 of 17 levels; returns its rows."""
    rows = np.random.default_rng(seed).integers(0, 17, (count, 6)).astype(np.uint8)
    labels = np.arange(count) % classes
    shard = shards.write_shard(root, "train/00000-0000.parquet", rows, GROUP, labels)
    split = Split(documents=count, characters=0, tokens=count * 6, dropped_tokens=0, rows=count, shards=[shard])
    facts = PixelFacts(
        shape=(2, 3, 1), levels=17, classes=classes, class_names=None, independent_bits=0.0, histogram_bits=0.0,
        converted={"RGB to L": 2}, rejected={}, rejected_examples=[],
    )  # fmt: skip
    manifest = Manifest(
        format=FORMAT, version=VERSION, vocabulary="pixels17", vocabulary_size=17, length=6, rows_per_group=GROUP,
        source=SourceFacts(kind="digits", identity="a test", units=1, bytes=1, sha256=""), config={},
        splits={"train": split}, ngrams=None, pixels=facts.model_copy(update=changes), fingerprint="",
    )  # fmt: skip
    manifest = manifest.model_copy(update={"fingerprint": manifest.content_fingerprint()})
    Folder(root).write(MANIFEST, manifest.model_dump_json().encode())
    return rows


def test_verify(prepared, monkeypatch, capsys):
    said = md4(monkeypatch, capsys, "verify", prepared)
    assert f"is sound: 3 shards, {sum(file.stat().st_size for file in (prepared / 'train').iterdir()):,} bytes" in said
    damage(prepared / "train" / "00001-0000.parquet", 40)
    with pytest.raises(SystemExit) as left:
        md4(monkeypatch, capsys, "verify", prepared)
    assert left.value.code == 2
    assert "shard 'train/00001-0000.parquet'" in capsys.readouterr().err


def test_describe(prepared, tmp_path, monkeypatch, capsys):
    said = md4(monkeypatch, capsys, "describe", prepared)
    manifest = Manifest.load(prepared)
    size = sum(shard.bytes for shard in manifest.splits["train"].shards)
    assert manifest.fingerprint in said
    assert "text8, 27 tokens" in said
    assert [line.split() for line in said.splitlines()[-2:]] == [
        ["split", "rows", "documents", "tokens", "left", "over", "shards", "bytes"],
        ["train", "95", "1", "760", "0", "3", f"{size:,}"],
    ]
    write_pixels(tmp_path / "pixels", 9)
    said = inspect.describe(tmp_path / "pixels")
    assert "2 x 3 x 1, 17 levels, 3 classes" in said
    assert "2 RGB to L" in said


def test_show_and_sample_texts(prepared, monkeypatch, capsys):
    opened = ShardSet(prepared)
    text = Characters().decode(opened.read(np.array([94]))[0])
    assert md4(monkeypatch, capsys, "show", prepared, 94) == f"[94] {text}\n"
    said = md4(monkeypatch, capsys, "sample", prepared, 7, "--seed", 3)
    assert said == md4(monkeypatch, capsys, "sample", prepared, 7, "--seed", 3)
    assert said != md4(monkeypatch, capsys, "sample", prepared, 7, "--seed", 4)
    ids = [int(line[1 : line.index("]")]) for line in said.splitlines()]
    assert len(set(ids)) == 7
    for line, row in zip(said.splitlines(), opened.read(np.array(ids)), strict=True):
        assert line.partition("] ")[2] == Characters().decode(row)
    for wrong in (("show", prepared, 95), ("sample", prepared, 96), ("show", prepared, 1, "--split", "test")):
        with pytest.raises(SystemExit):
            md4(monkeypatch, capsys, *wrong)
        said = capsys.readouterr().err
        assert "0..94" in said or "has 95" in said or "it has train" in said


def test_show_and_sample_images(tmp_path, monkeypatch, capsys):
    rows = write_pixels(tmp_path, 12)
    md4(monkeypatch, capsys, "show", tmp_path, 5, "--out", tmp_path / "one.png")
    pixels = np.asarray(Image.open(tmp_path / "one.png"))
    assert np.array_equal(pixels, np.rint(rows[5].reshape(2, 3) * (255 / 16)))
    said = md4(monkeypatch, capsys, "sample", tmp_path, 5, "--out", tmp_path / "five.png")
    ids = [int(word) for word in said.split("rows ")[1].rstrip(")\n").split(", ")]
    sheet = np.asarray(Image.open(tmp_path / "five.png"))
    assert sheet.shape == (2 * 3 - 1, 3 * 4 - 1)
    assert np.array_equal(sheet[3:5, 4:7], np.rint(rows[ids[4]].reshape(2, 3) * (255 / 16)))


def test_a_run_stands_for_its_set(tmp_path, monkeypatch, capsys):
    from orchestration.config import load
    from pipelines.config import prepared_path

    config = load("digits-tiny", [f"data.directory={tmp_path}/data"])
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").write_text(config.to_yaml())
    write_pixels(prepared_path(config.data), 4)
    assert str(prepared_path(config.data)) in md4(monkeypatch, capsys, "describe", tmp_path / "run")


# -- merging ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("remote", [False, True])
def test_merging(request, prepared, tmp_path, monkeypatch, capsys, remote):
    if remote:
        request.getfixturevalue("s3")
    other = Folder(f"s3://{BUCKET}/other" if remote else tmp_path / "other")
    target = Folder(f"s3://{BUCKET}/new" if remote else tmp_path / "new")
    write_set(other, [some_rows(33, seed=5), some_rows(12, seed=6)], GROUP)
    said = md4(monkeypatch, capsys, "merge", prepared, other, target)
    assert "train 140 rows" in said
    merged, parts = verify(target), [Manifest.load(place) for place in (prepared, other)]
    assert merged.fingerprint == ShardSet(target).fingerprint not in [part.fingerprint for part in parts]
    copied = [shard for part in parts for shard in part.splits["train"].shards]
    assert [s.sha256 for s in merged.splits["train"].shards] == [s.sha256 for s in copied]
    assert [shard.path for shard in merged.splits["train"].shards][2:] == [
        "train/00002-0000.parquet", "train/00003-0000.parquet", "train/00004-0000.parquet"
    ]  # fmt: skip
    rows = ShardSet(target).read(np.arange(140))
    before = np.concatenate([ShardSet(place).read(np.arange(n)) for place, n in ((prepared, 95), (other, 45))])
    assert sorted(map(bytes, rows)) == sorted(map(bytes, before))
    assert merged.ngrams is not None
    assert merged.ngrams.model_dump() == pytest.approx(ngrams.entropies(ngrams.count_trigrams([rows], 27)), rel=0.05)
    with pytest.raises(UserError, match="is a prepared set already"):
        inspect.merge(prepared, other, target)


def test_merging_goes_on_after_an_interruption(prepared, tmp_path):
    write_set(tmp_path / "other", [some_rows(33, seed=5)], GROUP)
    damage(prepared / "train" / "00002-0000.parquet", 40)
    with pytest.raises(UserError, match=r"shard 'train/00002-0000.parquet' .* is damaged"):
        inspect.merge(prepared, tmp_path / "other", tmp_path / "new")
    assert not (tmp_path / "new" / MANIFEST).exists()
    damage(prepared / "train" / "00002-0000.parquet", 40)  # the same bit: sound again
    first = tmp_path / "new" / "train" / "00000-0000.parquet"
    stamp = first.stat().st_mtime_ns
    inspect.merge(prepared, tmp_path / "other", tmp_path / "new")
    assert first.stat().st_mtime_ns == stamp
    assert verify(tmp_path / "new").splits["train"].rows == 128


def test_images_merge(tmp_path):
    one, other = write_pixels(tmp_path / "a", 20), write_pixels(tmp_path / "b", 11, seed=1, classes=5)
    merged = inspect.merge(tmp_path / "a", tmp_path / "b", tmp_path / "c")
    assert merged.pixels is not None
    assert (merged.pixels.classes, merged.pixels.converted) == (5, {"RGB to L": 4})
    assert merged.pixels.histogram_bits > 3.5
    rows, labels = ShardSet(tmp_path / "c").read_labelled(np.arange(31))
    assert labels is not None
    pairs = [(bytes(row), i % n) for part, n in ((one, 3), (other, 5)) for i, row in enumerate(part)]
    assert sorted(zip(map(bytes, rows), labels.tolist(), strict=True)) == sorted(pairs)


def test_sets_that_do_not_fit_together(prepared, tmp_path):
    write_set(tmp_path / "groups", [some_rows(33)], GROUP + 1)
    write_set(tmp_path / "length", [some_rows(33, 12)], GROUP)
    write_pixels(tmp_path / "pixels", 5)
    for name, message in (
        ("groups", "row group is 10 and 11"),
        ("length", "row is 8 and 12"),
        ("pixels", "vocabulary"),
    ):
        with pytest.raises(UserError, match=message):
            inspect.merge(prepared, tmp_path / name, tmp_path / "new")
    with pytest.raises(UserError, match="hold the same rows"):
        inspect.merge(prepared, prepared, tmp_path / "new")
    assert not (tmp_path / "new").exists()
