"""The times at which a sampler with a fixed number of steps stops, from 1 (all masked) down to 0."""

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Literal, get_args

import torch
from torch import Tensor

from md4.errors import UserError

if TYPE_CHECKING:
    from md4.samplers.settings import SamplingConfig

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


def check_times(times: Sequence[float]) -> None:
    """ValueError unless `times` are a grid: from exactly 1 down to exactly 0, strictly falling."""
    falling = all(a > b for a, b in pairwise(times))
    if len(times) < 2 or times[0] != 1 or times[-1] != 0 or not falling or not all(map(math.isfinite, times)):
        raise ValueError("the times of a grid fall strictly from 1 to 0, such as [1, 0.4, 0]")


def times_of(settings: "SamplingConfig") -> Tensor:
    """The grid of resolved settings, float64 `[steps + 1]`."""
    assert settings.grid is not None
    if isinstance(settings.grid, tuple):
        return torch.tensor(settings.grid, dtype=torch.float64)
    assert settings.steps is not None
    return time_grid(settings.grid, settings.steps)
