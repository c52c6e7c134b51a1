"""How well the orders shuffle, and what they cost (`pipelines.order`, `pipelines.full_order`).

    python -m tests.benchmarks.bench_order [ROUNDS]

200,345 rows in row groups of 64, batches of 256 in 8 slices. The figures in the notes, over two epochs:

- position: rank correlation of a row's id with its place in the epoch; epochs: of its places in two epochs (both: 0);
- lag 1, lag B: correlation of the ids at neighbouring places, and at the same slot of neighbouring batches (0);
- batch means: variance of the mean of a label that follows the ids, over that of random batches (1);
- groups: row groups that a batch comes from (256 less a few);
- neighbours: share of pairs of neighbouring ids that meet in a batch (0.0013 by chance);
- documents: steps that 8 neighbouring rows are spread over (8 less a little);
- reads: rows of the groups that a worker of 1, 3 or 8 must read, per row delivered, where rows are read by groups.

Everything follows from the seed, so the notes are the same on every machine; only the speed is measured.
"""

import sys
import time
from collections.abc import Callable

import numpy as np

from pipelines.full_order import FullOrder
from pipelines.order import Order, share
from tests.benchmarks.harness import Benchmark

ROWS, BATCH, SLICES, GROUP, SEED = 200_345, 256, 8, 64, 7


class FileOrder(FullOrder):
    """Rows as they stand in the file: what shuffling is measured against."""

    def rows_at(self, start: int, stop: int, first: int = 0, last: int | None = None) -> np.ndarray:
        samples = np.arange(start * self.batch_size, stop * self.batch_size) % self.rows
        return samples.reshape(stop - start, self.slices, -1)[:, first:last]


def lanes(mixing: int) -> Order:
    return Order(ROWS, BATCH, SLICES, SEED, GROUP, mixing)


ORDERS: dict[str, Order | FullOrder] = {
    "file order": FileOrder(ROWS, BATCH, SLICES, SEED),
    "lanes, 8 groups each": lanes(8),
    "lanes, 32 groups each": lanes(32),
    "lanes, 128 groups each": lanes(128),
    "full": FullOrder(ROWS, BATCH, SLICES, SEED),
}


def quality(order: Order | FullOrder) -> dict[str, float]:
    """The figures of the module's description."""
    steps = 2 * ROWS // BATCH
    batches = order.rows_at(0, steps + 1).reshape(steps + 1, -1)
    samples = batches.ravel()[: 2 * ROWS]
    places = np.empty((2, ROWS))
    for epoch in (0, 1):
        places[epoch, samples[epoch * ROWS : (epoch + 1) * ROWS]] = np.arange(ROWS)
    step_of = places[0] // BATCH
    documents = step_of[: ROWS // 8 * 8].reshape(-1, 8)
    whole = batches[:steps]
    means = np.sin(whole / ROWS * 40).mean(1)  # a label that changes slowly along the file
    iid = np.sin(np.arange(ROWS) / ROWS * 40).var() / BATCH
    return {
        "position": correlation(np.arange(ROWS), places[0]),
        "epochs": correlation(places[0], places[1]),
        "lag 1": correlation(samples[:-1], samples[1:]),
        "lag B": correlation(samples[:-BATCH], samples[BATCH:]),
        "batch means": float(means.var() / iid),
        "groups": float(np.mean([len(np.unique(batch // GROUP)) for batch in whole])),
        "neighbours": float((step_of[1:] == step_of[:-1]).mean()),
        "documents": float(np.mean([len(np.unique(steps)) for steps in documents])),
        **({f"reads, {world}": reads(order, world) for world in (1, 3, 8)} if isinstance(order, Order) else {}),
    }


def correlation(one: np.ndarray, other: np.ndarray) -> float:
    return float(np.corrcoef(one, other)[0, 1])


def reads(order: Order, world: int) -> float:
    """Rows read per row delivered over two epochs, if each unit reads its groups once."""
    touched = delivered = 0
    for rank in range(world):
        for lo, hi in order.units(0, 2 * ROWS // BATCH, at_least=16):
            ids = order.rows_at(lo, hi, *share(rank, world, SLICES))
            touched += GROUP * len(np.unique(ids // GROUP))
            delivered += ids.size
    return touched / delivered


def speed(order: Order | FullOrder) -> float:
    """Steps/s of an epoch, in the units that the stream reads."""
    steps = ROWS // BATCH
    began = time.perf_counter()
    for lo, hi in order.units(0, steps, at_least=16):
        order.rows_at(lo, hi)
    return steps / (time.perf_counter() - began)


def main() -> None:
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 5
    benchmark = Benchmark("order", "steps/s", baseline="lanes, 128 groups each")
    work: dict[str, Callable[[], float]] = {name: lambda order=order: speed(order) for name, order in ORDERS.items()}
    benchmark.run(work, rounds)
    for name, order in ORDERS.items():
        benchmark.notes[name] = {figure: round(value, 4) for figure, value in quality(order).items()}
    benchmark.report()


if __name__ == "__main__":
    main()
