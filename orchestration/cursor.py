"""Where a run is in its data: the order that its configuration says, and whether a checkpoint agrees with it."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from md4.errors import UserError
from orchestration.checkpoints import Checkpoint
from orchestration.config import Config
from pipelines import ledger
from pipelines.manifest import Manifest
from pipelines.mixture import Mixture
from pipelines.plan import plan


def run_order(config: Config, manifests: Sequence[Manifest]) -> Mixture:
    """The global batches of a run over its prepared sets; UserError if they cannot be made."""
    return plan(config.data, manifests, config.train.batch_size, config.train.slices, config.seed)


def check_cursor(order: Mixture, checkpoint: Checkpoint, report: Callable[[str], None]) -> None:
    """UserError unless a run may go on from a checkpoint in this order: nothing in it changed, and its ledger agrees.

    Arithmetic over all steps so far: some seconds for 100,000 steps.
    """
    stored, noted = (checkpoint.manifest.get(name) for name in ("order", "ledger"))
    if stored is None or noted is None:
        raise UserError(f"checkpoint {checkpoint.path} has no ledger of its data: it cannot be continued, only sampled")
    for name, before, now in _differences(stored, order.facts()):
        raise UserError(
            f"checkpoint {checkpoint.path} was trained in another order of the data: {name} was {before!r}, "
            f"is now {now!r}. Give the run the data and settings it began with, or start a new one"
        )
    if noted["step"] != checkpoint.step:
        raise UserError(f"checkpoint {checkpoint.path} is at step {checkpoint.step}, its ledger at {noted['step']}")
    if (head := ledger.head_at(order, checkpoint.step)) != noted["head"]:
        raise UserError(
            f"checkpoint {checkpoint.path} has consumed other rows than the order says: its ledger is "
            f"{noted['head']} at step {checkpoint.step}, the order's {head}. `md4 data audit` names the first step"
        )
    report(f"data: the ledger agrees with the order after {checkpoint.step:,} steps")


def _differences(before: Any, now: Any, name: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Leaves of two trees that differ: their name, and both values."""
    if isinstance(before, dict) and isinstance(now, dict):
        for key in dict.fromkeys([*before, *now]):
            yield from _differences(before.get(key), now.get(key), f"{name}.{key}".lstrip("."))
    elif isinstance(before, list) and isinstance(now, list) and len(before) == len(now):
        for number, (one, other) in enumerate(zip(before, now, strict=True)):
            yield from _differences(one, other, f"{name}.{number}")
    elif before != now:
        yield name, before, now
