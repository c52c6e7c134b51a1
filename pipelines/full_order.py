"""The order for rows that are cheap to reach one by one: every epoch a permutation of all rows, with no state to keep.

Sample s = kB + slot (see `pipelines.order`) is the row f(s mod N) of epoch s // N. f is a Feistel network over pairs
of h-bit halves, hence a bijection of 0 .. 2^(2h)-1, keyed by (seed, data set, epoch). Values of N and above are put
through it again until they fall below N (cycle walking), which makes it a bijection of 0 .. N-1; 2^(2h) < 4N, so fewer
than four passes are expected. Nothing is stored and every sample costs the same, wherever in the stream it stands.
"""

import functools
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from md4 import noise
from md4.errors import UserError
from pipelines.order import check_numbers

_ROUNDS = 6
_UNIT_STEPS = 16  # steps of a unit where nothing else asks for more


@dataclass(frozen=True)
class FullOrder:
    """Global batches in which any row may stand anywhere. UserError where the numbers do not fit together."""

    rows: int  # N
    batch_size: int  # B, a multiple of slices
    slices: int
    seed: int
    fingerprint: str = ""  # of the data set: another set is another order

    def __post_init__(self) -> None:
        check_numbers(self, "rows", "batch_size", "slices")
        if self.rows > 2**62:
            raise UserError(f"order: rows must be at most 2**62, got {self.rows}")

    @property
    def slice_size(self) -> int:
        """m: places of one slice in a step."""
        return self.batch_size // self.slices

    @functools.cached_property
    def _stream(self) -> int:
        return noise.key(self.seed, "full order", self.fingerprint)

    def rows_at(self, start: int, stop: int, first: int = 0, last: int | None = None) -> np.ndarray:
        """Row ids `[steps, slices, m]` int64 of steps `start..stop-1`, for slices `first..last-1` (by default all)."""
        last = self.slices if last is None else last
        places = np.arange(first * self.slice_size, last * self.slice_size)
        samples = np.arange(start, stop)[:, None] * self.batch_size + places
        epochs, which = np.unique(samples // self.rows, return_inverse=True)
        keys = noise.derive(self._stream, torch.from_numpy(epochs))
        ids = permuted(torch.from_numpy(samples % self.rows), self.rows, keys, torch.from_numpy(which))
        return ids.numpy().reshape(stop - start, last - first, self.slice_size)

    def units(self, start: int, stop: int, at_least: int = 1, at_most: int | None = None) -> Iterator[tuple[int, int]]:
        """Runs of steps `(lo, hi)` that cover `start..stop-1`: any are as good to read as others."""
        size = max(_UNIT_STEPS, at_least) if at_most is None else min(max(_UNIT_STEPS, at_least), at_most)
        for lo in range(start, stop, size):
            yield lo, min(lo + size, stop)


def permuted(index: Tensor, n: int, keys: Tensor, which: Tensor) -> Tensor:
    """Places of permutations of `0..n-1`: at `index` [...] of the one that `keys[which]` names, which being [...]."""
    half = max(1, ((n - 1).bit_length() + 1) // 2)
    mask = 2**half - 1
    rounds = [noise.derive(keys, number) for number in range(_ROUNDS)]
    values, which = index.flatten().clone(), which.flatten()
    outside = torch.arange(len(values))
    while len(outside):
        left, right = values[outside] >> half, values[outside] & mask
        for own in rounds:
            left, right = right, left ^ (noise.bits(own[which[outside]], right) & mask)
        values[outside] = (left << half) | right
        outside = outside[values[outside] >= n]
    return values.view_as(index)
