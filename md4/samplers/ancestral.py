"""Ancestral sampling: the plan that follows a time grid (arXiv 2406.04329, section 3 and appendix G)."""

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from md4 import noise
from md4.objectives import MD4
from md4.samplers.grids import times_of
from md4.samplers.plans import Plan, Planned
from md4.samplers.rows import KNOWN, Rows
from md4.samplers.settings import SamplingConfig

if TYPE_CHECKING:
    from md4.schedules import Schedule


def reveal_probability(schedule: "Schedule", t: float | Tensor, s: float | Tensor) -> Tensor:
    """Probability that a position masked at time t is revealed by time s < t (arXiv 2406.04329, equation 5).

    rho = (alpha(s) - alpha(t)) / (1 - alpha(t)) = (M(t) - M(s)) / M(t), with M = 1 - alpha formed without cancellation;
    t and s broadcast; float64.
    """
    masked_t = schedule.masked(torch.as_tensor(t, dtype=torch.float64))
    masked_s = schedule.masked(torch.as_tensor(s, dtype=torch.float64))
    return (masked_t - masked_s) / masked_t


def ancestral_plan(
    schedule: "Schedule", unknown: Tensor, keys: Tensor, settings: SamplingConfig
) -> tuple[Plan, Tensor]:
    """The reveal step of every unknown position, drawn up front, and which of them are left over `[B, T]` (bool).

    unknown: `[B, T]` bool; keys: the rows' noise streams `[B]`. Whether a position is revealed doesn't depend on any
    token, so the coins of all steps can be thrown before the first network call, and one uniform U stands for a
    position's whole series of them: it survives until t with probability M(t) / M(1), that is, it is revealed in the
    first step that ends with M(t) <= M(1) U. The conditional probability of a step is `reveal_probability`.

    What is still masked at t = 0 (a fraction eps of the tokens, since alpha(0) = 1 - eps) follows after the steps:
    `exact` one at a time at t = 0, in the order of falling U, which is how these tokens would be revealed in
    continuous time; `independent` and `argmax` all in one event.
    """
    grid = times_of(settings).to(unknown.device)
    steps = len(grid) - 1
    levels = schedule.masked(grid)
    positions = torch.arange(unknown.shape[1], device=unknown.device)
    level = levels[0] * noise.uniform(noise.derive(keys, "reveal")[:, None], positions)

    # The event is the number of steps survived: those whose M is still above the position's level.
    rising = levels[1:].flip(0).contiguous()
    event = steps - torch.searchsorted(rising, level, right=True)
    left = unknown & (event == steps)
    if settings.leftovers == "exact" and bool(left.any()):
        falling = torch.where(left, level, -torch.inf).argsort(dim=1, descending=True, stable=True)
        event = torch.where(left, steps + falling.argsort(dim=1), event)
    # The network is shown the time at which a step begins.
    time = torch.cat([grid[:-1], grid.new_zeros(1)])[event.clamp(max=steps)]
    return Plan(event=torch.where(unknown, event, KNOWN), time=time), left


class Ancestral(Planned):
    """Rows that follow `ancestral_plan`."""

    def begin(self, rows: Rows, settings: SamplingConfig) -> dict[str, Tensor]:
        assert isinstance(self.model, MD4)
        plan, left = ancestral_plan(self.model.schedule, rows.unknown, rows.key, settings)
        greedy = left & (settings.leftovers == "argmax")
        return self.planned(plan.bounded(settings.min_reveals, settings.max_reveals, rows.block_index()), greedy)
