"""Rows that overlap: windows of L tokens that begin at every token of a stream, which is stored once, in rows of L.

The tokens of each part are a *stream* of T tokens. Window w of it has the tokens `w*stride .. w*stride+L-1`, so there
are (T - L) // stride + 1 of them. The ids of windows count through the streams in the order of their shards. A window
lies in one or two neighbouring stored rows; the last stored row of a stream is filled up with tokens of no window.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np


@dataclass(frozen=True)
class Windows:
    """The windows of a split."""

    streams: tuple[int, ...]  # T of each, at least L
    length: int  # L
    stride: int  # tokens from the start of one window to that of the next

    @cached_property
    def _counts(self) -> np.ndarray:
        return (np.array(self.streams, np.int64) - self.length) // self.stride + 1

    @cached_property
    def _before(self) -> np.ndarray:
        return np.cumsum(self._counts) - self._counts

    @cached_property
    def _stored_before(self) -> np.ndarray:
        stored = -(-np.array(self.streams, np.int64) // self.length)
        return np.cumsum(stored) - stored

    @property
    def rows(self) -> int:
        """The number of windows."""
        return int(self._counts.sum())

    def read(self, ids: np.ndarray, read_stored: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
        """Windows `[n, L]` of ids `[n]`.

        read_stored: from numbers `[k]` of stored rows, different ones in the order of the shards, to the rows `[k, L]`.
        """
        if not len(ids):
            return read_stored(np.empty(0, np.int64))
        stream = np.searchsorted(self._before, ids, "right") - 1
        start = (ids - self._before[stream]) * self.stride
        first, offset = self._stored_before[stream] + start // self.length, start % self.length
        second = np.where(offset > 0, first + 1, first)  # a window at the very end has no row behind it
        wanted, which = np.unique(np.stack([first, second]), return_inverse=True)
        pair = read_stored(wanted)[which.reshape(2, -1)]  # [2, n, L]
        both = np.concatenate(list(pair), axis=1)
        return np.take_along_axis(both, offset[:, None] + np.arange(self.length), axis=1)


def count(tokens: int, length: int, stride: int) -> int:
    """Windows of a stream of so many tokens."""
    return max(0, (tokens - length) // stride + 1)


def filled_rows(streams: Sequence[int], length: int) -> set[int]:
    """Numbers of the stored rows that end with tokens of no window."""
    ends = np.cumsum([-(-tokens // length) for tokens in streams])
    return {int(end) - 1 for end, tokens in zip(ends, streams, strict=True) if tokens % length}
