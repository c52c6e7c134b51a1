"""How many rows a network call should take: measured.

Calls are timed at 1, 2, 4, ... rows until more rows are hardly faster a row twice in a row (once may be chance), a call
gets long, or the memory would not do. Rows of another length are taken to cost what their tokens cost.
"""

import gc
import logging
import os
import resource
import statistics
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from time import perf_counter

import torch

from md4.objectives import MaskedDiffusion, evaluating
from md4.samplers import Batch, Job, SamplingConfig

_log = logging.getLogger(__name__)

MOST = 1024  # rows of a call
GAIN = 1.1  # rows a second that more rows must bring, as a ratio
LONGEST_S = 2.0  # a call beyond that makes everybody wait too long
MEMORY = 0.8  # share of the free memory that a call may take
_CALLS = 3  # of which the median counts


@dataclass(frozen=True)
class Point:
    """A call that was measured."""

    rows: int
    seconds: float

    @property
    def rate(self) -> float:
        """Rows a second."""
        return self.rows / self.seconds


def measure(call: Callable[[int], float], fits: Callable[[int], bool], most: int = MOST) -> list[Point]:
    """Points at 1, 2, 4, ... rows; the last two are not worth it, or the last is too long or the largest.

    call: seconds of a call of so many rows; it may run out of memory. fits: whether that many rows should be tried.
    """
    points: list[Point] = []
    rows = 1
    while rows <= most and fits(rows):
        try:
            points.append(Point(rows, call(rows)))
        except RuntimeError as error:  # torch has no other name for a failed allocation on CPUs
            if not points:
                raise
            _log.warning("%d rows don't fit a call: %s", rows, error)
            break
        rates = [point.rate for point in points]
        if points[-1].seconds > LONGEST_S or (len(rates) > 2 and max(rates[-2:]) < GAIN * max(rates[:-2])):
            break
        rows *= 2
    return points


def best(points: list[Point]) -> int:
    """The fewest rows from which more of them bring less than `GAIN`; of calls that are not too long, if there are."""
    short = [point for point in points if point.seconds <= LONGEST_S] or points[:1]
    most = max(point.rate for point in short)
    return next(point.rows for point in short if GAIN * point.rate > most)


@dataclass
class Capacity:
    """Rows that a call takes, by the tokens of a row that the network sees."""

    length: int  # tokens of the rows that were measured
    rows: int  # of that length
    points: list[Point] = field(default_factory=list)  # empty if nothing was measured
    _tokens: dict[int, int] = field(default_factory=dict)  # by length, where calls turned out too large

    def places(self, length: int) -> int:
        """Rows of that length."""
        found = min(MOST, max(1, self.rows * self.length // length))
        return min(found, self._tokens.get(length, found))

    def too_large(self, length: int, rows: int) -> None:
        """A call of that many rows ran out of memory: never try more than half of it again."""
        self._tokens[length] = max(1, min(rows // 2, self.places(length)))


def measured(model: MaskedDiffusion, length: int) -> Capacity:
    """The capacity of `model` for rows of `length` tokens on its device. Takes a few calls of each size."""
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    memory = _Memory(device)

    def call(rows: int) -> float:
        return statistics.median([_timed(model, rows, length) for _ in range(_CALLS + 1)][1:])

    def fits(rows: int) -> bool:
        return memory.fits(rows)

    with evaluating(model.network):
        points = measure(lambda rows: memory.watched(rows, lambda: call(rows)), fits)
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    found = Capacity(length, best(points), points)
    shown = ", ".join(f"{point.rows}: {1e3 * point.seconds:.1f}" for point in points)
    _log.info("a call takes %d rows of %d tokens (ms by rows: %s)", found.rows, length, shown)
    return found


def _timed(model: MaskedDiffusion, rows: int, length: int) -> float:
    """Seconds of the first call for `rows` empty texts."""
    classes: int = getattr(getattr(model.network, "conditioning", None), "classes", 0)
    job = Job(
        canvas=torch.full((rows, length), model.mask_id),
        seeds=torch.arange(rows),
        settings=SamplingConfig(),
        labels=torch.zeros(rows, dtype=torch.int64) if classes else None,
    )
    batch = Batch(model)
    batch.join(job, range(rows))
    began = perf_counter()
    batch.advance()
    if batch.device.type == "cuda":
        torch.cuda.synchronize(batch.device)
    return perf_counter() - began


class _Memory:
    """What calls took, and whether twice as much is free."""

    def __init__(self, device: torch.device):
        self.device = device
        self.taken: tuple[int, int] | None = None  # rows, and the bytes that they took

    def watched(self, rows: int, work: Callable[[], float]) -> float:
        before = self._peak(reset=True)
        result = work()
        self.taken = (rows, max(0, self._peak() - before))
        return result

    def fits(self, rows: int) -> bool:
        if self.taken is None:
            return True
        return self.taken[1] * rows / self.taken[0] <= MEMORY * self._free()

    def _peak(self, reset: bool = False) -> int:
        """Bytes; of a CPU those of the process, whose peak can't be reset: a call that stays below it took nothing."""
        if self.device.type != "cuda":
            return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        if reset:
            torch.cuda.reset_peak_memory_stats(self.device)
            return torch.cuda.memory_allocated(self.device)
        return torch.cuda.max_memory_allocated(self.device)

    def _free(self) -> int:
        if self.device.type != "cuda":
            if "SC_AVPHYS_PAGES" not in os.sysconf_names:
                return sys.maxsize  # unknown: a call that needs too much will say so
            return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        cached = torch.cuda.memory_reserved(self.device) - torch.cuda.memory_allocated(self.device)
        return torch.cuda.mem_get_info(self.device)[0] + cached
