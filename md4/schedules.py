"""Masking schedules: the probability alpha(t) that a token is still visible at time t (MD4, sections 2 and 4.1).

Every schedule is a curve `visible(t)` from 1 at t = 0 to 0 at t = 1, squeezed so that it starts at 1 - eps and ends at
eps:

    alpha(t) = (1 - 2 eps) visible(t) + eps,    1 - alpha(t) = (1 - 2 eps) hidden(t) + eps,    hidden = 1 - visible.

The loss divides by 1 - alpha, which is as small as eps, so `hidden` has a closed form of its own instead of being
formed by subtraction: in float32 the subtraction costs four digits near t = 0.

All functions are elementwise on tensors of any shape. They compute in the dtype of their argument, but never below
float32; Python numbers are taken as float64.
"""

import math
import re
from abc import ABC, abstractmethod
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from md4.errors import UserError

EPS = 1e-4


def _real(x: Tensor | float) -> Tensor:
    """`x` as a floating-point tensor of at least float32."""
    if not isinstance(x, Tensor):
        return torch.tensor(x, dtype=torch.float64)
    return x if x.dtype in (torch.float32, torch.float64) else x.to(torch.float32)


@dataclass(frozen=True)
class Schedule(ABC):
    """alpha(t) and what the loss and the samplers need of it. Equal by value; `str()` gives the name back."""

    eps: float = field(default=EPS, kw_only=True)

    @property
    @abstractmethod
    def name(self) -> str:
        """The name that `parse_schedule` accepts."""

    @abstractmethod
    def _visible(self, t: Tensor) -> Tensor:
        """The curve before the squeeze, 1 at t = 0 and 0 at t = 1, accurate near t = 1."""

    @abstractmethod
    def _hidden(self, t: Tensor) -> Tensor:
        """1 - visible(t), accurate near t = 0."""

    @abstractmethod
    def _slope(self, t: Tensor) -> Tensor:
        """d visible / dt."""

    @abstractmethod
    def _when_visible(self, visible: Tensor) -> Tensor:
        """t such that visible(t) = visible, for values in [0, 1]."""

    @abstractmethod
    def _when_hidden(self, hidden: Tensor) -> Tensor:
        """t such that hidden(t) = hidden, for values in [0, 1]."""

    def alpha(self, t: Tensor | float) -> Tensor:
        """Probability that a token is visible at t: 1 - eps at t = 0, eps at t = 1."""
        return (1 - 2 * self.eps) * self._visible(_real(t)) + self.eps

    def masked(self, t: Tensor | float) -> Tensor:
        """1 - alpha(t), free of cancellation: eps at t = 0 to full relative precision."""
        return (1 - 2 * self.eps) * self._hidden(_real(t)) + self.eps

    def dalpha(self, t: Tensor | float) -> Tensor:
        """d alpha / dt, negative (minus infinity at t = 0 for a polynomial of power below 1)."""
        return (1 - 2 * self.eps) * self._slope(_real(t))

    def weight(self, t: Tensor | float) -> Tensor:
        """alpha'(t) / (1 - alpha(t)), the weight of the log-likelihood in the continuous-time loss. Negative."""
        return self.dalpha(t) / self.masked(t)

    def log_snr(self, t: Tensor | float) -> Tensor:
        """ln(alpha / (1 - alpha)): falls from ln(1/eps - 1) to its negative."""
        return self.alpha(t).log() - self.masked(t).log()

    def inverse(self, alpha: Tensor | float) -> Tensor:
        """t with alpha(t) = alpha; values beyond the range of alpha give 0 or 1. Precise near t = 1."""
        visible = (_real(alpha) - self.eps) / (1 - 2 * self.eps)
        return self._when_visible(visible.clamp(0, 1)).clamp(0, 1)

    def inverse_masked(self, masked: Tensor | float) -> Tensor:
        """t with 1 - alpha(t) = masked; values beyond its range give 0 or 1. Precise near t = 0."""
        hidden = (_real(masked) - self.eps) / (1 - 2 * self.eps)
        return self._when_hidden(hidden.clamp(0, 1)).clamp(0, 1)

    def __str__(self) -> str:
        return self.name


@dataclass(frozen=True)
class Linear(Schedule):
    """visible(t) = 1 - t."""

    @property
    def name(self) -> str:
        return "linear"

    def _visible(self, t: Tensor) -> Tensor:
        return 1 - t

    def _hidden(self, t: Tensor) -> Tensor:
        return t

    def _slope(self, t: Tensor) -> Tensor:
        return torch.full_like(t, -1.0)

    def _when_visible(self, visible: Tensor) -> Tensor:
        return 1 - visible

    def _when_hidden(self, hidden: Tensor) -> Tensor:
        return hidden


@dataclass(frozen=True)
class Cosine(Schedule):
    """visible(t) = 1 - cos(pi/2 (1 - t)) = 2 sin^2(pi/4 (1 - t)), hence hidden(t) = sin(pi/2 t)."""

    @property
    def name(self) -> str:
        return "cosine"

    def _visible(self, t: Tensor) -> Tensor:
        return 2 * torch.sin((1 - t) * (math.pi / 4)) ** 2

    def _hidden(self, t: Tensor) -> Tensor:
        return torch.sin(t * (math.pi / 2))

    def _slope(self, t: Tensor) -> Tensor:
        return -(math.pi / 2) * torch.sin((1 - t) * (math.pi / 2))

    def _when_visible(self, visible: Tensor) -> Tensor:
        return 1 - torch.asin(torch.sqrt(visible / 2)) * (4 / math.pi)

    def _when_hidden(self, hidden: Tensor) -> Tensor:
        return torch.asin(hidden) * (2 / math.pi)


@dataclass(frozen=True)
class Polynomial(Schedule):
    """visible(t) = 1 - t^power, for any power > 0."""

    power: float

    def __post_init__(self):
        if not (math.isfinite(self.power) and self.power > 0):
            raise UserError(f"the power of a polynomial schedule is {self.power}: it must be a number above 0")

    @property
    def name(self) -> str:
        return f"poly{int(self.power) if self.power == int(self.power) else self.power}"

    def _visible(self, t: Tensor) -> Tensor:
        return -torch.expm1(self.power * torch.log(t))

    def _hidden(self, t: Tensor) -> Tensor:
        return t**self.power

    def _slope(self, t: Tensor) -> Tensor:
        return -self.power * t ** (self.power - 1)

    def _when_visible(self, visible: Tensor) -> Tensor:
        return torch.exp(torch.log1p(-visible) / self.power)

    def _when_hidden(self, hidden: Tensor) -> Tensor:
        return hidden ** (1 / self.power)


class LearnedPolynomial(nn.Module):
    """A polynomial schedule for each token, its power learned (MD4, section 6 and appendix on GenMD4).

        1 - alpha_v(t) = (1 - eps) t^(p_v),    p_v = softplus(w_v) > 0

    Unlike `Schedule` it leaves nothing hidden at t = 0; at t = 1 a share eps stays visible. A token with a large power
    is hidden late, hence revealed early when sampling. Powers matter by their ratios: a common factor only renames the
    times (but for what is cut off at the ends).

    The functions take times and the powers at which they are wanted (`forward()` gives all powers), broadcast against
    each other, and compute in the wider dtype of the two; gradients reach w through the powers.

    Args:
        vocab_size: V; every token has a parameter, even one that never occurs.
        power_init: all powers at the start.
    """

    w: nn.Parameter  # [V]

    def __init__(self, vocab_size: int, power_init: float = 1.0, eps: float = EPS):
        super().__init__()
        if not (math.isfinite(power_init) and power_init > 0):
            raise UserError(f"the initial power of a learned schedule is {power_init}: it must be a number above 0")
        self.power_init, self.eps = power_init, eps
        self.w = nn.Parameter(torch.empty(vocab_size))
        self.initialise()

    @torch.no_grad()
    def initialise(self) -> None:
        """Set every power to `power_init`: w = ln(e^power - 1)."""
        self.w.fill_(self.power_init + math.log(-math.expm1(-self.power_init)))

    def forward(self) -> Tensor:
        """The powers p `[V]`. A forward pass of its own, so that a sharded w is gathered when it is needed."""
        return torch.logaddexp(self.w, torch.zeros_like(self.w))

    def log_masked(self, t: Tensor, powers: Tensor) -> Tensor:
        """ln(1 - alpha) = ln(1 - eps) + p ln t."""
        return math.log1p(-self.eps) + powers * torch.log(t)

    def alpha(self, t: Tensor, powers: Tensor) -> Tensor:
        """Probability that a token of that power is visible at t: 1 at t = 0, eps at t = 1."""
        return -torch.expm1(self.log_masked(t, powers))

    def dalpha(self, t: Tensor, powers: Tensor) -> Tensor:
        """d alpha / dt, negative."""
        return -(1 - self.eps) * powers * t ** (powers - 1)

    def weight(self, t: Tensor, powers: Tensor) -> Tensor:
        """alpha' / (1 - alpha) = -p / t: eps cancels."""
        return -powers / t

    def log_snr(self, t: Tensor, powers: Tensor) -> Tensor:
        """ln(alpha / (1 - alpha))."""
        return torch.log(self.alpha(t, powers)) - self.log_masked(t, powers)


def parse_schedule(name: str, eps: float = EPS) -> Schedule:
    """The schedule called `name`: "linear", "cosine", or "poly" and its power, as in "poly2" or "poly0.5".

    Raises UserError for anything else.
    """
    if name == "linear":
        return Linear(eps=eps)
    if name == "cosine":
        return Cosine(eps=eps)
    power = re.fullmatch(r"poly((?:\d+\.?\d*|\.\d+)(?:e[+-]?\d+)?)", name)
    if power and math.isfinite(float(power[1])) and float(power[1]) > 0:
        return Polynomial(float(power[1]), eps=eps)
    raise UserError(
        f"unknown schedule {name!r}: allowed are 'linear', 'cosine' and 'poly' followed by a power above 0, "
        "such as 'poly2' or 'poly0.5'"
    )
