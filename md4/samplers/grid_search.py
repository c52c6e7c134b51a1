"""Time grids that make the bound of a sampler with few steps as small as it can be.

The negative ELBO of a sampler that goes from t to s < t in one step, summed over its steps, is

    sum over steps of  (M(t) - M(s)) / M(t) C(t)  +  reconstruction,      C(t) = E[ sum over masked of -ln mu(x | z_t) ]

with M = 1 - alpha (arXiv 2406.04329, appendix on discrete time). A step's cost depends on its two ends alone, so once
C is known at N times, the best T of them are a least-cost path (Watson et al. 2021, arXiv 2106.03802).

Shapes: N times, B rows, L tokens.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from md4 import noise
from md4.errors import UserError
from md4.objectives import MD4, MaskedDiffusion, evaluating
from md4.samplers.grids import check_times, time_grid


@dataclass(frozen=True)
class Costs:
    """What was found of C."""

    times: Tensor  # [N] float64, from 1 down to 0
    masked: Tensor  # [N] float64, M at these times
    nats: Tensor  # [N, B] float64, C of each row; 0 at the last time, where no step begins
    constant: Tensor | float  # reconstruction and prior of a row, in nats; of rows with padding `[B]`
    tokens: Tensor | None = None  # [B] float64, of each row without its padding; None: there is no padding

    def bound(self, grid: Sequence[float]) -> Tensor:
        """The negative ELBO of each row `[B]` in nats for a grid of these times. ValueError for any other grid."""
        check_times(grid)
        place = torch.searchsorted(-self.times, -torch.tensor(grid, dtype=torch.float64))
        if not torch.equal(self.times[place], torch.tensor(grid, dtype=torch.float64)):
            raise ValueError("the grid has times at which the cost is not known")
        masked = self.masked[place]
        share = (masked[:-1] - masked[1:]) / masked[:-1]
        return share @ self.nats[place[:-1]] + self.constant


def candidates(points: int, steps: int) -> Tensor:
    """Times to choose from: `points` even ones and both named grids of `steps`, float64 `[N]` from 1 down to 0.

    A search among them can't do worse than either grid. Raises `UserError` for less than one step or point.
    """
    if points < 1:
        raise UserError(f"points is {points}; at least 1 is needed")
    named = [time_grid(kind, steps) for kind in ("uniform", "cosine")]
    return torch.cat([time_grid("uniform", points), *named]).unique().flip(0)


def estimate_costs(
    model: MaskedDiffusion,
    tokens: Tensor,
    times: Tensor,
    *,
    draws: int,
    seed: int,
    labels: Tensor | None = None,
    real: Tensor | None = None,
    batch_size: int = 64,
) -> Costs:
    """C at `times` [N] from rows of data `[B, L]`, the mean of `draws` masks for each row and time.

    labels: classes `[B]`, for class-conditional models. real: bool `[B, L]`, what is no padding; all if None.

    A row's masks of one draw are nested: what is hidden at a time is hidden at all later ones, so that neighbouring
    times differ little by chance.

    Raises `UserError` for a GenMD4 model, less than one row or draw, or a network whose answer is not finite.
    """
    if not isinstance(model, MD4):
        raise UserError("grids are searched for models of objective md4 alone: GenMD4 hides each token at its own rate")
    if len(tokens) < 1 or draws < 1:
        raise UserError(f"rows and draws are {len(tokens)} and {draws}; at least 1 of each is needed")
    length, keys = tokens.shape[1], noise.derive(noise.key(seed, "grid search"), torch.arange(draws))
    row_keys = noise.derive(keys[:, None], torch.arange(len(tokens)))  # [draws, B]
    uniforms = noise.uniform(row_keys[..., None], torch.arange(length)).to(tokens.device)
    nats = torch.zeros(len(times), len(tokens), dtype=torch.float64)
    # One list of (time, draw, row), taken through the network a batch at a time.
    index = torch.cartesian_prod(torch.arange(len(times) - 1), torch.arange(draws), torch.arange(len(tokens)))
    with torch.no_grad(), evaluating(model.network):
        for time, draw, row in (part.unbind(1) for part in index.split(batch_size)):
            t = times[time].to(tokens.device)
            z = model.corrupt(tokens[row], t, uniforms[draw, row])
            z = z if real is None else torch.where(real[row], z, tokens[row])
            scores = model.scores(tokens[row], z, t.float(), None if labels is None else labels[row])
            cost = -scores.log_likelihood.double().sum(dim=1).cpu()
            nats.index_put_((time, row), cost / draws, accumulate=True)
    if not bool(torch.isfinite(nats).all()):
        raise UserError("the network's logits are not finite: the model is damaged or its training diverged")
    counts = None if real is None else real.sum(1).double().cpu()
    paid = length if counts is None else counts
    constant = model.reconstruction(paid) + model.prior(paid)
    return Costs(times, model.schedule.masked(times), nats, constant, counts)


def search(costs: Costs, steps: int) -> tuple[float, ...]:
    """The grid of exactly `steps` steps among the costs' times with the smallest mean bound.

    Raises `UserError` if there are fewer times than the grid needs.
    """
    count = len(costs.times)
    if not 1 <= steps < count:
        raise UserError(f"steps is {steps}; with {count} times to choose from, 1 to {count - 1} are possible")
    mean, masked = costs.nats.mean(dim=1), costs.masked
    step = (1 - masked / masked[:, None]) * mean[:, None]  # [N, N]: from one time (row) to a later one of the list
    step = torch.where(torch.ones_like(step, dtype=torch.bool).triu(1), step, torch.inf)
    best, came = step[0], []  # the least cost of reaching each time, and where its last step begins
    for _ in range(steps - 1):
        best, begin = (best[:, None] + step).min(dim=0)
        came.append(begin)
    place = count - 1
    path = [place]
    for begin in reversed(came):
        place = int(begin[place])
        path.append(place)
    return tuple(costs.times[[0, *reversed(path)]].tolist())
