"""Time grids that make the bound of a sampler with few steps as small as it can be.

A step's cost in the bound depends on its two ends alone (`grid_costs`), so once costs are known at N times, the best T
of them are a least-cost path (Watson et al. 2021, arXiv 2106.03802).

Shapes: N times.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from md4.errors import UserError
from md4.samplers.grid_costs import Costs
from md4.samplers.grids import GRIDS, time_grid


def candidates(points: int, steps: Sequence[int]) -> Tensor:
    """Times to choose from: `points` even ones and both named grids of each of `steps`, float64 `[N]` from 1 to 0.

    A search among them can't do worse than either grid. Raises `UserError` for less than one step or point.
    """
    if points < 1:
        raise UserError(f"points is {points}; at least 1 is needed")
    named = [time_grid(kind, count) for count in steps for kind in GRIDS]
    return torch.cat([time_grid("uniform", points), *named]).unique().flip(0)


def search(costs: Costs, steps: int) -> tuple[float, ...]:
    """The grid of exactly `steps` steps among the costs' times with the smallest mean bound.

    Raises `UserError` if there are fewer times than the grid needs.
    """
    count = len(costs.times)
    if not 1 <= steps < count:
        raise UserError(f"steps is {steps}; with {count} times to choose from, 1 to {count - 1} are possible")
    step = costs.mean()
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
