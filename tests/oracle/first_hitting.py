"""First hitting: exact for any network, one call a token.

With a network that does not look at the time it samples the model's own law, whatever the schedule: then times drop
out and only what the network sees can be wrong. What it is shown of the time takes a network that listens to it, and
the law that this one has in continuous time.
"""

from functools import cache, partial

import torch
from torch import Tensor

from md4.samplers.first_hitting import FirstHitting
from md4.samplers.grids import time_grid
from md4.samplers.rows import Rows
from md4.samplers.sampler import Ask
from md4.samplers.settings import SamplingConfig
from md4.schedules import Schedule
from tests.md4.oracle import Toy
from tests.oracle.laws import continuous_law
from tests.oracle.proof import Proof, Trial, law_proof
from tests.oracle.sampling import draws_of
from tests.oracle.statistics import total_variation

TOY = Toy(vocabulary=3, length=4)
SCHEDULES = ("linear", "cosine", "poly2", "poly0.5")


class BlindToTheLast(FirstHitting):
    """Mutant: the network does not see the token revealed last, as if it had been asked before."""

    def ask(self, rows: Rows) -> Ask:
        asked = super().ask(rows)
        rows.own["whole"] = rows.tokens.clone()
        last = (rows.event == rows.calls[:, None] - 1) & (rows.calls > 0)[:, None]
        rows.tokens[last] = self.mask
        return asked

    def tell(self, rows, seen) -> None:
        rows.tokens[:] = rows.own["whole"]
        super().tell(rows, seen)


class StaleTimes(FirstHitting):
    """Mutant: every call is shown the time of the reveal before; the first one t = 1."""

    def begin(self, rows: Rows, settings: SamplingConfig) -> dict[str, Tensor]:
        own = super().begin(rows, settings)
        falling, order = own["time"].sort(dim=1, descending=True)
        stale = torch.cat([torch.ones_like(falling[:, :1]), falling[:, :-1]], dim=1)
        return own | {"time": torch.empty_like(stale).scatter(1, order, stale)}


class OneMore(FirstHitting):
    """Mutant: M <- u^(1 / (n + 1)) M, n off by one."""

    def begin(self, rows: Rows, settings: SamplingConfig) -> dict[str, Tensor]:
        own = super().begin(rows, settings)
        return own | {"time": off_by_one(self.model.schedule, own["time"])}


class ConstantTime(FirstHitting):
    """Mutant: the network is shown t = 1/2 in every call."""

    def ask(self, rows: Rows) -> Ask:
        asked = super().ask(rows)
        return Ask(torch.full_like(asked.time, 0.5), asked.wanted)


def off_by_one(schedule: Schedule, time: Tensor) -> Tensor:
    """The hitting times `[B, L]` of all positions as they would be if n were one more than the masked positions."""
    falling, order = time.sort(dim=1, descending=True)
    levels = torch.cat([schedule.masked(torch.ones(len(time), 1).double()), schedule.masked(falling)], dim=1).log()
    n = torch.arange(time.shape[1], 0, -1)
    wrong = levels[:, :1] + (levels.diff(dim=1) * n / (n + 1)).cumsum(dim=1)
    return torch.empty_like(time).scatter(1, order, schedule.inverse_masked(wrong.exp()))


def in_continuous_time(schedule: str, eps: float, start: Tensor | None = None) -> Tensor:
    """Law `[X]` with the network that looks at the time."""
    return continuous_law(TOY, schedule, eps, lambda t: TOY.mu(t, timed=True), start)


@cache
def extrapolated_from_steps(schedule: str, eps: float) -> Tensor:
    """2 q_(2T) - q_T of the ancestral law of T steps, T = 64: an error of second order in 1/T."""
    coarse, fine = (TOY.ancestral_law(schedule, eps, time_grid("uniform", steps), True) for steps in (64, 128))
    return 2 * fine - coarse


def _agrees(schedule: str, eps: float, law: Tensor) -> float:
    return float(total_variation(law, extrapolated_from_steps(schedule, eps)) < 5e-4)


def _law_of_continuous_time(schedule: str, eps: float) -> Proof:
    def stopped(trial: Trial) -> float:
        return _agrees(schedule, eps, continuous_law(TOY, schedule, eps, lambda t: TOY.mu(0.5, timed=True)))

    def steps(trial: Trial) -> float:
        return _agrees(schedule, eps, TOY.ancestral_law(schedule, eps, time_grid("uniform", 128), timed=True))

    return Proof(
        f"the law in continuous time is the limit of ancestral laws, {schedule}, eps {eps:g}",
        lambda trial: _agrees(schedule, eps, in_continuous_time(schedule, eps)),
        {"time stands still": stopped, "128 steps are no limit": steps},
    )


def proofs() -> list[Proof]:
    found = []
    for schedule in SCHEDULES:
        draw = draws_of(TOY, schedule=schedule)
        found.append(
            law_proof(
                f"first hitting samples the model's law, {schedule}",
                draw,
                lambda: TOY.law,
                {"two calls": draw.set(steps=2), "blind to the last token": draw.but(sampler=BlindToTheLast)},
            )
        )
    for schedule, eps in (("linear", 1e-4), ("cosine", 1e-4), ("poly2", 0.05)):
        found.append(_law_of_continuous_time(schedule, eps))
        draw = draws_of(TOY, schedule=schedule, eps=eps, timed=True)
        found.append(
            law_proof(
                f"first hitting shows the network the time of the reveal, {schedule}, eps {eps:g}",
                draw,
                partial(in_continuous_time, schedule, eps),
                {
                    "time of the reveal before": draw.but(sampler=StaleTimes),
                    "n off by one": draw.but(sampler=OneMore),
                    "constant time": draw.but(sampler=ConstantTime),
                },
                {"the posterior's law, without the time": lambda: TOY.law},
            )
        )
    return found
