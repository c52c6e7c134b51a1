"""Ancestral sampling of GenMD4 along a time grid, without the network calls in which nothing can happen.

In a step t -> s, d = ln(s / t), a masked position turns into v with probability mu_v g_v, where g_v = 1 - (s / t)^(p_v)
= -expm1(p_v d): the shares eps cancel. The total sum_v mu_v g_v depends on the network. But no g_v is above that of the
largest power, g_max. So each masked position throws a coin of g_max first: without a candidate in a step, nothing is
revealed whatever the network says, and it is not asked. A candidate draws v ~ mu and takes it with g_v / g_max, else it
stays masked: it turns into v with g_max mu_v g_v / g_max = mu_v g_v, the same law. In the last step, to s = 0, every
g is 1 and all that is masked is revealed.

A position's coins are independent of everything, and throwing none up to time t has probability t^(p_max): so the step
of its next candidate comes of one exponential at once, however fine the grid.

Shapes: B rows, T tokens of a row.
"""

import math

import torch
from torch import Tensor

from md4 import noise
from md4.samplers.hazards import PowerSampler
from md4.samplers.plans import NEVER
from md4.samplers.rows import Rows
from md4.samplers.sampler import Ask, Seen
from md4.samplers.settings import SamplingConfig


class PowerAncestral(PowerSampler):
    """Rows with `plan` [B, T], the step of each position's next candidate, and their grid.

    The grid is `steps` [B] and `cosine` [B], or else the times `grid` [B, W], zeros behind their end; W = 0 if all rows
    have a grid with a name: no row keeps a number for every step of those.
    """

    counts = ("rejected",)

    def begin(self, rows: Rows, settings: SamplingConfig) -> dict[str, Tensor]:
        assert settings.steps is not None
        given = settings.grid if isinstance(settings.grid, tuple) else ()
        own = {
            "steps": torch.full_like(rows.calls, settings.steps),
            "cosine": torch.full_like(rows.broken, settings.grid == "cosine"),
            "grid": torch.tensor(given, dtype=torch.float64, device=rows.tokens.device).expand(len(rows), -1),
            "rejected": torch.zeros_like(rows.calls),
        }
        return own | {"plan": self.candidates(own, rows, torch.zeros_like(rows.calls), torch.zeros_like(rows.calls))}

    def candidates(self, own: dict[str, Tensor], rows: Rows, first: Tensor, number: Tensor) -> Tensor:
        """The step `[B, T]`, from step `first` [B] on, in which each position throws its next candidate.

        number: `[B]`, names the noise.
        """
        key = noise.derive(noise.derive(rows.key, "candidate"), number)
        positions = torch.arange(rows.tokens.shape[1], device=rows.tokens.device)
        wait = noise.exponential(key[:, None], positions) / self.most
        return step_before(own, times(own, first)[:, None] * torch.exp(-wait)).maximum(first[:, None])

    def next(self, rows: Rows) -> tuple[Tensor, Tensor]:
        """Each row's next step with a candidate `[B]`, and the candidates `[B, T]` (bool)."""
        plan = torch.where(rows.active(self.mask), rows.own["plan"], NEVER)
        step = plan.amin(dim=1)
        return step.minimum(rows.own["steps"] - 1), (plan == step[:, None]) & (plan < NEVER)

    def ask(self, rows: Rows) -> Ask:
        step, candidates = self.next(rows)
        return Ask(times(rows.own, step).clamp(min=self.t1), candidates)

    def tell(self, rows: Rows, seen: Seen) -> None:
        step, _ = self.next(rows)
        row, position, token = seen.row, seen.position, seen.values["token"]
        t, s = times(rows.own, step), times(rows.own, step + 1)
        d = torch.log1p(-(t - s) / t)[row]  # -inf at s = 0, where every ratio below is 1
        key = noise.derive(self.numbers(rows, "accept")[row], position)
        coin = noise.uniform(key, torch.zeros_like(row))
        accepted = coin * torch.expm1(self.most * d) > torch.expm1(self.powers[token] * d)
        again = self.candidates(rows.own, rows, (step + 1).minimum(rows.own["steps"] - 1), rows.calls + 1)
        late = (row[~accepted], position[~accepted])
        rows.own["plan"][late] = again[late]
        rows.own["rejected"].index_add_(0, row, (~accepted).long())
        rows.draws.index_add_(0, row, torch.ones_like(row))
        self.reveal(rows, row[accepted], position[accepted], token[accepted])


def times(own: dict[str, Tensor], step: Tensor) -> Tensor:
    """The times `[B]` at which steps [B] of the rows' grids begin, as `md4.samplers.grids` has them."""
    share = (own["steps"] - step).double() / own["steps"]
    result = torch.where(own["cosine"], torch.sin(share * (math.pi / 2)), share).where(step > 0, 1.0)
    width = own["grid"].shape[1]
    if width == 0:
        return result
    given = own["grid"].gather(1, step.clamp(max=width - 1)[:, None])[:, 0]
    return torch.where(own["grid"][:, 0] > 0, given, result)


def step_before(own: dict[str, Tensor], level: Tensor) -> Tensor:
    """The step `[B, T]` of the rows' grids in which the time falls to `level` [B, T] in (0, 1) or below."""
    share = torch.where(own["cosine"][:, None], torch.asin(level) * (2 / math.pi), level)
    steps = own["steps"][:, None]
    # Step i ends at share 1 - (i + 1) / steps: the largest such share that is not above.
    result = (steps - 1 - (share * steps).long()).clamp(min=0)
    if own["grid"].shape[1] == 0:
        return result
    given = torch.searchsorted(-own["grid"], -level) - 1
    return torch.where(own["grid"][:, :1] > 0, given.clamp(min=0).minimum(steps - 1), result)
