"""The clocks: when positions are revealed, and what is left over at t = 0."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from md4 import noise
from md4.samplers.first_hitting import first_hitting_plan
from md4.samplers.grids import time_grid
from md4.samplers.settings import SamplingConfig
from md4.schedules import Linear, Schedule, parse_schedule
from tests.md4.oracle import chi_square
from tests.oracle.first_hitting import TOY, off_by_one
from tests.oracle.proof import Proof, Trial, law_proof
from tests.oracle.sampling import draws_of
from tests.oracle.statistics import kolmogorov

LENGTH, USED = 20, 10
EPS = 0.05


@dataclass(frozen=True)
class FromOne(Linear):
    """Mutant: M starts at 1 rather than at 1 - eps."""

    def masked(self, t: Tensor | float) -> Tensor:
        return torch.ones((), dtype=torch.float64) if isinstance(t, float) and t == 1 else super().masked(t)


def hitting_times(schedule: Schedule, trial: Trial, length: int) -> Tensor:
    """`[rows, length]`, as many rows as make the trial's samples of `length` tokens."""
    rows = -(-trial.samples // length)
    keys = noise.derive(trial.row_seeds(0, rows), "sample")
    settings = SamplingConfig(sampler="first_hitting").resolve("md4")
    return first_hitting_plan(schedule, torch.ones(rows, length, dtype=torch.bool), keys, settings)[1]


def _ratios(schedule: Schedule, tau: Tensor) -> float:
    """p-value of (M_k / M_(k+1))^n being uniform, independently over rows and the first half of the reveals.

    That early, no M is below eps, where the times would tell nothing of it: among 20 uniforms the 10th largest is
    below 1e-4 with probability 1e-39.
    """
    falling = schedule.masked(tau.sort(dim=1, descending=True).values[:, :USED])
    levels = torch.cat([torch.full((len(tau), 1), schedule.masked(1.0).item()).double(), falling], dim=1)
    n = torch.arange(LENGTH, LENGTH - USED, -1)
    return kolmogorov(((levels[:, 1:] / levels[:, :-1]) ** n).flatten())


def _times(name: str) -> Proof:
    schedule, other = parse_schedule(name), parse_schedule("poly3")

    def claim(trial: Trial) -> float:
        return _ratios(schedule, hitting_times(schedule, trial, LENGTH))

    def one_more(trial: Trial) -> float:
        return _ratios(schedule, off_by_one(schedule, hitting_times(schedule, trial, LENGTH)))

    def other_inverse(trial: Trial) -> float:
        return _ratios(schedule, hitting_times(other, trial, LENGTH))

    return Proof(
        f"hitting times are those of n equal clocks, {name}",
        claim,
        {"n off by one": one_more, "another schedule's inverse": other_inverse},
    )


def _share(schedule: Schedule) -> Callable[[Trial], float]:
    def test(trial: Trial) -> float:
        left = hitting_times(schedule, trial, LENGTH) == 0
        share = EPS / (1 - EPS)
        return chi_square(torch.tensor([int(left.sum()), int((~left).sum())]), torch.tensor([share, 1 - share]))

    return test


def proofs() -> list[Proof]:
    found = [_times(name) for name in ("linear", "cosine", "poly2", "poly0.5")]
    found.append(
        Proof(
            f"a share eps / (1 - eps) of the tokens is left at t = 0, eps {EPS}",
            _share(Linear(eps=EPS)),
            {"M starts at 1": _share(FromOne(eps=EPS)), "half as much": _share(Linear(eps=EPS / 2))},
            share=4,
        )
    )
    for eps, mode in ((EPS, "argmax"), (0.3, "independent")):
        draw = draws_of(TOY, eps=eps)
        found.append(
            law_proof(
                f"leftovers of first hitting are drawn exactly, eps {eps}",
                draw,
                lambda: TOY.law,
                {f"{mode} leftovers": draw.set(leftovers=mode)},
            )
        )
    draw = draws_of(TOY, "ancestral", eps=0.2, steps=4, grid="cosine")
    found.append(
        law_proof(
            "leftovers of ancestral sampling are drawn exactly, eps 0.2",
            draw,
            lambda: TOY.ancestral_law("linear", 0.2, time_grid("cosine", 4), False),
            {f"{mode} leftovers": draw.set(leftovers=mode) for mode in ("argmax", "independent")},
        )
    )
    return found
