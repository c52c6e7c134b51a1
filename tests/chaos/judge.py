"""What a disturbed run must have in common with one that nothing happened to."""

import torch

from md4.errors import UserError
from orchestration import checkpoints
from orchestration.runs import Run
from tests.chaos.attempts import Attempts, Trouble

TOLERANCE = 1e-5  # relative, of losses and of each kind of tensors by their norm, where the number of workers changed


def ledger(run: Run) -> dict[int, str]:
    """Step -> digest of the rows that were consumed up to it."""
    return {row["step"]: row["ledger"] for row in run.metrics("train")}


def state(run: Run) -> dict[str, dict[str, torch.Tensor]]:
    """The final one: weights, moving averages and moments."""
    found = checkpoints.newest(run.checkpoints, print)
    if found is None or found.step != run.config.train.steps:
        raise Trouble(f"the last sound checkpoint is of step {found and found.step}")
    return {kind: found.tensors(kind) for kind in found.kinds}


def compare(run: Run, expected: Run, exact: bool) -> str:
    """What was found equal, in words; Trouble for what was not."""
    ours, theirs = ledger(run), ledger(expected)
    if ours != theirs:
        wrong = min(step for step in ours.keys() | theirs.keys() if ours.get(step) != theirs.get(step))
        raise Trouble(f"the ledger differs from step {wrong} on")
    losses = [[row["bits_per_token"] for row in one.metrics("train")] for one in (run, expected)]
    worst = max(abs(a - b) / abs(b) for a, b in zip(*losses, strict=True))
    found, wanted = state(run), state(expected)
    if found.keys() != wanted.keys() or any(found[kind].keys() != wanted[kind].keys() for kind in wanted):
        raise Trouble("the final checkpoint holds other tensors")
    if exact:
        for kind, tensors in wanted.items():
            if unequal := [name for name, tensor in tensors.items() if not torch.equal(found[kind][name], tensor)]:
                raise Trouble(f"{len(unequal)} tensors of {kind} differ, the first is {unequal[0]}")
        if worst:
            raise Trouble(f"losses differ by up to {worst:.1e}")
        return "ledger equal, weights bit-equal"
    far = max(_distance(found[kind], wanted[kind]) for kind in ("weights", "ema"))
    if max(far, worst) > TOLERANCE:
        raise Trouble(f"weights are {far:.1e} apart, losses {worst:.1e}; allowed is {TOLERANCE:g}")
    return f"ledger equal, weights within {far:.1e}"


def _distance(one: dict[str, torch.Tensor], two: dict[str, torch.Tensor]) -> float:
    a, b = (torch.cat([tensors[name].reshape(-1) for name in sorted(two)]).double() for tensors in (one, two))
    return float((a - b).norm() / b.norm())


def check_checkpoints(attempts: Attempts) -> int:
    """Those that the run told of are still there, or enough newer ones are; and all that are there are sound, except
    those that we damaged. Returns how many were told of."""
    run = Run(attempts.path)
    keep = run.config.checkpoint.keep
    committed = {folder.name: folder for folder in checkpoints.committed_in(run.checkpoints)}
    sound = {}
    for name, folder in committed.items():
        try:
            one = checkpoints.read(folder)
            one.verify()
            sound[name] = one.step
        except UserError as error:
            if name not in attempts.damaged:
                raise Trouble(str(error)) from None
    for name, (step, _) in attempts.told.items():
        newer = sum(other > step for other in sound.values())
        if name not in sound and name not in attempts.damaged and newer < keep:
            raise Trouble(f"checkpoint {name} was told of, and is gone; {newer} newer ones are there")
    return len(attempts.told)
