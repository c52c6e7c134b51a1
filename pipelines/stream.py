"""The global batches of `pipelines.mixture`, cut for one worker and delivered by Ray Data.

A worker builds its own pipeline from (rank, world, step), inside its training function; nobody else has to know the
step. Units of steps that end with a shuffle window -> one task each, which reads the unit's row groups once and returns
its rows in order as one block (`pipelines.reading`) -> batches. Of a mixture each set has a pipeline of its own, so
that its units end with its own windows, and the batches are put together from what they give. The position is one
integer, the step; starting anywhere costs the same.
"""

import atexit
import contextlib
import weakref
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from md4.errors import UserError
from pipelines.full_order import FullOrder
from pipelines.mixture import Mixture
from pipelines.order import Order, share
from pipelines.quotas import CYCLE
from pipelines.reading import PartStream, ReadAhead, plan_steps, reading_units
from pipelines.shards import Reads, ShardSet
from pipelines.storage import Folder, Place


@dataclass(frozen=True)
class Batch:
    """One worker's share of one global batch: n examples of L tokens."""

    step: int
    slots: np.ndarray  # [n] int64: places in the global batch, 0..B-1
    rows: np.ndarray  # [n] int64: row ids in the split of their set
    tokens: np.ndarray  # [n, L] int64
    sets: np.ndarray  # [n] int64: numbers of the sets in a mixture; 0 where there is but one
    labels: np.ndarray | None = None  # [n] int64, -1 where a row has none; None: no set has labels


def batches(
    paths: Place | Sequence[Place],
    split: str,
    order: Order | FullOrder | Mixture,
    start: int,
    stop: int,
    rank: int,
    world: int,
    *,
    readers: int = 1,
    ahead_bytes: int = 2**26,
) -> "Stream":
    """Worker `rank`'s batches of steps `start..stop-1`, in order, read by at most `readers` tasks at a time and set.

    `paths`: the prepared set, or one for each order of a mixture. Reading begins at once, so whatever is done before
    the first batch is taken overlaps with it. About `ahead_bytes` of tokens are held at most, or two steps of each set.
    UserError now if the sets, the order or the world do not fit together, and later for a damaged shard; RuntimeError
    if Ray Data loses or misplaces a block.
    """
    if not 0 <= start <= stop:
        raise ValueError(f"steps must be 0 <= start <= stop, got {start} and {stop}")
    mixture = order if isinstance(order, Mixture) else Mixture((order,))
    opened = [ShardSet(path, split) for path in ([paths] if isinstance(paths, str | Path | Folder) else paths)]
    for shards, own in zip(opened, mixture.orders, strict=True):
        if (own.rows, own.fingerprint) != (shards.rows, shards.fingerprint):
            raise UserError(
                f"the order is for {own.rows} rows of the set {own.fingerprint!r}, but {str(shards.root)!r} has "
                f"{shards.rows} rows in {split!r} and the fingerprint {shards.fingerprint!r}"
            )
    return Stream(opened, mixture, start, stop, share(rank, world, mixture.slices), readers, ahead_bytes)


class Stream(Iterator[Batch]):
    """The batches of one worker. Made by `batches`; close it if it is not used up."""

    def __init__(
        self,
        opened: list[ShardSet],
        mixture: Mixture,
        start: int,
        stop: int,
        slices: tuple[int, int],
        readers: int,
        ahead_bytes: int,
    ):
        self.step = start  # of the next batch
        self._stop = stop
        self._slots = np.arange(slices[0] * mixture.slice_size, slices[1] * mixture.slice_size)
        self._length = opened[0].length
        self._labelled = any(shards.labelled for shards in opened)
        self._parts = []
        for which, shards in enumerate(opened):
            ahead = ahead_bytes * mixture.weights[which] // CYCLE
            units = reading_units(shards, mixture, which, start, stop, slices, ahead)
            plan = plan_steps(shards, len(self._slots), ahead) * len(self._slots)
            cached = isinstance(mixture.orders[which], FullOrder)
            self._parts.append(PartStream(ReadAhead(shards, units, plan, readers, cached)))
        self._batches = self._merge()
        _open_streams.add(self)

    def __next__(self) -> Batch:
        return next(self._batches)

    @property
    def reads(self) -> Reads:
        """What Ray's processes read of the shards for the batches so far, or a little more: bytes and rows."""
        total = Reads()
        for part in self._parts:
            total.add(bytes=part.reads.bytes, rows_read=part.reads.rows_read, rows_given=part.reads.rows_given)
        return total

    @property
    def damages(self) -> list[str]:
        """What was wrong with decoded rows (`pipelines.row_cache`), each time that they were made anew."""
        return [damage for part in self._parts for damage in part.damages]

    def close(self) -> None:
        """Stop reading and let go of what was read ahead."""
        self._batches.close()
        for part in self._parts:  # for the case that no batch was taken: there was nothing to leave then
            part.close()

    def _merge(self) -> Generator[Batch, None, None]:
        """Batches from what each set gives to them; all of it is checked for being of the step that is due."""
        with contextlib.ExitStack() as stack:
            for part in self._parts:
                stack.enter_context(contextlib.closing(part))
            while self.step < self._stop:
                n = len(self._slots)
                sets, rows = np.full(n, -1), np.empty(n, np.int64)
                tokens = np.empty((n, self._length), np.int64)
                labels = np.full(n, -1) if self._labelled else None
                for which, part in enumerate(self._parts):
                    places, block = part.take(self.step)
                    sets[places], rows[places], tokens[places] = which, block["row"], block["tokens"]
                    if labels is not None and "label" in block:
                        labels[places] = block["label"]
                if (sets < 0).any():
                    raise RuntimeError(f"step {self.step} has only {(sets >= 0).sum()} of its {n} rows")
                self.step += 1
                yield Batch(self.step - 1, self._slots, rows, tokens, sets, labels)


_open_streams: weakref.WeakSet[Stream] = weakref.WeakSet()


@atexit.register  # after Ray's own registration, hence run before it
def _close_streams() -> None:
    """End what is still open while Ray is there: an execution that is closed later would start a new Ray to say so."""
    for stream in list(_open_streams):
        stream.close()
