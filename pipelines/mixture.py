"""Several data sets in one stream, by weight: which set and which row stand where in global batch k. Pure arithmetic.

Weights are integers that sum to 1024, the *cycle*. Place j of slice i at step k is number u = km + j of lane i. Lay the
sets around a circle of 1024 points, each an arc as long as its weight. Lane i starts at point i * 1024 / S, and each
next place is 633 points on (1024 over the golden ratio, and odd, so that 1024 places come to every point once). Hence

- of any 1024 places in a row, a lane takes exactly its weight from each set;
- at one place of the slices the lanes are evenly spaced, so that each batch, small as it may be, has nearly its share.

The t-th place that lane i takes from a set is place t mod m of slice i of step t // m of that set's own order
(`pipelines.order`, `pipelines.full_order`), which has the same batch size and slices. So every set runs through its
own epochs, each row once in each, at its own speed; and the position in the stream is still the one integer k.
"""

import functools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from md4.errors import UserError
from pipelines.full_order import FullOrder
from pipelines.order import Order
from pipelines.quotas import CYCLE

_STRIDE = 633


@dataclass(frozen=True)
class Part:
    """What one set gives to a run of steps of some slices: rows in the order of their places."""

    places: np.ndarray  # [k] int64, ascending: step - start, times the slots of these slices, plus the slot among them
    rows: np.ndarray  # [k] int64: row ids


@dataclass(frozen=True)
class Mixture:
    """Global batches over one or several orders. UserError where they do not fit together."""

    orders: tuple[Order | FullOrder, ...]
    weights: tuple[int, ...] = (CYCLE,)  # of each order, out of CYCLE

    def __post_init__(self) -> None:
        if len(self.weights) != len(self.orders) or sum(self.weights) != CYCLE or min(self.weights) < 1:
            raise ValueError(f"{len(self.orders)} weights above 0 that sum to {CYCLE} are needed, got {self.weights}")
        if len({(order.batch_size, order.slices) for order in self.orders}) > 1:
            raise ValueError("the orders of a mixture must have the same batch size and slices")
        if len({order.fingerprint for order in self.orders}) < len(self.orders):
            raise UserError("the same data set stands twice in the mixture: give it once, with the sum of its weights")

    @property
    def batch_size(self) -> int:
        return self.orders[0].batch_size

    @property
    def slices(self) -> int:
        return self.orders[0].slices

    @property
    def slice_size(self) -> int:
        """m: places of one slice in a step."""
        return self.orders[0].slice_size

    def epochs(self, step: int) -> list[float]:
        """How often each set has been seen when `step` steps are done."""
        taken = [self._taken(which, np.arange(self.slices), step) for which in range(len(self.orders))]
        return [int(counts.sum()) / order.rows for counts, order in zip(taken, self.orders, strict=True)]

    def facts(self) -> dict[str, Any]:
        """Everything that decides which row stands where, as JSON values."""
        sets = [
            {"order": "lanes" if isinstance(order, Order) else "full", "weight": weight}
            | {
                name: getattr(order, name)
                for name in ("fingerprint", "rows", "group", "mixing")
                if hasattr(order, name)
            }
            for order, weight in zip(self.orders, self.weights, strict=True)
        ]
        return {"seed": self.orders[0].seed, "batch_size": self.batch_size, "slices": self.slices, "sets": sets}

    def rows_at(self, start: int, stop: int, first: int = 0, last: int | None = None) -> tuple[np.ndarray, np.ndarray]:
        """Numbers of sets, and row ids in them, both int64 `[steps, slices, m]`, of steps `start..stop-1`."""
        last = self.slices if last is None else last
        shape = (stop - start, last - first, self.slice_size)
        sets, rows = np.zeros(shape, np.int64), np.zeros(shape, np.int64)
        for which in range(len(self.orders)):
            part = self.part(which, start, stop, first, last)
            sets.ravel()[part.places] = which
            rows.ravel()[part.places] = part.rows
        return sets, rows

    def part(self, which: int, start: int, stop: int, first: int, last: int) -> Part:
        """The rows of one set in slices `first..last-1` of steps `start..stop-1`. Its cost is that of these rows."""
        order, m = self.orders[which], self.slice_size
        if len(self.orders) == 1:
            rows = order.rows_at(start, stop, first, last).ravel()
            return Part(np.arange(len(rows)), rows)
        begin, end = (self._taken(which, np.arange(first, last), step) for step in (start, stop))
        counts = end - begin
        if not counts.any():
            return Part(np.empty(0, np.int64), np.empty(0, np.int64))
        lo, hi = int(begin.min()) // m, -(-int(end.max()) // m)  # steps of the set's own order
        own = order.rows_at(lo, hi, first, last).transpose(1, 0, 2).reshape(last - first, -1)
        lane = np.repeat(np.arange(last - first), counts)
        t = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts) + begin[lane]
        weight, at = self.weights[which], _table(self.weights, self.slices).at[which]
        u = t // weight * CYCLE + at[lane + first, t % weight]
        places = (u // m - start) * len(counts) * m + lane * m + u % m
        by_place = np.argsort(places)
        return Part(places[by_place], own[lane, t - lo * m][by_place])

    def units(
        self, which: int, start: int, stop: int, slices: tuple[int, int], at_least: int = 1, at_most: int | None = None
    ) -> Iterator[tuple[int, int]]:
        """Runs of steps `(lo, hi)` that cover `start..stop-1`, good to read at once for one set (see `Order.units`).

        `at_least` and `at_most` are steps of its own order: so many of its rows as a whole batch has.
        """
        lo, m = start, self.slice_size
        begin, end = (self._taken(which, np.arange(*slices), step) for step in (start, stop))
        for _, own in self.orders[which].units(int(begin.min()) // m, -(-int(end.max()) // m), at_least, at_most):
            hi = min(stop, -(-own * CYCLE // self.weights[which]))  # lanes are there within a few places
            if hi > lo:
                yield lo, hi
                lo = hi
        if lo < stop:
            yield lo, stop

    def _taken(self, which: int, lanes: np.ndarray, step: int) -> np.ndarray:
        """Places `[lanes]` that each lane takes from a set before a step."""
        u = step * self.slice_size
        if len(self.orders) == 1:
            return np.full(len(lanes), u)
        return u // CYCLE * self.weights[which] + _table(self.weights, self.slices).before[which][lanes, u % CYCLE]


@dataclass(frozen=True)
class _Table:
    before: list[np.ndarray]  # of each set [slices, CYCLE]: places that it takes before one of the cycle
    at: list[np.ndarray]  # of each set [slices, weight]: the places that it takes, ascending


@functools.lru_cache(4)
def _table(weights: tuple[int, ...], slices: int) -> _Table:
    lanes = np.arange(slices)[:, None] * CYCLE // slices
    point = (lanes + np.arange(CYCLE) * _STRIDE) % CYCLE
    which = np.searchsorted(np.cumsum(weights), point, side="right")  # [slices, CYCLE]
    before, at = [], []
    for number, weight in enumerate(weights):
        mine = which == number
        before.append(np.cumsum(mine, axis=1) - mine)
        at.append(np.nonzero(mine)[1].reshape(slices, weight))
    return _Table(before, at)
