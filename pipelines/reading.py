"""The rows that one set of a mixture gives to the batches of one worker, read by Ray Data unit by unit.

Reading ahead is bounded by giving Ray Data little to do at a time: a *plan* of units that fits half of the memory, run
to its end, while the batches of the plan before are used. Ray Data's own limit would bound it too, but while an
execution is held back its thread spins and takes a core's worth of time from the training around it.
"""

import contextlib
import functools
import itertools
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
from pipelines.mixture import Mixture, Part
from pipelines.ray_data import PLAIN_PROCESS, quiet, read_unit
from pipelines.shards import Reads, ShardSet

Block = dict[str, np.ndarray]  # columns of examples
# Windows are joined until a unit has this many bytes of tokens, or steps: a task has costs of its own.
_UNIT_BYTES, _UNIT_STEPS = 2**20, 256
_PLAN_STEPS = 1024  # at most, where steps have few bytes: the rows of a plan are worked out before it starts


@dataclass(frozen=True)
class Unit:
    """The rows of one set in steps `start..stop-1` of a worker with n slots: what is read by one task."""

    start: int
    stop: int
    slots: int  # n
    part: Part

    @property
    def steps(self) -> np.ndarray:
        """The step of each row."""
        return self.start + self.part.places // self.slots


def reading_units(
    shards: ShardSet, mixture: Mixture, which: int, start: int, stop: int, slices: tuple[int, int], ahead_bytes: int
) -> Iterator[Unit]:
    """The units in which a worker with these slices reads one set of a mixture."""
    slots = (slices[1] - slices[0]) * mixture.slice_size
    most = plan_steps(shards, slots, ahead_bytes)
    enough = min(_UNIT_STEPS, max(1, _UNIT_BYTES // (slots * shards.length * shards.dtype.itemsize)))
    for lo, hi in mixture.units(which, start, stop, slices, min(enough, most), most):
        yield Unit(lo, hi, slots, mixture.part(which, lo, hi, *slices))


def plan_steps(shards: ShardSet, slots: int, ahead_bytes: int) -> int:
    """Batches' worth of rows that may be read in one plan: half of what may be held."""
    return min(_PLAN_STEPS, max(1, ahead_bytes // 2 // (slots * shards.length * shards.dtype.itemsize)))


class PartStream:
    """What one set gives, step by step."""

    def __init__(self, ahead: "ReadAhead"):
        self._ahead = ahead
        self._pairs = ahead.pairs()
        self._unit: Unit | None = None
        self.reads = Reads()  # of shards, for the units that were taken up so far
        self.damages: list[str] = []  # of decoded rows, which have been made anew

    def take(self, step: int) -> tuple[np.ndarray, Block]:
        """Places `[k]` among the worker's slots, and the block of the k rows there. Steps must be asked for in turn."""
        if self._unit is None or step >= self._unit.stop:
            self._unit, self._block = next(self._pairs, (None, {}))
            if self._unit is None or self._unit.start != step:
                came = "ended" if self._unit is None else f"came to step {self._unit.start}"
                raise RuntimeError(f"the stream {came} where step {step} was due")
            _check(self._unit, self._block)
            self._note(self._block)
            steps = np.arange(self._unit.stop - self._unit.start + 1)
            self._bounds = np.searchsorted(self._unit.part.places, steps * self._unit.slots).tolist()
        nth = step - self._unit.start
        mine = slice(self._bounds[nth], self._bounds[nth + 1])
        return self._unit.part.places[mine] - nth * self._unit.slots, {k: v[mine] for k, v in self._block.items()}

    def _note(self, block: Block) -> None:
        self.reads.add(rows_given=len(block["row"]))
        if "rows_read" in block:
            self.reads.add(bytes=int(block["bytes_read"][0]), rows_read=int(block["rows_read"][0]))
        if "damage" in block:
            self.damages.append(str(block["damage"][0]))

    def close(self) -> None:
        """End what is running. May be called twice."""
        self._pairs.close()
        self._ahead.close()


def _check(unit: Unit, block: Block) -> None:
    """UserError if reading failed; RuntimeError unless the block has the unit's rows, each with its step."""
    if "error" in block:
        raise UserError(str(block["error"][0]))
    for column, expected in (("row", unit.part.rows), ("step", unit.steps)):
        if not np.array_equal(block[column], expected):
            raise RuntimeError(f"Ray Data returned another {column} than those of the steps from {unit.start} on")


class ReadAhead:
    """Every unit with its block, read plan by plan: while the blocks of one plan are handed out, the next is run."""

    def __init__(self, shards: ShardSet, units: Iterator[Unit], plan_rows: int, readers: int, cached: bool):
        self._next_plan = lambda: _Running(shards, _take(units, plan_rows), readers, cached)
        self._thread = ThreadPoolExecutor(1, "read-ahead")
        self._upcoming = self._thread.submit(self._next_plan)

    def pairs(self) -> Generator[tuple[Unit, Block], None, None]:
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


def _take(units: Iterator[Unit], rows: int) -> list[Unit]:
    """The next units, until they have that many rows or more; empty when there are none left."""
    taken = []
    while rows > 0 and (unit := next(units, None)) is not None:
        taken.append(unit)
        rows -= len(unit.part.rows)
    return taken


# -- Ray Data: one read task, and one block, for each unit ------------------------------------------------------------


class _Plan(Datasource):
    """A data source whose read tasks are the units of a plan.

    The tasks get row ids and not the order: computing them takes the worker's own process microseconds a step, and the
    reading processes need no torch.
    """

    def __init__(self, shards: ShardSet, units: list[Unit], cached: bool):
        super().__init__()
        self._units = units
        self._read = functools.partial(read_unit, shards.root.absolute(), shards.split, shards.fingerprint, cached)

    def estimate_inmemory_data_size(self) -> int | None:
        return None

    def get_read_tasks(self, parallelism: int, *_: object, **__: object) -> list[ReadTask]:
        unknown = BlockMetadata(num_rows=None, size_bytes=None, input_files=None, exec_stats=None)
        return [ReadTask(functools.partial(self._read, unit.steps, unit.part.rows), unknown) for unit in self._units]


class _Running:
    """A plan that Ray Data is working on; made when its first block is there. Close it if it is not used up."""

    def __init__(self, shards: ShardSet, units: list[Unit], readers: int, cached: bool):
        self.units = units
        self._read = [unit for unit in units if len(unit.part.rows)]  # a task without rows would give no block
        self._blocks = self._run(shards, readers, cached)
        self._first = next(self._blocks, None)

    def pairs(self) -> Iterator[tuple[Unit, Block]]:
        """Every unit with its block, in the order of the plan."""
        blocks = self._blocks if self._first is None else itertools.chain([self._first], self._blocks)
        self._first = None
        for unit in self.units:
            block = next(blocks, None) if len(unit.part.rows) else _nothing(unit)
            if block is None:
                raise RuntimeError("Ray Data returned fewer blocks than there are units")
            yield unit, block
        if next(blocks, None) is not None:
            raise RuntimeError("Ray Data returned more blocks than there are units")

    def close(self) -> None:
        """End the execution and let go of its blocks."""
        self._blocks.close()

    def _run(self, shards: ShardSet, readers: int, cached: bool) -> Generator[Block, None, None]:
        if not self._read:
            return
        dataset = ray.data.read_datasource(
            _Plan(shards, self._read, cached),
            override_num_blocks=len(self._read),
            concurrency=min(readers, len(self._read)),
            # Reading takes no CPU of Ray's accounting: a training run may hold all of it, and would wait for itself.
            num_cpus=0,
            label_selector={"ray.io/node-id": ray.get_runtime_context().get_node_id()},
            ray_remote_args={"runtime_env": PLAIN_PROCESS},
        )
        context = quiet(dataset).context
        context.target_max_block_size = None  # one unit is one block
        context.execution_options.preserve_order = True
        blocks = dataset.iter_batches(batch_size=None, batch_format="numpy", prefetch_batches=1)
        yield from cast(Generator[Block, None, None], blocks)


def _nothing(unit: Unit) -> Block:
    """The block of a unit without rows."""
    return {"step": unit.steps, "row": unit.part.rows, "tokens": np.empty((0, 1), np.uint8)}
