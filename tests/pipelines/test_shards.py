import pickle
import shutil

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from md4.errors import UserError
from pipelines import shards
from pipelines.shards import ShardSet, verify
from tests.pipelines.small import GROUP, LENGTH, in_id_order, some_rows, write_set


@settings(max_examples=25, deadline=None)
@given(st.lists(st.integers(0, 40), min_size=1, max_size=5).filter(any), st.integers(1, 20), st.randoms())
def test_reading_by_id(tmp_path_factory, counts, group, random):
    root = tmp_path_factory.mktemp("set")
    files = np.split(some_rows(sum(counts)), np.cumsum(counts)[:-1])
    write_set(root, files, group)
    everything = in_id_order(files, group)
    with_rows = ShardSet(root)
    assert (with_rows.rows, with_rows.length) == everything.shape

    ids = np.array([random.randrange(with_rows.rows) for _ in range(30)])  # repeats, in no order
    read = with_rows.read(ids)
    assert read.dtype == np.uint8
    assert np.array_equal(read, everything[ids])
    assert np.array_equal(with_rows.read(np.arange(with_rows.rows)), everything)
    assert with_rows.read(np.array([], np.int64)).shape == (0, LENGTH)
    shutil.rmtree(root)


def test_neighbouring_ids_are_one_row_group(prepared):
    """What makes reading in windows of groups cheap, seen by plain pyarrow."""
    row_groups = []
    for file in sorted((prepared / "train").iterdir()):
        parquet = pq.ParquetFile(file)
        row_groups += [parquet.read_row_group(i)["tokens"].to_pylist() for i in range(parquet.num_row_groups)]
    opened = ShardSet(prepared)
    for group in range(4 + 3 + 2):
        rows = opened.read(np.arange(group * GROUP, group * GROUP + GROUP)).tolist()
        assert rows in row_groups


def test_plain_pyarrow_reads_the_files(prepared, three_files):
    table = pq.read_table(prepared / "train")
    assert table.schema.field("tokens").type == pa.list_(pa.field("item", pa.uint8(), nullable=False), LENGTH)
    assert table["tokens"].to_pylist() == np.concatenate(three_files).tolist()


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "int32"])
def test_every_stored_dtype_survives(tmp_path, dtype):
    rows = np.random.default_rng(0).integers(0, np.iinfo(dtype).max, (23, 5), dtype=dtype, endpoint=True)
    shard = shards.write_shard(tmp_path, "some.parquet", rows, 10)
    read = shards.read_shard(tmp_path, shard)
    assert read.dtype == rows.dtype
    assert np.array_equal(read, rows)


def test_ids_outside_the_set(prepared):
    opened = ShardSet(prepared)
    for wrong in (-1, 95):
        with pytest.raises(IndexError, match=rf"0\.\.94, got .*{wrong}"):
            opened.read(np.array([0, wrong]))


def test_what_is_known_of_a_set(prepared):
    opened = ShardSet(prepared)
    assert (opened.rows, opened.length, opened.rows_per_group) == (95, LENGTH, GROUP)
    assert opened.vocabulary.size == 27
    assert opened.fingerprint == opened.manifest.fingerprint
    copy = pickle.loads(pickle.dumps(opened))
    assert np.array_equal(copy.read(np.arange(95)), opened.read(np.arange(95)))


# -- damage ----------------------------------------------------------------------------------------------------------


def damage(file, position: int) -> None:
    data = bytearray(file.read_bytes())
    data[position] ^= 1 << position % 8
    file.write_bytes(data)


def test_a_missing_shard(prepared):
    (prepared / "train" / "00001-0000.parquet").unlink()
    with pytest.raises(UserError, match=r"'train/00001-0000.parquet' .* is missing"):
        ShardSet(prepared)


def test_a_shard_that_disappears_while_reading(prepared):
    opened = ShardSet(prepared)
    (prepared / "train" / "00001-0000.parquet").unlink()
    with pytest.raises(UserError, match=r"'train/00001-0000.parquet' .* is missing"):
        opened.read(np.arange(95))


def test_a_shard_of_another_size(prepared):
    file = prepared / "train" / "00002-0000.parquet"
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(UserError, match=r"'train/00002-0000.parquet' .* is damaged: it has \d+ bytes"):
        ShardSet(prepared)


@pytest.mark.parametrize("stride", [7, pytest.param(1, marks=pytest.mark.slow)])
def test_no_flipped_bit_reaches_the_reader(prepared, three_files, stride):
    """Wherever in a shard a bit is changed: reading gives the true rows, or names the shard. Never other rows."""
    file = prepared / "train" / "00002-0000.parquet"
    sound = file.read_bytes()
    truth = in_id_order(three_files, GROUP)
    refused = 0
    positions = range(0, len(sound), stride)
    for position in positions:
        damage(file, position)
        message = ""
        try:
            rows = ShardSet(prepared).read(np.arange(95))
        except UserError as error:
            message = str(error)
        file.write_bytes(sound)
        if message:
            refused += 1
            assert "shard 'train/00002-0000.parquet'" in message
            assert "is damaged" in message
        else:
            assert np.array_equal(rows, truth)
    assert refused > 0.9 * len(positions)


def test_verify_finds_any_change(prepared):
    assert verify(prepared).splits["train"].rows == 95
    file = prepared / "train" / "00000-0000.parquet"
    damage(file, len(file.read_bytes()) - 30)  # in the footer's text, which reading may not notice
    with pytest.raises(UserError, match=r"'train/00000-0000.parquet' .* is damaged: its sha256"):
        verify(prepared)


def test_a_shard_of_another_set(prepared, tmp_path):
    """Well-formed, but of other rows: told by its footer even if the size is right."""
    opened = ShardSet(prepared)
    shards.write_shard(prepared, "train/00000-0000.parquet", some_rows(40, seed=1), GROUP)
    with pytest.raises(UserError, match=r"'train/00000-0000.parquet' .* its footer is not the recorded one"):
        opened.read(np.arange(10))


def test_an_unknown_split(prepared):
    with pytest.raises(UserError, match=r"unknown split 'valid' .* it has train"):
        ShardSet(prepared, "valid")
