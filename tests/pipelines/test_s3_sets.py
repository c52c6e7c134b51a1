"""Prepared sets in S3: written, interrupted, gone on with, verified, streamed; by a real server that fails as asked."""

import dataclasses
import json
import time

import numpy as np
import pyarrow.parquet as pq
import pytest
import ray.data

from md4.errors import UserError
from pipelines import storage
from pipelines.config import prepared_path
from pipelines.manifest import MANIFEST, Manifest
from pipelines.order import Order
from pipelines.prepare import prepare
from pipelines.shards import ShardSet, verify
from pipelines.storage import Folder
from pipelines.stream import batches
from tests.pipelines.small import LENGTH, in_id_order, some_rows, write_set
from tests.pipelines.test_prepare import config, contents, quietly, write_corpus
from tests.s3 import BUCKET

DIRECTORY = f"s3://{BUCKET}/data"


def stored(folder: Folder) -> dict[str, bytes]:
    """Everything below a folder, by path, but for the report: it has the time that was taken."""
    return {name: folder.read(name) for name in folder.list() if not name.startswith("report.")}


def patient(monkeypatch, attempts: int) -> None:
    monkeypatch.setattr(storage, "RETRIES", dataclasses.replace(storage.RETRIES, attempts=attempts))


@pytest.fixture
def remote(s3):
    """A set of 500 rows in three files."""
    files = np.split(some_rows(500), [133, 300])
    folder = Folder(f"{DIRECTORY}/set")
    write_set(folder, files, rows_per_group=8)
    return folder, in_id_order(files, 8)


# -- reading ---------------------------------------------------------------------------------------------------------


def test_reading_by_id(remote):
    folder, rows = remote
    shards = ShardSet(folder)
    ids = np.random.default_rng(1).integers(0, 500, 60)
    assert np.array_equal(shards.read(ids), rows[ids])
    assert np.array_equal(ShardSet(str(folder)).read(np.arange(500)), rows)


def test_reads_are_ranges_of_the_row_groups_wanted(s3, tmp_path):
    """Large shards: opening asks for the manifest and a listing, then come footers, then row groups side by side."""
    generator = np.random.default_rng(0)
    files = [generator.integers(0, 27, (4000, 256), np.uint8) for _ in range(2)]
    manifest = write_set(Folder(f"{DIRECTORY}/set"), files, rows_per_group=100)
    sizes = [shard.bytes for shard in manifest.splits["train"].shards]
    assert min(sizes) > 2**19
    s3.fails(0)
    shards = ShardSet(f"{DIRECTORY}/set")
    assert len(s3.asked) == 2
    s3.fails(0)
    ids = np.array([0, 99, 100, 5199])  # groups 0 and 1 of the first shard, 11 of the second
    assert np.array_equal(shards.read(ids), np.concatenate(files)[ids])
    asked = [line.split("bytes=") for line in s3.asked]
    assert len(asked) == 4
    spans = [tuple(map(int, line[1].split("-"))) for line in asked]
    assert sum(stop - start + 1 for start, stop in spans) < 2 * 2**16 + 3.5 * sizes[0] / 40
    assert (shards.reads.requests, shards.reads.rows_read, shards.reads.rows_given) == (2, 300, 4)
    assert 2.5 * sizes[0] / 40 < shards.reads.bytes < 3.5 * sizes[0] / 40
    s3.fails(0)
    shards.read(np.array([250]))
    assert len(s3.asked) == 1  # the footer is known


def test_reads_per_delivered_row(prepared_large):
    """In the order of training, unit by unit, by three workers: hardly a row is read for nothing."""
    shards = ShardSet(prepared_large)
    order = Order.of(shards, batch_size=64, slices=8, seed=1, mixing=8)
    for first, last in ((0, 2), (2, 5), (5, 8)):
        for start, stop in order.units(0, 250, 8, 1024):
            shards.read(order.rows_at(start, stop, first, last).ravel())
    assert shards.reads.rows_given == 250 * 64
    assert 1 <= shards.reads.rows_read / shards.reads.rows_given < 1.15


@pytest.fixture(scope="module")
def prepared_large(tmp_path_factory):
    root = tmp_path_factory.mktemp("large")
    write_set(root, np.split(some_rows(16_003), [5000, 9000]), rows_per_group=8)
    return root


def test_damage_is_named(remote, s3):
    folder, _ = remote
    name = "train/00001-0000.parquet"
    sound = folder.read(name)
    flipped = bytearray(sound)
    flipped[60] ^= 4
    cases = [(bytes(flipped), "is damaged"), (sound[:-3], "is damaged: it has"), (None, "is missing")]
    for data, message in cases:
        opened = ShardSet(folder)
        if data is None:
            folder.remove(name)
        else:
            folder.write(name, data)
        with pytest.raises(UserError, match=rf"shard '{name}' of the prepared set 's3://.* {message[:10]}"):
            opened.read(np.arange(500))
        with pytest.raises(UserError, match=message):
            verify(folder)
        folder.write(name, sound)
    verify(folder)


def test_a_set_that_is_not_there(s3):
    with pytest.raises(UserError, match=r"'s3://bucket/data' is not a prepared set: it has no manifest"):
        ShardSet(DIRECTORY)
    with pytest.raises(UserError, match="the bucket 'other' does not exist"):
        ShardSet("s3://other/set")


# -- preparing -------------------------------------------------------------------------------------------------------


@pytest.mark.ray
def test_the_same_files_as_on_this_machine(ray_cluster, s3, tmp_path):
    corpus = write_corpus(tmp_path / "corpus")
    data = config(corpus, DIRECTORY)
    here = prepare(config(corpus, tmp_path), quietly)
    s3.fails(0)
    there = prepare(data, quietly)
    puts = [line.partition("?")[0] for line in s3.asked if line.startswith("PUT")]
    assert puts[-1].endswith(MANIFEST)
    assert isinstance(there, Folder)
    assert stored(there) == contents(here)
    assert verify(there) == Manifest.load(here)
    said: list[str] = []
    assert prepare(data, said.append) == there
    assert said == [f"data: {there} is ready"]

    files, path = there.arrow()
    plain = pq.read_table(f"{path}/train", filesystem=files)
    assert plain.equals(pq.read_table(here / "train"))
    rows = ray.data.read_parquet(f"{path}/train", filesystem=files).take_all()
    assert sorted(list(row["tokens"]) for row in rows) == sorted(plain["tokens"].to_pylist())


@pytest.mark.ray
@pytest.mark.parametrize(
    ("rate", "attempts"),
    [(0.1, 10), pytest.param(0.5, 30, marks=pytest.mark.slow), pytest.param(0.9, 200, marks=pytest.mark.slow)],
)
def test_failures_are_got_over(ray_cluster, s3, tmp_path, monkeypatch, rate, attempts):
    """With attempts enough that chance leaves one of 300 requests without an answer once in 10^6."""
    corpus = write_corpus(tmp_path / "corpus")
    here = contents(prepare(config(corpus, tmp_path), quietly))
    patient(monkeypatch, attempts)
    s3.fails(rate, seed=1)
    there = Folder(prepare(config(corpus, DIRECTORY), quietly))
    verify(there)
    assert sum(s3.failed.values()) > rate * 20
    s3.fails(0)
    assert stored(there) == here


@pytest.mark.ray
@pytest.mark.parametrize("rate", [0.9, pytest.param(0.5, marks=pytest.mark.slow)])
def test_a_clear_failure_and_a_later_resume(ray_cluster, s3, tmp_path, monkeypatch, rate):
    """Too few attempts for such a rate: one message, nothing that could be taken for a set, and sound work is kept."""
    corpus = write_corpus(tmp_path / "corpus")
    data = config(corpus, DIRECTORY)
    root = Folder(prepared_path(data))
    patient(monkeypatch, 2)
    s3.fails(rate, seed=2, only="(PUT|GET|HEAD) .*/(train|test|validation|parts)/")
    with pytest.raises(UserError, match=r"s3://bucket/data/.*: given up after 2 attempts") as caught:
        prepare(data, quietly)
    assert "\n" not in str(caught.value)
    s3.fails(0)
    assert not root.exists(MANIFEST)
    with pytest.raises(UserError, match="is not a prepared set"):
        ShardSet(root)
    patient(monkeypatch, 10)
    prepare(data, quietly)
    verify(root)
    assert stored(root) == contents(prepare(config(corpus, tmp_path), quietly))


@pytest.mark.ray
def test_finished_shards_are_not_made_again(ray_cluster, s3, tmp_path, monkeypatch):
    corpus = write_corpus(tmp_path / "corpus", files=12)
    data = config(corpus, DIRECTORY)
    root = Folder(prepared_path(data))
    patient(monkeypatch, 2)
    s3.fails(1, ("error",), only="PUT .*train/00005-")
    with pytest.raises(UserError, match=r"train/00005-0000.parquet: given up after 2 attempts"):
        prepare(data, quietly)
    s3.fails(0)
    deadline = time.monotonic() + 20
    done = root.list("parts")
    while (now := (time.sleep(0.5), root.list("parts"))[1]) != done:  # tasks that were under way
        done = now
        assert time.monotonic() < deadline
    assert done
    finished = {name: json.loads(root.read(name)) for name in done}
    shards = {
        shard["path"]
        for record in finished.values()
        for split in record["splits"].values()
        for shard in split["shards"]
    }
    torn = min(shards)
    root.write(torn, root.read(torn)[:-9])
    s3.fails(0)
    said: list[str] = []
    prepare(data, said.append)
    written = {line.split("/", 4)[4] for line in s3.asked if line.startswith("PUT")}
    again = {path for path in shards if path.split("/")[1][:5] == torn.split("/")[1][:5]}
    assert written & shards == again
    assert len(done) == 1 or any(f"{len(done) - 1} of " in line and "ready from before" in line for line in said)
    verify(root)
    assert stored(root) == contents(prepare(config(corpus, tmp_path), quietly))


# -- streaming -------------------------------------------------------------------------------------------------------


@pytest.mark.ray
@pytest.mark.parametrize("rate", [0.1, pytest.param(0.5, marks=pytest.mark.slow)])
def test_streaming_through_failures(ray_cluster, remote, s3, monkeypatch, rate):
    folder, rows = remote
    patient(monkeypatch, 20)
    order = Order.of(ShardSet(folder), batch_size=32, slices=8, seed=1, mixing=4)
    s3.fails(rate, seed=4)
    for rank in range(2):
        steps = 0
        for batch in batches(str(folder), "train", order, 5, 60, rank, 2, ahead_bytes=2**9):
            ids = order.rows_at(batch.step, batch.step + 1, 4 * rank, 4 * rank + 4).ravel()
            assert np.array_equal(batch.rows, ids)
            assert np.array_equal(batch.tokens, rows[ids])
            steps += 1
        assert steps == 55
    assert batch.tokens.shape == (16, LENGTH)
    assert sum(s3.failed.values()) >= 3


@pytest.mark.ray
def test_a_server_that_is_gone_while_streaming(ray_cluster, remote, s3, monkeypatch):
    folder, _ = remote
    patient(monkeypatch, 2)
    order = Order.of(ShardSet(folder), batch_size=32, slices=8, seed=1, mixing=4)
    stream = batches(str(folder), "train", order, 0, 10**6, 0, 1, ahead_bytes=2**13)
    next(stream)
    s3.fails(1, ("no answer",))
    with pytest.raises(UserError, match=r"^s3://bucket/data/set/train/.*: given up after 2 attempts"):
        list(stream)
