"""The distribution that training times are drawn from, and the weight that keeps the loss unbiased.

The loss of an example is an integral over the time t in [0, 1). Drawn from a density q instead of the uniform one, and
divided by q(t), its estimate has the same mean, and so has its gradient; the variance is another one. q is a mixture:

    q(t) = share * a b t^(a - 1) (1 - t^a)^(b - 1) + 1 - share

The first part is Kumaraswamy's distribution, a close relative of Beta(a, b) whose quantiles have a closed form: below 1
both draw times to the ends, `a` to t = 0 and `b` to t = 1, above 1 it is a bell. The uniform part bounds the weight by
1 / (1 - share). A time is the quantile of a stratified grid's point, so the times of a global batch stay evenly spread,
by mass of q, and a function of (seed, step, slot) alone.

No evaluation uses any of this: its times are uniform.
"""

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

_BELOW_1 = 1 - 2.0**-53


class Times(BaseModel):
    """A proposal for the times of training. Equal by value; a = b = 1 is the uniform one."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    a: float = Field(1.0, gt=0, le=100, description="below 1 more times near 0, where little is hidden; 1 = even")
    b: float = Field(1.0, gt=0, le=100, description="below 1 more times near 1; with a above 1 a bell; 1 = even")
    share: float = Field(
        0.5, ge=0, lt=1, description="of the times drawn so, the others are uniform; bounds the weight"
    )

    @property
    def uniform(self) -> bool:
        """Nothing is drawn differently, and nothing is to be weighed."""
        return not self.share or self.a == self.b == 1

    def draw(self, u: Tensor) -> Tensor:
        """Times `[...]` in [0, 1), for u [...] in [0, 1): those of density q, for uniform u."""
        if self.uniform:
            return u
        inner = u / self.share
        powered = -torch.expm1(torch.log1p(-inner.clamp(max=_BELOW_1)) / self.b)  # t^a
        t = torch.where(u < self.share, powered ** (1 / self.a), (u - self.share) / (1 - self.share))
        return t.clamp(0, _BELOW_1)

    def density(self, t: Tensor) -> Tensor:
        """q(t), float64 `[...]`."""
        t = t.double()
        if self.uniform:
            return torch.ones_like(t)
        return self.share * self.a * self.b * t ** (self.a - 1) * (1 - t**self.a) ** (self.b - 1) + 1 - self.share

    def weight(self, t: Tensor) -> Tensor:
        """1 / q(t), float64 `[...]`: what the loss at a drawn time counts."""
        return self.density(t).reciprocal()


UNIFORM = Times.model_validate({})
