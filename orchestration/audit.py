"""Did a run consume the rows that its configuration says, or those of another run? From the ledgers in the metrics."""

from collections.abc import Iterator
from itertools import islice

from md4.errors import UserError
from orchestration import checkpoints, forks
from orchestration.cursor import run_order
from orchestration.runs import Run
from pipelines import ledger
from pipelines.config import prepared_path
from pipelines.ledger import DIGITS
from pipelines.manifest import Manifest
from pipelines.storage import Place


def audit(path: Place) -> str:
    """Recompute a run's ledger from its configuration and its prepared sets; says that it agrees, and for how long.

    UserError names the first step that differs, or what is missing. Reads manifests alone, no rows.
    """
    run = Run(path)
    found = digests(run)
    order = run_order(run.config, [Manifest.load(prepared_path(one)) for _, one in run.config.data.sets()])
    heads = {row["step"]: row["ledger"] for row in run.metrics("train")}
    kept = [checkpoints.read(folder).manifest for folder in checkpoints.committed_in(run.checkpoints)]
    heads |= {manifest["step"]: manifest["ledger"]["head"] for manifest in kept if "ledger" in manifest}
    head = ""
    for step, value in enumerate(ledger.expected(order, 0, max(heads, default=0))):
        # Steps after the last line of metrics, up to a checkpoint, have no digest of their own.
        # Nor have those before the run, if it began from another one's checkpoint.
        if step < len(found) and found[step] and ledger.digest(value) != found[step]:
            raise UserError(f"run {run.place}: the rows of {_named(step)} are not those of its configuration and data")
        head = ledger.chained(head, value)
        if heads.get(step + 1, head) != head:
            raise UserError(f"run {run.place}: its ledger after step {step + 1} is not that of the steps before")
    return f"run {run.place}: the ledger agrees with configuration and data in all of its {max(heads):,} steps ({head})"


def compare(path: Place, other: Place) -> str:
    """Compare the ledgers of two runs as far as both go; UserError names the first step that differs."""
    one, two = Run(path), Run(other)
    pairs = [
        (step, mine, theirs)
        for step, (mine, theirs) in enumerate(zip(digests(one), digests(two), strict=False))
        if mine and theirs
    ]
    for step, mine, theirs in pairs:
        if mine != theirs:
            raise UserError(f"runs {one.place} and {two.place} first differ in the rows of {_named(step)}")
    return f"runs {one.place} and {two.place} consumed the same rows in the {len(pairs):,} steps that both have"


def digests(run: Run) -> list[str]:
    """The digest of every step that the run's metrics have, "" of those that it did not make itself; UserError if there
    is none, or steps are missing."""
    found = [""] * forks.first_step(run.config)
    for row in run.metrics("train"):
        found += _cut(row.get("ledger_steps", ""))
        if len(found) != row["step"]:
            raise UserError(
                f"run {run.place}: its metrics have the ledger of {len(found)} steps at step {row['step']}; "
                "lines are missing, or an earlier version wrote them"
            )
    if not any(found):
        raise UserError(f"run {run.place} has no steps in its metrics yet")
    return found


def _cut(text: str) -> Iterator[str]:
    letters = iter(text)
    while part := "".join(islice(letters, DIGITS)):
        yield part


def _named(step: int) -> str:
    return f"step {step + 1} (global batch {step})"
