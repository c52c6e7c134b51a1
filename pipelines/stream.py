"""The global batches of `pipelines.order`, cut for one worker and delivered by Ray Data.

A worker builds its own pipeline from (rank, world, step), inside its training function; nobody else has to know the
step. Units of steps that end with a shuffle window -> one task each, which reads the unit's row groups once and returns
its rows in order as one block -> batches. The position is one integer, the step; starting anywhere costs the same.
"""

import contextlib
import functools
import itertools
from collections.abc import Generator, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import ray
import ray.data
from ray.data import Datasource, ExecutionResources, ReadTask
from ray.data.block import BlockAccessor, BlockMetadata

from md4.errors import UserError
from pipelines.order import Order, share
from pipelines.ray_data import quiet
from pipelines.shards import ShardSet, open_set

_UNIT_BYTES = (2**20, 2**25)  # of tokens: smaller units are joined, larger ones cut
_UNIT_STEPS = 8  # at least, whatever their bytes
_PLAN_UNITS = 64  # units of one Ray Data execution


@dataclass(frozen=True)
class Batch:
    """One worker's share of one global batch: n examples of L tokens."""

    step: int
    slots: np.ndarray  # [n] int64: places in the global batch, 0..B-1
    rows: np.ndarray  # [n] int64: row ids in the split
    tokens: np.ndarray  # [n, L] int64


def batches(
    path: str | Path,
    split: str,
    order: Order,
    start: int,
    stop: int,
    rank: int,
    world: int,
    *,
    readers: int = 2,
    ahead_bytes: int = 2**26,
) -> Iterator[Batch]:
    """Worker `rank`'s batches of steps `start..stop-1`, in order, read by at most `readers` tasks at a time.

    About `ahead_bytes` and a few units are read ahead. UserError now if the set, the order or the world do not fit
    together, and later for a damaged shard; RuntimeError if Ray Data loses or misplaces a block.
    """
    shards = ShardSet(path, split)
    if (order.rows, order.fingerprint) != (shards.rows, shards.fingerprint):
        raise UserError(
            f"the order is for {order.rows} rows of the set {order.fingerprint!r}, but {str(path)!r} has "
            f"{shards.rows} rows in {split!r} and the fingerprint {shards.fingerprint!r}"
        )
    first, last = share(rank, world, order.slices)
    return _deliver(shards, order, start, stop, first, last, readers, ahead_bytes)


def _deliver(
    shards: ShardSet, order: Order, start: int, stop: int, first: int, last: int, readers: int, ahead_bytes: int
) -> Iterator[Batch]:
    slots = np.arange(first * order.slice_size, last * order.slice_size)
    step_bytes = len(slots) * shards.length * shards.dtype.itemsize
    at_least, at_most = (max(_UNIT_STEPS, size // step_bytes) for size in _UNIT_BYTES)
    spans = order.units(start, stop, at_least, at_most)
    step = start
    while plan := [_Unit(lo, order.rows_at(lo, hi, first, last)) for lo, hi in itertools.islice(spans, _PLAN_UNITS)]:
        blocks = _blocks(_Plan(shards, plan), readers, ahead_bytes)
        with contextlib.closing(blocks):
            for unit, block in itertools.zip_longest(plan, blocks):
                steps, rows, tokens = _checked(unit, block)
                for i in range(len(steps)):
                    if steps[i] != step:
                        raise RuntimeError(f"the stream came to step {steps[i]} where step {step} was due")
                    yield Batch(step, slots, rows[i], tokens[i].astype(np.int64))
                    step += 1
    if step != stop:
        raise RuntimeError(f"the stream ended at step {step}, not at {stop}")


def _checked(unit: "_Unit | None", block: dict[str, np.ndarray] | None) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Steps `[k]`, rows `[k, n]` and tokens `[k, n, L]` of a block that came for a unit."""
    if block is not None and "error" in block:
        raise UserError(str(block["error"][0]))
    if unit is None or block is None:
        raise RuntimeError(f"Ray Data returned {'more' if unit is None else 'fewer'} blocks than there are units")
    count, per_step = unit.rows.shape
    if not np.array_equal(block["row"], unit.rows.ravel()):
        raise RuntimeError(f"Ray Data returned other rows than those of the steps from {unit.start} on")
    steps = block["step"].reshape(count, per_step)
    return steps[:, 0], unit.rows, block["tokens"].reshape(count, per_step, -1)


# -- Ray Data: one read task, and one block, for each unit ------------------------------------------------------------


class _Unit:
    """The steps from `start` on that are read together, and their rows `[steps, n]`."""

    def __init__(self, start: int, ids: np.ndarray):
        self.start = start
        self.rows = ids.reshape(len(ids), -1)


class _Plan(Datasource):
    """A data source whose read tasks are the units of a plan.

    The tasks get row ids and not the order: computing them takes the worker's own process microseconds a step, and the
    reading processes need no torch.
    """

    def __init__(self, shards: ShardSet, units: list[_Unit]):
        super().__init__()
        self._units = units
        self._read = functools.partial(_read, str(shards.root.absolute()), shards.split, shards.fingerprint)

    def estimate_inmemory_data_size(self) -> int | None:
        return None

    def get_read_tasks(self, parallelism: int, *_: object, **__: object) -> list[ReadTask]:
        unknown = BlockMetadata(num_rows=None, size_bytes=None, input_files=None, exec_stats=None)
        return [ReadTask(functools.partial(self._read, unit.start, unit.rows), unknown) for unit in self._units]


def _read(root: str, split: str, fingerprint: str, start: int, rows: np.ndarray) -> Iterator[pa.Table]:
    """The block of a unit: one line per example, `step`, `row` and `tokens [L]`."""
    try:
        tokens = open_set(root, split, fingerprint).read(rows.ravel())
    except UserError as error:  # an answer, not a failure that Ray should try again or wrap
        yield BlockAccessor.batch_to_block({"error": np.array([str(error)])})
        return
    steps = np.repeat(np.arange(start, start + len(rows)), rows.shape[1])
    yield BlockAccessor.batch_to_block({"step": steps, "row": rows.ravel(), "tokens": tokens})


def _blocks(plan: _Plan, readers: int, ahead_bytes: int) -> Generator[dict[str, np.ndarray], None, None]:
    """The blocks of a plan, in its order."""
    # The reads take no CPU of Ray's accounting: a training run may hold all of it, and would then wait for itself.
    here = {"ray.io/node-id": ray.get_runtime_context().get_node_id()}
    dataset = ray.data.read_datasource(
        plan,
        override_num_blocks=len(plan.get_read_tasks(-1)),
        concurrency=readers,
        num_cpus=0,
        label_selector=here,
    )
    context = quiet(dataset).context
    context.target_max_block_size = None  # one unit is one block
    context.execution_options.preserve_order = True
    context.execution_options.resource_limits = ExecutionResources.for_limits(object_store_memory=ahead_bytes)
    yield from dataset.iter_batches(batch_size=None, batch_format="numpy", prefetch_batches=1)
