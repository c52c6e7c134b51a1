"""Decoded rows: whatever changes in their files is noticed, and they are made anew from the shards."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from md4.errors import UserError
from pipelines import row_cache
from pipelines.row_cache import DamagedRows, open_rows, read_rows
from pipelines.row_sums import row_sums
from pipelines.shards import ShardSet
from tests.pipelines.test_tar_shards import some_pictures, write_pictures


@pytest.fixture
def shards(tmp_path, monkeypatch):
    """A labelled set of 40 rows; decoded ones go to a folder of this test."""
    monkeypatch.setattr(row_cache, "private_folder", lambda: tmp_path)
    write_pictures(tmp_path / "set", "parquet", [some_pictures(22), some_pictures(18, seed=1)])
    open_rows.cache_clear()
    yield ShardSet(tmp_path / "set")
    open_rows.cache_clear()


def flip(file: Path, position: int) -> None:
    """Change one bit of a file, in place."""
    data = bytearray(file.read_bytes())
    data[position] ^= 4
    with file.open("r+b") as opened:
        opened.write(data)


def test_every_file_is_watched(shards, tmp_path):
    """A changed byte of tokens, labels or sums; and files that are cut, or gone."""
    ids = np.array([39, 0, 7, 0])
    tokens, labels = shards.read_labelled(ids)
    where = (str(shards.root), "train", shards.fingerprint)
    first = read_rows(*where, ids)
    assert (first.cost.rows_read, first.damage) == (40, None)
    assert read_rows(*where, ids).cost.rows_read == 0
    folder = tmp_path / f"{shards.fingerprint}-train-2"

    def harm(kind: str) -> None:
        name, _, how = kind.partition(" ")
        file = folder / f"{name}.npy"
        if how == "cut":
            file.write_bytes(file.read_bytes()[:-3])
        elif how == "gone":
            file.unlink()
        else:
            flip(file, -1)

    for kind in ("tokens", "labels", "sums", "tokens cut", "sums gone"):
        open_rows.cache_clear()
        harm(kind)
        assert np.array_equal(read_rows(*where, np.array([3])).tokens, shards.read(np.array([3]))) or "cut" in kind
        found = read_rows(*where, ids)
        if kind in ("tokens", "labels", "sums"):  # row 39 was changed, row 3 was not
            assert found.damage is not None
            assert f"{folder} were damaged (1 of 4 rows, among them row 39)" in found.damage
            assert found.cost.rows_read == 40
        assert np.array_equal(found.tokens, tokens)
        assert np.array_equal(found.labels, labels)  # type: ignore[arg-type]
        assert read_rows(*where, np.arange(40)).damage is None
    assert not [file for file in tmp_path.iterdir() if file.name.endswith(".tmp")]


def test_another_process_has_made_them_anew(shards, tmp_path):
    """What it made stays; only the files that were open here are let go."""
    where = (str(shards.root), "train", shards.fingerprint)
    ids = np.arange(40)
    folder = tmp_path / f"{shards.fingerprint}-train-2"
    read_rows(*where, ids)
    (tmp_path / "aside").mkdir()
    for file in folder.iterdir():
        (tmp_path / "aside" / file.name).write_bytes(file.read_bytes())
    flip(folder / "tokens.npy", -1)
    with pytest.raises(DamagedRows):
        open_rows(*where).read_labelled(ids)
    folder.rename(tmp_path / "old")
    (tmp_path / "aside").rename(folder)
    inode = folder.stat().st_ino
    found = read_rows(*where, ids)
    assert found.damage is not None
    assert (found.cost.rows_read, folder.stat().st_ino) == (0, inode)


def test_rows_that_stay_damaged(shards, monkeypatch):
    """A machine that cannot keep what it writes: said once, and not tried for ever."""
    built = []

    def wrong(*arguments: object) -> None:
        build(*arguments)
        built.append(arguments[1])
        flip(arguments[1] / "tokens.npy", -1)  # type: ignore[operator]

    build = row_cache._build
    monkeypatch.setattr(row_cache, "_build", wrong)
    with pytest.raises(UserError, match="also after decoding the shards again: is this machine's disk or memory sound"):
        read_rows(str(shards.root), "train", shards.fingerprint, np.array([39]))
    assert len(built) == 2


@settings(max_examples=200, deadline=None)
@given(st.integers(1, 9), st.integers(1, 40), st.sampled_from([np.uint8, np.uint16, np.int32]), st.data())
def test_sums_differ_wherever_bits_do(count, length, dtype, data):
    """One to three bits anywhere, rows that changed places, rows of zeros, labels."""
    rows = np.random.default_rng(0).integers(0, 27, (count, length)).astype(dtype)
    ids, labels = np.arange(count) * 7, np.arange(count).astype(np.int32)
    sums = row_sums(rows, ids, labels)
    assert np.array_equal(sums, row_sums(rows.copy(), ids, labels))
    assert (row_sums(np.zeros_like(rows), ids) != 0).all()
    row = data.draw(st.integers(0, count - 1))
    bits = data.draw(st.sets(st.integers(0, length * rows.itemsize * 8 - 1), min_size=1, max_size=3))
    changed = rows.copy()
    for bit in bits:
        changed.view(np.uint8).reshape(count, -1)[row, bit // 8] ^= 1 << bit % 8
    assert np.flatnonzero(row_sums(changed, ids, labels) != sums).tolist() == [row]
    assert (row_sums(rows, ids + 1, labels) != sums).all()
    assert (row_sums(rows, ids, labels - 1) != sums).all()


def test_the_highest_bits_of_two_words():
    """They would cancel each other in a sum of words alone, of a disk that has one bit stuck in every word."""
    rows = np.zeros((1, 64), np.uint8)
    rows[0, [7, 39]] = 128
    assert row_sums(rows, np.array([0])) != row_sums(np.zeros_like(rows), np.array([0]))
