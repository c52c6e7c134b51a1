"""Ancestral sampling at T steps: the law of the chain over whole states, and not the model's own."""

from functools import partial

import torch
from torch import Tensor

from md4.samplers.ancestral import Ancestral
from md4.samplers.grids import times_of
from md4.samplers.rows import Rows
from md4.samplers.settings import SamplingConfig
from tests.oracle.first_hitting import TOY, in_continuous_time
from tests.oracle.proof import Proof, law_proof
from tests.oracle.sampling import draws_of

# schedule, grid, steps, eps, the network looks at the time
CASES = [
    ("linear", "uniform", 1, 1e-4, False),
    ("linear", "uniform", 4, 1e-4, False),
    ("linear", "uniform", 8, 1e-4, False),
    ("cosine", "uniform", 3, 1e-4, True),
    ("cosine", "uniform", 16, 1e-4, False),
    ("linear", "cosine", 6, 0.05, True),
    ("poly2", "cosine", 16, 1e-4, True),
    ("poly0.5", (1.0, 0.6, 0.5, 0.1, 0.0), 4, 1e-4, True),
]


class EndOfStep(Ancestral):
    """Mutant: the network is shown the time at which a step ends."""

    def begin(self, rows: Rows, settings: SamplingConfig) -> dict[str, Tensor]:
        own = super().begin(rows, settings)
        ends = torch.cat([times_of(settings)[1:], torch.zeros(1, dtype=torch.float64)])
        return own | {"time": ends[own["plan"].clamp(0, len(ends) - 1)]}


def proofs() -> list[Proof]:
    found = []
    for schedule, grid, steps, eps, timed in CASES:
        draw = draws_of(TOY, "ancestral", schedule, eps, timed, grid=grid, steps=steps)
        times = times_of(draw.settings)
        law = partial(TOY.ancestral_law, schedule, eps, times, timed)
        other = "cosine" if schedule == "linear" else "linear"
        mutants = {"another schedule": draws_of(TOY, "ancestral", other, eps, timed, grid=grid, steps=steps)}
        if grid in ("uniform", "cosine") and steps <= 4:
            mutants["a step more"] = draw.set(steps=steps + 1)
        if timed:
            mutants["time of the step's end"] = draw.but(sampler=EndOfStep)
        if steps == 1:
            del mutants["another schedule"]  # all is revealed in one step, or at t = 0
        own = partial(in_continuous_time, schedule, eps) if timed and schedule != "poly0.5" else lambda: TOY.law
        where = f"{schedule}, {'own' if isinstance(grid, tuple) else grid} grid"
        found.append(
            law_proof(
                f"ancestral follows its law of {steps} steps, {where}, eps {eps:g}{', timed' * timed}",
                draw,
                law,
                mutants,
                {"the law without steps": own},
            )
        )
    return found
