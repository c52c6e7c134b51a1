"""The ordered stream against raw reads of the same shards and against Ray Data's own unordered streaming.

    python -m tests.benchmarks.bench_stream [ROUNDS] [ROWS]

Rows of 1,024 one-byte tokens in row groups of 64. All variants deliver NumPy batches of 256 rows for two epochs; their
time includes the start, but each has run once before. Then a Ray with a small object store streams the set, which is
larger, while memory is weighed. Goals: the stream >= 0.5 of raw pyarrow,
>= 1.0 of Ray Data's `streaming_split` over whole files; reads per delivered row <= 1.15; a consumer that takes 250 ms
a step waits < 1 % of its time. 1 row is 1,024 bytes, so 1,000 rows/s are 1.02 MB/s.
"""

import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import ray
import ray.data

from orchestration.cluster import start_local
from pipelines.full_order import FullOrder
from pipelines.mixture import Mixture
from pipelines.order import Order, share
from pipelines.ray_data import quiet
from pipelines.reading import reading_units
from pipelines.shards import ShardSet
from pipelines.stream import batches
from tests.benchmarks.harness import Benchmark
from tests.pipelines.small import some_rows, write_set

LENGTH, GROUP, SHARD, BATCH, SLICES, EPOCHS = 1024, 64, 4096, 256, 8, 2
STORE = 80 * 10**6  # bytes of the object store: little more than the least that Ray starts with
STEP_SECONDS, STEPS = 0.25, 100  # of the slow consumer


def touch(tokens: np.ndarray) -> int:
    """What a consumer does: look at every token once."""
    return int(tokens.sum())


def decoded(table: pa.Table) -> np.ndarray:
    """The tokens `[n, L]` of a table, without a copy."""
    column = table["tokens"].combine_chunks()
    return column.flatten().to_numpy().reshape(len(column), -1)


def raw(root: Path) -> float:
    rows, began = 0, time.perf_counter()
    for _ in range(EPOCHS):
        for file in sorted((root / "train").iterdir()):
            tokens = decoded(pq.read_table(file, columns=["tokens"]))
            for lo in range(0, len(tokens), BATCH):
                touch(tokens[lo : lo + BATCH].astype(np.int64))
            rows += len(tokens)
    return rows / (time.perf_counter() - began)


def unordered(root: Path, since_first: list[float]) -> float:
    """Ray Data's own: whole files as blocks, dealt out as they come. Notes the rate since the first batch, too."""
    files = [str(file) for file in sorted((root / "train").iterdir())]
    rows, began = 0, time.perf_counter()
    dataset = quiet(ray.data.read_parquet(files, override_num_blocks=len(files)))
    (shard,) = dataset.streaming_split(1)
    first = began
    for _ in range(EPOCHS):
        for batch in shard.iter_batches(batch_size=BATCH, batch_format="pyarrow", prefetch_batches=2):
            tokens = decoded(batch)
            first = time.perf_counter() if not rows else first
            touch(tokens.astype(np.int64))
            rows += len(tokens)
    since_first.append(rows / (time.perf_counter() - first))
    return rows / (time.perf_counter() - began)


def consume(root: str, order: Order | FullOrder, rank: int, world: int, readers: int) -> float:
    """One worker: all batches of its share. Returns its rows/s since the first batch came."""
    rows, first = 0, 0.0
    for batch in batches(root, "train", order, 0, EPOCHS * order.rows // BATCH, rank, world, readers=readers):
        first = first or time.perf_counter()
        touch(batch.tokens)
        rows += len(batch.tokens)
    return rows / (time.perf_counter() - first)


def stream(
    root: Path, order: Order | FullOrder, world: int = 1, readers: int = 1, since_first: list[float] | None = None
) -> float:
    """Rows/s of all workers. Notes one worker's rate since the first batch, too."""
    began = time.perf_counter()
    if world == 1:
        steady = consume(str(root), order, 0, 1, readers)
        if since_first is not None:
            since_first.append(steady)
    else:
        worker = ray.remote(num_cpus=0)(consume)
        ray.get([worker.remote(str(root), order, rank, world, readers) for rank in range(world)])
    return EPOCHS * order.rows // BATCH * BATCH / (time.perf_counter() - began)


def waiting(root: Path, order: Order | FullOrder) -> float:
    """Share of the time that a consumer of 250 ms a step waits for its batches, the first one left out."""
    taken = batches(root, "train", order, 0, STEPS + 1, 0, 1)
    next(taken)
    waited, began = 0.0, time.perf_counter()
    while True:
        time.sleep(STEP_SECONDS)
        asked = time.perf_counter()
        if next(taken, None) is None:
            return waited / (asked - began)
        waited += time.perf_counter() - asked


def reads_per_row(root: Path, order: Order, world: int) -> float:
    """Rows of the row groups that the stream's own reading units touch, per row delivered."""
    shards, mixture = ShardSet(root), Mixture((order,))
    touched = delivered = 0
    for rank in range(world):
        slices = share(rank, world, SLICES)
        for unit in reading_units(shards, mixture, 0, 0, EPOCHS * order.rows // BATCH, slices, 2**26):
            touched += GROUP * len(np.unique(unit.part.rows // GROUP))
            delivered += len(unit.part.rows)
    return touched / delivered


@contextmanager
def weighed(peaks: dict[str, float]) -> Iterator[None]:
    """Notes peaks: MB of the object store in use, and of the private memory of this process and Ray's."""
    done = threading.Event()

    def watch() -> None:
        total = ray.cluster_resources()["object_store_memory"]
        while not done.wait(0.5):
            used = total - ray.available_resources().get("object_store_memory", 0.0)
            private = 0
            for process in [psutil.Process(), *psutil.Process().children(recursive=True)]:
                try:
                    private += process.memory_full_info().uss
                except psutil.Error:
                    continue
            peaks["object store"] = max(peaks.get("object store", 0), used / 1e6)
            peaks["private"] = max(peaks.get("private", 0), private / 1e6)

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    yield
    done.set()
    thread.join()


def main() -> None:
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 5
    count = int(sys.argv[2]) if len(sys.argv) > 2 else 200_345
    benchmark = Benchmark("stream", "rows/s", baseline="raw pyarrow")
    start_local(num_cpus=4)
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        rows = some_rows(count, LENGTH)
        write_set(root, [rows[lo : lo + SHARD] for lo in range(0, count, SHARD)], GROUP)
        del rows
        shards = ShardSet(root)
        lanes = Order.of(shards, BATCH, SLICES, seed=1)
        full = FullOrder(shards.rows, BATCH, SLICES, 1, shards.fingerprint)
        since_first: dict[str, list[float]] = {name: [] for name in ("Ray Data, unordered", "lanes", "full")}
        variants: dict[str, Callable[[], float]] = {
            "raw pyarrow": lambda: raw(root),
            "Ray Data, unordered": lambda: unordered(root, since_first["Ray Data, unordered"]),
            "stream, lanes": lambda: stream(root, lanes, since_first=since_first["lanes"]),
            "stream, lanes, 2 readers": lambda: stream(root, lanes, readers=2),
            "stream, lanes, 3 workers": lambda: stream(root, lanes, world=3),
            "stream, full": lambda: stream(root, full, since_first=since_first["full"]),
        }
        for work in variants.values():  # Ray starts its processes when they are first needed
            work()
        benchmark.run(variants, rounds)
        for name in ("stream, lanes", "stream, full"):
            benchmark.goal(name, 0.5)
        benchmark.goal("stream, lanes, 2 readers", 1.0, against="Ray Data, unordered")
        for name in ("stream, lanes", "stream, full"):
            ratio = statistics.median(benchmark.ratio(name, "Ray Data, unordered"))
            benchmark.notes[f"{name} over Ray Data, unordered (goal >= 1.0)"] = round(ratio, 3)
        # `streaming_split` takes seconds to start its coordinator: the same comparison without anybody's start. All are
        # flattered a little, for some batches were ready when the first one was.
        for name, rates in since_first.items():
            benchmark.notes[f"{name}, since its first batch, rows/s"] = round(statistics.median(rates[1:]))
        for name in ("lanes", "full"):
            pairs = zip(since_first[name][1:], since_first["Ray Data, unordered"][1:], strict=True)
            ratio = statistics.median(ours / theirs for ours, theirs in pairs)
            benchmark.notes[f"{name} over Ray Data, unordered, since their first batches"] = round(ratio, 3)
        for world in (1, 3, 8):
            reads = reads_per_row(root, lanes, world)
            benchmark.notes[f"reads per delivered row, {world} worker(s) (goal <= 1.15)"] = round(reads, 3)
        for name, order in (("lanes", lanes), ("full", full)):
            share_of_time = waiting(root, order)
            benchmark.notes[f"{name}: share of time waiting at 250 ms a step (goal < 0.01)"] = round(share_of_time, 5)
        ray.shutdown()
        peaks: dict[str, float] = {}
        start_local(num_cpus=4, object_store_bytes=STORE)
        with weighed(peaks):
            stream(root, lanes)
        ray.shutdown()
        benchmark.notes["set and object store, MB"] = [round(count * LENGTH / 1e6), STORE // 10**6]
        benchmark.notes["peak of the object store while streaming lanes, MB"] = round(peaks["object store"], 1)
        benchmark.notes["peak of private memory, this process and Ray's, MB"] = round(peaks["private"])
        benchmark.report()


if __name__ == "__main__":
    main()
