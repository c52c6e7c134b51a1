"""Which row stands where: global batch k as a pure function of (data set, seed, k) - contract C3. No files, no Ray.

Samples are numbered without end. Step k holds the samples kB .. kB+B-1; epoch e holds the samples eN .. eN+N-1, and
every one of the N rows exactly once. No row is dropped, whatever N modulo B is: a step that lies across the end of an
epoch has rows of both.

The B places of a step are cut into S *slices* of m = B/S, and a worker takes a run of slices. This file has the order
for rows that are read from disk by row groups (`pipelines.full_order`: for rows that are cheap to reach one by one).
It keeps workers apart: within an epoch the row groups are permuted and dealt out to S *lanes*, group g of the permuted
line to lane g mod S, and slice i of a full step takes rows from lane i only. A lane is then permuted within *windows*
of about `mixing` groups, so that a window is also a good unit of reading: a worker reads the groups of its own lanes,
each once, and nobody else's.

    epoch e     |--border--|------------- full steps --------------|--border--|
    line        [g7 g2 g9 g4 g0 g5 ...]  permuted groups, a short last one at the end
    lane 0      [g7 g9 g0 ...]           permuted again, window by window
    lane 1      [g2 g4 g5 ...]

The rows that the full steps leave over, fewer than 2B at the end of the line, are permuted and fill the border steps.
"""

import functools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from md4 import noise
from md4.errors import UserError

if TYPE_CHECKING:
    from pipelines.shards import ShardSet


@dataclass(frozen=True)
class Order:
    """The sequence of global batches over `rows` rows. UserError where the numbers do not fit together."""

    rows: int  # N
    batch_size: int  # B, a multiple of slices
    slices: int  # S: the most workers that can share a batch
    seed: int
    group: int = 64  # C: rows of a group; the row groups of the shards, for cheap reading
    mixing: int = 128  # groups of a lane that are mixed with each other
    fingerprint: str = ""  # of the data set: another set is another order

    def __post_init__(self) -> None:
        check_numbers(self, "rows", "batch_size", "slices", "group", "mixing")

    @classmethod
    def of(cls, shards: "ShardSet", batch_size: int, slices: int, seed: int, mixing: int | None = None) -> "Order":
        """The order over one split of a prepared set; `mixing` is `mixing_by_memory` unless it is given."""
        if not shards.rows:
            raise UserError(f"the split {shards.split!r} of {str(shards.root)!r} has no rows to make batches of")
        if mixing is None:
            mixing = mixing_by_memory(slices, shards.rows_per_group * shards.length * shards.dtype.itemsize)
        return cls(shards.rows, batch_size, slices, seed, shards.rows_per_group, mixing, shards.fingerprint)

    @property
    def slice_size(self) -> int:
        """m: places of one slice in a step."""
        return self.batch_size // self.slices

    @property
    def window(self) -> int:
        """Steps of one window of a lane."""
        return max(1, self.mixing * self.group // self.slice_size)

    @functools.cached_property
    def _stream(self) -> int:
        return noise.key(self.seed, "order", self.fingerprint)

    def full_steps(self, epoch: int) -> tuple[int, int]:
        """The steps `first..stop-1` all of whose samples belong to the epoch; first == stop if there is none."""
        first = -(-epoch * self.rows // self.batch_size)
        return first, max(first, (epoch + 1) * self.rows // self.batch_size)

    def rows_at(self, start: int, stop: int, first: int = 0, last: int | None = None) -> np.ndarray:
        """Row ids `[steps, slices, m]` int64 of steps `start..stop-1`, for slices `first..last-1` (by default all)."""
        last = self.slices if last is None else last
        ids = np.empty((stop - start, last - first, self.slice_size), np.int64)
        step = start
        while step < stop:
            epoch = step * self.batch_size // self.rows
            begin, end = self.full_steps(epoch)
            if begin <= step < end:
                upto = min(end, stop)
                for lane in range(first, last):
                    ids[step - start : upto - start, lane - first] = self._lane(epoch, lane, step - begin, upto - begin)
                step = upto
            else:
                ids[step - start] = self._border(step, first, last)
                step += 1
        return ids

    def units(self, start: int, stop: int, at_least: int = 1, at_most: int | None = None) -> Iterator[tuple[int, int]]:
        """Runs of steps `(lo, hi)` that cover `start..stop-1`, each good to read at once.

        They end where a window ends, so that no row group is needed in two of them. But windows are joined until a unit
        has `at_least` steps, and cut where it would have more than `at_most`.
        """
        lo = hi = start
        while hi < stop:
            hi = self._window_end(hi)
            if hi - lo < at_least and hi < stop:
                continue
            hi = min(hi, stop, lo + at_most if at_most else hi)
            yield lo, hi
            lo = hi

    def _window_end(self, step: int) -> int:
        """The step after the last one of the window that `step` is in; a border step is a window by itself."""
        begin, end = self.full_steps(step * self.batch_size // self.rows)
        if begin <= step < end:
            return min(end, step + self.window - (step - begin) % self.window)
        return step + 1

    # -- inside an epoch: places in a lane or at the border -> places in the line -> rows ----------------------------

    def _lane(self, epoch: int, lane: int, lo: int, hi: int) -> np.ndarray:
        """Row ids `[hi-lo, m]` of a lane at full steps `lo..hi-1`, counted from the epoch's first full step."""
        begin, end = self.full_steps(epoch)
        m, group, size = self.slice_size, self.group, (end - begin) * self.slice_size
        windows = range(lo // self.window, (hi - 1) // self.window + 1)
        shuffled = []
        for window in windows:
            head = window * self.window * m
            count = min(self.window * m, size - head)
            shuffled.append(head + self._permutation(count, "window", epoch, lane, window))
        skipped = (lo - windows[0] * self.window) * m
        place = np.concatenate(shuffled)[skipped : skipped + (hi - lo) * m].reshape(-1, m)

        # Whole groups go to the lanes in turn. What is left of a lane, less than a group, is a run behind all of them.
        whole = size // group * group
        in_groups = (place // group * self.slices + lane) * group + place % group
        behind = whole * self.slices + lane * (size - whole) + (place - whole)
        return self._row(epoch, np.where(place < whole, in_groups, behind))

    def _border(self, step: int, first: int, last: int) -> np.ndarray:
        """Row ids `[slices, m]` of a step whose samples belong to several epochs, or to one that has no full step."""
        m = self.slice_size
        samples = np.arange(step * self.batch_size + first * m, step * self.batch_size + last * m)
        ids = np.empty_like(samples)
        for epoch in np.unique(samples // self.rows).tolist():
            mine = samples // self.rows == epoch
            begin, end = self.full_steps(epoch)
            taken = (end - begin) * self.batch_size  # by the full steps: the head of the line
            rank = samples[mine] - epoch * self.rows
            rank -= np.where(samples[mine] >= end * self.batch_size, taken, 0)
            spare = self._permutation(self.rows - taken, "border", epoch)
            ids[mine] = self._row(epoch, taken + spare[rank])
        return ids.reshape(-1, m)

    def _row(self, epoch: int, place: np.ndarray) -> np.ndarray:
        """Row ids at places of the epoch's line: whole groups permuted, the short last one where it was."""
        line = _line(self._stream, epoch, self.rows // self.group)
        return line[place // self.group] * self.group + place % self.group

    def _permutation(self, n: int, *words: int | str) -> np.ndarray:
        return noise.permutation(noise.key(self._stream, *words), n).numpy()


@functools.lru_cache(4)
def _line(stream: int, epoch: int, groups: int) -> np.ndarray:
    """The permuted groups of an epoch `[groups + 1]`, the last one being the short group."""
    shuffled = noise.permutation(noise.key(stream, "groups", epoch), groups).numpy()
    return np.append(shuffled, groups)


def check_numbers(order: Any, *positive: str) -> None:
    """UserError unless these numbers of an order are positive and its batches can be cut into its slices."""
    for name in positive:
        if getattr(order, name) < 1:
            raise UserError(f"order: {name} must be at least 1, got {getattr(order, name)}")
    if order.batch_size % order.slices:
        raise UserError(f"batch size {order.batch_size} is not a multiple of the {order.slices} slices it is cut into")


def mixing_by_memory(slices: int, group_bytes: int, window_bytes: int = 2**24) -> int:
    """Groups of a lane to mix: as many as fit into memory together with those of the other lanes, but 8 at least.

    The more groups a window has, the better: for rows that resemble their neighbours, the means of batches of B rows
    vary by a factor of about 1 + B / (groups of a window, all lanes) more than those of random batches.
    """
    return max(8, window_bytes // (slices * group_bytes))


def share(rank: int, world: int, slices: int) -> tuple[int, int]:
    """The slices `first..last-1` of worker `rank` of `world`: contiguous; their numbers differ by one at most.

    UserError as of `check_workers`; ValueError for a rank outside the world.
    """
    check_workers(world, slices)
    if not 0 <= rank < world:
        raise ValueError(f"rank must be in 0..{world - 1}, got {rank}")
    return rank * slices // world, (rank + 1) * slices // world


def largest_share(world: int, slices: int) -> int:
    """Slices of the workers that have most of them."""
    return -(-slices // world)


def check_workers(world: int, slices: int) -> None:
    """UserError unless every worker gets a slice."""
    if not 1 <= world <= slices:
        raise UserError(
            f"{world} workers cannot share a batch of {slices} slices: the number of workers must be in 1..{slices}"
        )
