"""The stream through a real Ray, against what `Order` and `ShardSet` say it should be."""

import shutil
import tempfile
import time

import numpy as np
import pytest
import ray

from md4.errors import UserError
from pipelines.full_order import FullOrder
from pipelines.mixture import Mixture
from pipelines.order import Order, share
from pipelines.quotas import quotas
from pipelines.row_cache import open_rows, private_folder
from pipelines.shards import ShardSet
from pipelines.stream import Batch, batches
from tests.pipelines.small import some_rows, write_set
from tests.pipelines.test_row_cache import flip

pytestmark = pytest.mark.ray

ROWS, LENGTH, GROUP = 500, 16, 8


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    root = tmp_path_factory.mktemp("set")
    write_set(root, np.split(some_rows(ROWS, LENGTH), [133, 300]), GROUP)
    return root


def order_of(prepared, seed: int = 1) -> Order:
    return Order.of(ShardSet(prepared), batch_size=32, slices=8, seed=seed, mixing=4)


def assert_right(
    got: list[Batch], prepared, order: Order | FullOrder, start: int, stop: int, rank: int, world: int
) -> None:
    shards = ShardSet(prepared)
    first, last = share(rank, world, order.slices)
    assert [batch.step for batch in got] == list(range(start, stop))
    for batch in got:
        ids = order.rows_at(batch.step, batch.step + 1, first, last).ravel()
        assert np.array_equal(batch.slots, np.arange(first * 4, last * 4))
        assert np.array_equal(batch.rows, ids)
        assert np.array_equal(batch.tokens, shards.read(ids))
        assert batch.tokens.dtype == batch.rows.dtype == np.int64


@pytest.mark.parametrize(
    ("start", "stop", "rank", "world"),
    [(0, 50, 0, 1), (0, 50, 0, 2), (0, 50, 1, 3), (37, 60, 2, 3), (10**6, 10**6 + 9, 0, 1)],
)
def test_batches_are_those_of_the_order(ray_cluster, prepared, start, stop, rank, world):
    """Over several epochs of 15 5/8 steps, so with steps that lie across their borders."""
    order = order_of(prepared)
    got = list(batches(prepared, "train", order, start, stop, rank, world))
    assert_right(got, prepared, order, start, stop, rank, world)
    assert all(batch.tokens.flags.writeable for batch in got)  # torch takes them without a copy and without a warning


def test_many_small_plans(ray_cluster, prepared):
    """With memory for no more than a few steps, the plans follow each other without a gap."""
    order = order_of(prepared)
    got = list(batches(prepared, "train", order, 3, 40, 0, 1, ahead_bytes=8 * 32 * LENGTH, readers=2))
    assert_right(got, prepared, order, 3, 40, 0, 1)


def test_no_steps(ray_cluster, prepared):
    assert list(batches(prepared, "train", order_of(prepared), 7, 7, 0, 1)) == []


@pytest.fixture(scope="module")
def three_sets(tmp_path_factory):
    """Folders of three sets of 500, 90 and 40 rows, whose rows all differ between them."""
    roots = [tmp_path_factory.mktemp(f"set{number}") for number in range(3)]
    for number, (root, rows) in enumerate(zip(roots, (ROWS, 90, 40), strict=True)):
        write_set(root, [some_rows(rows, LENGTH, seed=number)], GROUP)
    return roots


def mixture_of(roots, *weights: float) -> Mixture:
    """The first and the third in lanes, the second in full order."""
    one, two, three = (ShardSet(root) for root in roots)
    full = FullOrder(two.rows, 32, 8, 1, two.fingerprint)
    return Mixture((order_of(one.root), full, order_of(three.root)), quotas(weights))


@pytest.mark.parametrize(("start", "rank", "world"), [(0, 0, 1), (0, 1, 3), (777, 2, 3)])
def test_a_mixture_gives_the_rows_of_each_set_at_their_places(ray_cluster, three_sets, start, rank, world):
    """The third set is so rare that most batches have none of it."""
    mixture = mixture_of(three_sets, 700, 304, 20)
    first, last = share(rank, world, 8)
    got = list(batches(three_sets, "train", mixture, start, start + 60, rank, world, ahead_bytes=2**15))
    assert [batch.step for batch in got] == list(range(start, start + 60))
    read = [ShardSet(root).read(np.arange(ShardSet(root).rows)) for root in three_sets]
    for batch in got:
        sets, rows = (ids.ravel() for ids in mixture.rows_at(batch.step, batch.step + 1, first, last))
        assert np.array_equal(batch.sets, sets)
        assert np.array_equal(batch.rows, rows)
        assert np.array_equal(batch.tokens, np.stack([read[d][row] for d, row in zip(sets, rows, strict=True)]))
    assert any(2 in batch.sets for batch in got)
    assert any(2 not in batch.sets for batch in got)


def test_the_full_order_reads_from_decoded_rows(ray_cluster, prepared):
    """Written once for this machine; what stands there is what the shards have."""
    shards = ShardSet(prepared)
    order = FullOrder(shards.rows, 32, 8, 5, shards.fingerprint)
    got = list(batches(prepared, "train", order, 3, 40, 1, 3))
    assert_right(got, prepared, order, 3, 40, 1, 3)
    again = batches(prepared, "train", order, 0, 15, 0, 1)
    assert len(list(again)) == 15
    assert (again.reads.rows_read, again.damages) == (0, [])  # decoded before
    folder = private_folder() / f"{shards.fingerprint}-train-2"
    assert np.array_equal(np.load(folder / "tokens.npy"), shards.read(np.arange(shards.rows)))
    shutil.rmtree(folder)


def test_decoded_rows_keep_labels_and_a_damaged_shard_is_named(tmp_path, monkeypatch):
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(tempfile, "tempdir", None)
    write_set(tmp_path / "set", np.split(some_rows(60, LENGTH), [25]), GROUP)
    shards = ShardSet(tmp_path / "set")
    ids = np.array([59, 0, 31, 0])
    tokens, labels = open_rows(str(shards.root), "train", shards.fingerprint).read_labelled(ids)
    assert np.array_equal(tokens, shards.read(ids))
    assert labels is None
    open_rows.cache_clear()
    open_rows(str(tmp_path / "gone"), "train", shards.fingerprint)  # the decoded rows are enough
    open_rows.cache_clear()

    write_set(tmp_path / "other", [some_rows(60, LENGTH, seed=3)], GROUP)
    damaged = ShardSet(tmp_path / "other")
    shard = next((tmp_path / "other" / "train").iterdir())
    data = bytearray(shard.read_bytes())
    data[50] ^= 4
    shard.write_bytes(data)
    with pytest.raises(UserError, match="is damaged"):
        open_rows(str(damaged.root), "train", damaged.fingerprint)
    assert not list(private_folder().glob(f"{damaged.fingerprint}*/"))
    private_folder().chmod(0o755)
    with pytest.raises(UserError, match="its owner alone"):
        private_folder()


def test_reads_of_the_reading_processes_come_with_the_blocks(ray_cluster, prepared):
    """All bytes of the row groups once an epoch: what a reader in this process reads for the same rows."""
    order = order_of(prepared)
    steps = order.rows * 2 // order.batch_size
    stream = batches(prepared, "train", order, 0, steps, 0, 1, ahead_bytes=20 * 32 * LENGTH)  # else one unit is all
    delivered = sum(len(batch.rows) for batch in stream)
    once = ShardSet(prepared)
    once.read(np.arange(once.rows))
    assert stream.reads.rows_given == delivered
    assert delivered <= stream.reads.rows_read <= 2 * delivered
    assert 1.9 * once.reads.bytes <= stream.reads.bytes <= 4 * once.reads.bytes


def test_decoded_rows_that_rot_are_made_anew(ray_cluster, tmp_path):
    """In Ray's reading processes, in the midst of a run: the batches are right, and the stream says what happened."""
    write_set(tmp_path, [some_rows(300, LENGTH, seed=11)], GROUP)
    shards = ShardSet(tmp_path)
    order = FullOrder(shards.rows, 32, 8, 5, shards.fingerprint)
    assert_right(list(batches(tmp_path, "train", order, 0, 5, 0, 1)), tmp_path, order, 0, 5, 0, 1)
    folder = private_folder() / f"{shards.fingerprint}-train-2"
    flip(folder / "tokens.npy", -1000)
    stream = batches(tmp_path, "train", order, 0, 20, 0, 1)
    assert_right(list(stream), tmp_path, order, 0, 20, 0, 1)
    (damage,) = stream.damages
    assert f"the decoded rows in {folder} were damaged (" in damage
    assert stream.reads.rows_read == 300
    shutil.rmtree(folder)


@ray.remote
def take(prepared, order: Order, stop: int, rank: int, world: int) -> list[Batch]:
    """Stands for a training worker: takes its batches inside of Ray."""
    return list(batches(prepared, "train", order, 0, stop, rank, world))


def test_a_worker_that_holds_every_cpu(ray_cluster, prepared):
    """Reading must not wait for CPUs that the training will not give back."""
    order = order_of(prepared)
    worker = take.options(num_cpus=ray.cluster_resources()["CPU"])
    got = ray.get(worker.remote(prepared, order, 20, 1, 2), timeout=120)
    assert_right(got, prepared, order, 0, 20, 1, 2)


def test_reading_ahead_is_bounded(ray_cluster, tmp_path):
    """Damage done to the shards after the first batch is met soon: what was read before then is all that comes."""
    rows = some_rows(400, LENGTH)
    write_set(tmp_path, [rows], GROUP)
    order = order_of(tmp_path)
    stream = batches(tmp_path, "train", order, 0, 2000, 0, 1, ahead_bytes=40 * 32 * LENGTH)
    got = [next(stream)]
    time.sleep(2)  # for the reading that is allowed
    shard = next((tmp_path / "train").iterdir())
    size = shard.stat().st_size
    with open(shard, "r+b") as file:
        file.write(bytes(size // 2))
    with pytest.raises(UserError, match=r"shard 'train/00000-0000.parquet' .* is damaged"):
        got.extend(stream)
    write_set(tmp_path, [rows], GROUP)
    assert 20 <= len(got) < 100
    assert_right(got, tmp_path, order, 0, len(got), 0, 1)


def test_a_damaged_shard_is_named(ray_cluster, tmp_path):
    write_set(tmp_path, np.split(some_rows(200, LENGTH), [100]), GROUP)
    shard = sorted((tmp_path / "train").iterdir())[1]
    data = bytearray(shard.read_bytes())
    data[50] ^= 4
    shard.write_bytes(data)
    with pytest.raises(UserError, match=r"^shard 'train/00001-0000.parquet' .* is damaged"):
        list(batches(tmp_path, "train", order_of(tmp_path), 0, 20, 0, 1))


def test_a_stream_can_be_left(ray_cluster, prepared):
    """Closed after some batches, or before the first, it leaves nothing that hinders the next."""
    order = order_of(prepared)
    stream = batches(prepared, "train", order, 0, 10**6, 0, 1)
    assert next(stream).step == 0
    stream.close()
    stream.close()
    with pytest.raises(StopIteration):
        next(stream)
    batches(prepared, "train", order, 0, 10**6, 0, 1).close()
    assert_right(list(batches(prepared, "train", order, 0, 5, 0, 1)), prepared, order, 0, 5, 0, 1)


def test_what_does_not_fit_together_is_refused_at_once(ray_cluster, prepared, tmp_path):
    order = order_of(prepared)
    with pytest.raises(UserError, match=r"9 workers cannot share a batch of 8 slices: .* must be in 1\.\.8"):
        batches(prepared, "train", order, 0, 10, 0, 9)
    write_set(tmp_path, [some_rows(300, LENGTH)], GROUP)
    with pytest.raises(UserError, match=r"order is for 500 rows .* has 300 rows"):
        batches(tmp_path, "train", order, 0, 10, 0, 1)
    with pytest.raises(UserError, match="not a prepared set"):
        batches(tmp_path / "nowhere", "train", order, 0, 10, 0, 1)
    with pytest.raises(ValueError, match="got 5 and 4"):
        batches(prepared, "train", order, 5, 4, 0, 1)
