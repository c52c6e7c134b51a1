"""The global batches of `pipelines.order`, cut for one worker and delivered by Ray Data.

A worker builds its own pipeline from (rank, world, step), inside its training function; nobody else has to know the
step. Units of steps that end with a shuffle window -> one task each, which reads the unit's row groups once and returns
its rows in order as one block -> batches. The position is one integer, the step; starting anywhere costs the same.

Reading ahead is bounded by giving Ray Data little to do at a time: a *plan* of units that fits half of the memory, run
to its end, while the batches of the plan before are used. Ray Data's own limit would bound it too, but while an
execution is held back its thread spins and takes a core's worth of time from the training around it.
"""

import atexit
import contextlib
import functools
import itertools
import weakref
from collections.abc import Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import cast

import numpy as np
import ray
import ray.data
from ray.data import Datasource, ReadTask
from ray.data.block import BlockMetadata

from md4.errors import UserError
from pipelines.order import Order, share
from pipelines.ray_data import quiet, read_unit
from pipelines.shards import ShardSet
from pipelines.storage import Place

_Block = dict[str, np.ndarray]  # columns of examples
# Windows are joined until a unit has this many bytes of tokens, or steps: a task has costs of its own.
_UNIT_BYTES, _UNIT_STEPS = 2**20, 256
_PLAN_STEPS = 1024  # at most, where steps have few bytes: the rows of a plan are worked out before it starts


@dataclass(frozen=True)
class Batch:
    """One worker's share of one global batch: n examples of L tokens."""

    step: int
    slots: np.ndarray  # [n] int64: places in the global batch, 0..B-1
    rows: np.ndarray  # [n] int64: row ids in the split
    tokens: np.ndarray  # [n, L] int64
    labels: np.ndarray | None = None  # [n] int64, -1 where a row has none; None: a set without labels


def batches(
    path: Place,
    split: str,
    order: Order,
    start: int,
    stop: int,
    rank: int,
    world: int,
    *,
    readers: int = 1,
    ahead_bytes: int = 2**26,
) -> "Stream":
    """Worker `rank`'s batches of steps `start..stop-1`, in order, read by at most `readers` tasks at a time.

    Reading begins at once, so whatever is done before the first batch is taken overlaps with it. About `ahead_bytes` of
    tokens are held at most, or two steps. UserError now if the set, the order or the world do not fit together, and
    later for a damaged shard; RuntimeError if Ray Data loses or misplaces a block.
    """
    if not 0 <= start <= stop:
        raise ValueError(f"steps must be 0 <= start <= stop, got {start} and {stop}")
    shards = ShardSet(path, split)
    if (order.rows, order.fingerprint) != (shards.rows, shards.fingerprint):
        raise UserError(
            f"the order is for {order.rows} rows of the set {order.fingerprint!r}, but {str(path)!r} has "
            f"{shards.rows} rows in {split!r} and the fingerprint {shards.fingerprint!r}"
        )
    return Stream(shards, order, start, stop, share(rank, world, order.slices), readers, ahead_bytes)


class Stream(Iterator[Batch]):
    """The batches of one worker. Made by `batches`; close it if it is not used up."""

    def __init__(
        self,
        shards: ShardSet,
        order: Order,
        start: int,
        stop: int,
        slices: tuple[int, int],
        readers: int,
        ahead_bytes: int,
    ):
        first, last = slices
        self.step = start  # of the next batch
        self._stop = stop
        self._slots = np.arange(first * order.slice_size, last * order.slice_size)
        step_bytes = len(self._slots) * shards.length * shards.dtype.itemsize
        plan_steps = min(_PLAN_STEPS, max(1, ahead_bytes // 2 // step_bytes))
        enough = min(_UNIT_STEPS, max(1, _UNIT_BYTES // step_bytes))
        spans = order.units(start, stop, min(enough, plan_steps), plan_steps)
        units = (_Unit(lo, order.rows_at(lo, hi, first, last)) for lo, hi in spans)
        self._ahead = _ReadAhead(shards, units, plan_steps, readers)
        self._batches = self._cut()
        _open_streams.add(self)

    def __next__(self) -> Batch:
        return next(self._batches)

    def close(self) -> None:
        """Stop reading and let go of what was read ahead."""
        self._batches.close()
        self._ahead.close()  # for the case that no batch was taken: there was nothing to leave then

    def _cut(self) -> Generator[Batch, None, None]:
        """Units to batches, each checked for being the step that is due."""
        with contextlib.closing(self._ahead), contextlib.closing(self._ahead.pairs()) as pairs:
            for unit, block in pairs:
                steps, tokens, labels = _checked(unit, block)
                every = itertools.repeat(None, len(steps)) if labels is None else labels.astype(np.int64)
                for step, rows, rows_tokens, known in zip(steps.tolist(), unit.rows, tokens, every, strict=True):
                    if step != self.step:
                        raise RuntimeError(f"the stream came to step {step} where step {self.step} was due")
                    self.step += 1
                    yield Batch(step, self._slots, rows, rows_tokens.astype(np.int64), known)
        if self.step != self._stop:
            raise RuntimeError(f"the stream ended at step {self.step}, not at {self._stop}")


_open_streams: weakref.WeakSet[Stream] = weakref.WeakSet()


@atexit.register  # after Ray's own registration, hence run before it
def _close_streams() -> None:
    """End what is still open while Ray is there: an execution that is closed later would start a new Ray to say so."""
    for stream in list(_open_streams):
        stream.close()


class _Unit:
    """The steps from `start` on that are read together, and their rows `[steps, n]`."""

    def __init__(self, start: int, ids: np.ndarray):
        self.start = start
        self.rows = ids.reshape(len(ids), -1)


class _ReadAhead:
    """Every unit with its block, read plan by plan: while the blocks of one plan are handed out, the next is run."""

    def __init__(self, shards: ShardSet, units: Iterator[_Unit], plan_steps: int, readers: int):
        self._next_plan = lambda: _Running(shards, _take(units, plan_steps), readers)
        self._thread = ThreadPoolExecutor(1, "read-ahead")
        self._upcoming = self._thread.submit(self._next_plan)

    def pairs(self) -> Generator[tuple[_Unit, _Block], None, None]:
        """The units and their blocks, in order."""
        while (running := self._upcoming.result()).units:
            self._upcoming = self._thread.submit(self._next_plan)
            with contextlib.closing(running):
                yield from running.pairs()

    def close(self) -> None:
        """End what is running. May be called twice."""
        self._thread.shutdown(cancel_futures=True)
        if not self._upcoming.cancelled() and self._upcoming.exception() is None:
            self._upcoming.result().close()


def _take(units: Iterator[_Unit], steps: int) -> list[_Unit]:
    """The next units, until they have that many steps or more; empty when there are none left."""
    taken = []
    while steps > 0 and (unit := next(units, None)) is not None:
        taken.append(unit)
        steps -= len(unit.rows)
    return taken


def _checked(unit: _Unit, block: _Block) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
    """Steps `[k]`, tokens `[k, n, L]` and labels `[k, n]`, if there are any, of the block that came for a unit."""
    if "error" in block:
        raise UserError(str(block["error"][0]))
    if not np.array_equal(block["row"], unit.rows.ravel()):
        raise RuntimeError(f"Ray Data returned other rows than those of the steps from {unit.start} on")
    steps = block["step"].reshape(unit.rows.shape)
    labels = block["label"].reshape(unit.rows.shape) if "label" in block else None
    return steps[:, 0], block["tokens"].reshape(*unit.rows.shape, -1), labels


# -- Ray Data: one read task, and one block, for each unit ------------------------------------------------------------


class _Plan(Datasource):
    """A data source whose read tasks are the units of a plan.

    The tasks get row ids and not the order: computing them takes the worker's own process microseconds a step, and the
    reading processes need no torch.
    """

    def __init__(self, shards: ShardSet, units: list[_Unit]):
        super().__init__()
        self._units = units
        self._read = functools.partial(read_unit, shards.root.absolute(), shards.split, shards.fingerprint)

    def estimate_inmemory_data_size(self) -> int | None:
        return None

    def get_read_tasks(self, parallelism: int, *_: object, **__: object) -> list[ReadTask]:
        unknown = BlockMetadata(num_rows=None, size_bytes=None, input_files=None, exec_stats=None)
        return [ReadTask(functools.partial(self._read, unit.start, unit.rows), unknown) for unit in self._units]


class _Running:
    """A plan that Ray Data is working on; made when its first block is there. Close it if it is not used up."""

    def __init__(self, shards: ShardSet, units: list[_Unit], readers: int):
        self.units = units
        self._blocks = self._run(shards, readers)
        self._first = next(self._blocks, None)

    def pairs(self) -> Iterator[tuple[_Unit, _Block]]:
        """Every unit with its block, in the order of the plan."""
        blocks = self._blocks if self._first is None else itertools.chain([self._first], self._blocks)
        self._first = None
        for unit, block in itertools.zip_longest(self.units, blocks):
            if unit is None or block is None:
                raise RuntimeError(
                    f"Ray Data returned {'more' if unit is None else 'fewer'} blocks than there are units"
                )
            yield unit, block

    def close(self) -> None:
        """End the execution and let go of its blocks."""
        self._blocks.close()

    def _run(self, shards: ShardSet, readers: int) -> Generator[_Block, None, None]:
        if not self.units:
            return
        dataset = ray.data.read_datasource(
            _Plan(shards, self.units),
            override_num_blocks=len(self.units),
            concurrency=min(readers, len(self.units)),
            # Reading takes no CPU of Ray's accounting: a training run may hold all of it, and would wait for itself.
            num_cpus=0,
            label_selector={"ray.io/node-id": ray.get_runtime_context().get_node_id()},
        )
        context = quiet(dataset).context
        context.target_max_block_size = None  # one unit is one block
        context.execution_options.preserve_order = True
        blocks = dataset.iter_batches(batch_size=None, batch_format="numpy", prefetch_batches=1)
        yield from cast(Generator[_Block, None, None], blocks)
