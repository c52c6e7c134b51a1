"""Which rows a run has consumed, as one number that two runs can compare, whatever their workers.

The *sum* of a step is that of one keyed hash for each row of the global batch, of (data set, step, slot, row id),
modulo 2^64: workers add up what they took in any order and in any shares. The *head* after k steps chains the sums,

    head_0 = "",    head_k = blake2b(head_(k-1), sum_(k-1)),

so that equal heads mean equal rows in all steps before. Beside the head, a *digest* of every step (8 hexadecimal digits
of its sum) goes to the metrics: that is how the first step that differs is found. All of it follows from
`pipelines.mixture` by arithmetic (`expected`), so a run can be checked without reading a row.
"""

import hashlib
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from md4 import noise
from pipelines.mixture import Mixture

DIGITS = 8  # of a step's digest
_CHUNK_ROWS = 2**19  # hashed at a time

Combine = Callable[[Tensor], Tensor]


class Ledger:
    """What a worker notes of the batches that it took. `head` and `digests` are those of all workers together.

    Args:
        mixture: what the rows belong to.
        dumped: `dump()` of the worker group that came before, if there was one.
    """

    def __init__(self, mixture: Mixture, dumped: dict[str, Any] | None = None):
        self._keys = _keys(mixture)
        dumped = dumped or {"step": 0, "head": "", "digests": ""}
        self.step: int = dumped["step"]  # steps that the head covers
        self.head: str = dumped["head"]
        self.digests: str = dumped["digests"]  # of the steps since the last `take_digests`
        self._sums: list[Tensor] = []

    def add(self, step: int, slots: np.ndarray, sets: np.ndarray, rows: np.ndarray) -> None:
        """Note one worker's rows `[n]` of a step; steps must come in turn."""
        if step != self.step + len(self._sums):
            raise ValueError(f"the ledger is at step {self.step + len(self._sums)}, got step {step}")
        given = (torch.from_numpy(values)[None] for values in (slots, sets, rows))
        self._sums.append(_sums(self._keys, torch.tensor([step]), *given)[0])

    def settle(self, combine: Combine = lambda sums: sums) -> None:
        """Bring the head up to date. combine: from own sums `[steps]` to those of all workers, int64 that wraps."""
        if not self._sums:
            return
        sums = combine(torch.stack(self._sums)).tolist()
        self._sums = []
        for value in sums:
            self.step, self.head = self.step + 1, chained(self.head, value)
            self.digests += digest(value)

    def take_digests(self) -> str:
        """Digests of the steps since the last call, end to end."""
        taken, self.digests = self.digests, ""
        return taken

    def dump(self) -> dict[str, Any]:
        """What a checkpoint keeps, as JSON values."""
        return {"step": self.step, "head": self.head, "digests": self.digests}


def chained(head: str, value: int) -> str:
    """The head after one more step with the sum `value`: 32 hexadecimal digits."""
    return hashlib.blake2b(bytes.fromhex(head) + _bytes(value), digest_size=16).hexdigest()


def digest(value: int) -> str:
    """What stands for the sum of a step in the metrics."""
    return _bytes(value).hex()[:DIGITS]


def _bytes(value: int) -> bytes:
    return (value % 2**64).to_bytes(8, "big")


def expected(mixture: Mixture, start: int, stop: int) -> Iterator[int]:
    """The sums of steps `start..stop-1` of the order, signed."""
    chunk = max(1, _CHUNK_ROWS // mixture.batch_size)
    keys, slots = _keys(mixture), torch.arange(mixture.batch_size)[None]
    for lo in range(start, stop, chunk):
        hi = min(lo + chunk, stop)
        sets, rows = (torch.from_numpy(ids.reshape(hi - lo, -1)) for ids in mixture.rows_at(lo, hi))
        yield from _sums(keys, torch.arange(lo, hi), slots, sets, rows).tolist()


def head_at(mixture: Mixture, step: int) -> str:
    """The head that a run must have after `step` steps."""
    head = ""
    for value in expected(mixture, 0, step):
        head = chained(head, value)
    return head


def _keys(mixture: Mixture) -> Tensor:
    return torch.tensor([noise.key(0, "ledger", order.fingerprint) for order in mixture.orders])


def _sums(keys: Tensor, steps: Tensor, slots: Tensor, sets: Tensor, rows: Tensor) -> Tensor:
    """Sums `[k]` of steps `[k]` for slots, sets and rows `[k, n]`."""
    places = noise.derive(noise.derive(keys[sets], steps[:, None]), slots)
    return noise.bits(places, rows).sum(1)
