"""The times at which a sampler with a fixed number of steps stops, from 1 (all masked) down to 0."""

from typing import Literal, get_args

import torch
from torch import Tensor

from md4.errors import UserError

Grid = Literal["uniform", "cosine"]
GRIDS: tuple[str, ...] = get_args(Grid)


def time_grid(kind: str, steps: int) -> Tensor:
    """The grid t_0 = 1 > t_1 > ... > t_steps = 0 as float64 `[steps + 1]`; step i goes from t_i to t_(i+1).

    `uniform` divides [0, 1] evenly. `cosine` maps u to cos(pi/2 (1 - u)) = sin(pi/2 u): with the linear schedule it
    reveals as the cosine schedule does on the uniform grid, few tokens first (arXiv 2406.04329, appendix G). Both ends
    are exact, so no schedule is ever asked for a time outside [0, 1].

    Raises `UserError` for an unknown kind or fewer than one step.
    """
    if kind not in GRIDS:
        raise UserError(f"grid {kind!r} is unknown; allowed: {', '.join(GRIDS)}")
    if steps < 1:
        raise UserError(f"steps is {steps}; at least 1 is needed")
    times = torch.arange(steps, -1, -1, dtype=torch.float64) / steps
    if kind == "cosine":
        times = torch.sin(times * (torch.pi / 2))
        times[0] = 1.0
    return times
