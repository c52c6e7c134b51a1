"""The GenMD4 objective: how fast a token is hidden depends on the token, and is learned (MD4, section 6).

A token v is hidden at time t with probability (1 - eps) t^(p_v), its power p_v = softplus(w_v) being a parameter like
any other (see `LearnedPolynomial`). One draw of the diffusion term, with mu the network's prediction for z:

    l(z) = (1 / t) sum over hidden n of  [ sum_v p_v mu_n[v] - p_{x_n} (ln mu_n[x_n] + 1) ]

which is never negative, and p / t times the cross-entropy where all powers equal p. The law of z depends on w too, and
hiding is not differentiable. Hence two copies z1, z2 of an example, hidden independently at the same time, and

    optimised = (l1 + l2) / 2 + (l1 - l2) / 2 * (ln q(z1 | x) - ln q(z2 | x)) + R,    (l1 - l2) held constant
    bound     = (l1 + l2) / 2 + R

The middle term is the score-function gradient with each copy as the other's baseline (REINFORCE, leave-one-out). Its
value, of mean zero and huge variance, is no part of the bound.

Times are drawn from [t1, 1), t1 = 1e-3; R codes what is still hidden at t1. The integral over [t1, 1] is estimated as
if it had length 1, so the diffusion term is 1 / (1 - t1) = 1.001 times too large: a convention kept for the sake of
comparing with published numbers. It errs on the safe side.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn

from md4 import documents
from md4.objectives import Loss, MaskedDiffusion
from md4.schedules import LearnedPolynomial
from md4.times import UNIFORM, Times


class Terms(NamedTuple):
    """The parts of the loss, in nats per example, differentiable."""

    diffusion: Tensor  # [B, 2], l of each masked copy
    score: Tensor  # [B], what carries the score-function gradient; its value means nothing
    reconstruction: Tensor  # [B], R
    hidden: Tensor  # [B], hidden tokens of a copy, on average

    def weighed(self, weight: Tensor) -> "Terms":
        """The parts that depend on the time, times weight [B]: both terms are linear in l."""
        weight = weight.to(self.diffusion.dtype)
        return self._replace(diffusion=self.diffusion * weight[:, None], score=self.score * weight)

    @property
    def loss(self) -> Loss:
        """The parts put together."""
        bound = self.diffusion.mean(1) + self.reconstruction
        return Loss(optimised=bound + self.score, bound=bound.detach(), hidden=self.hidden)


class GenMD4(MaskedDiffusion):
    """Every token is hidden at its own, learned rate. There is continuous time alone.

    It computes in the dtype of its weights, float32 or float64; the schedule in float64 wherever the times are.

    Args:
        network, vocab_size, times: see `MaskedDiffusion`.
        power_init: power of all tokens before training; 1 is the linear schedule.
        t1: the earliest time.
    """

    objective = "genmd4"
    masks_per_example = 2

    def __init__(
        self,
        network: nn.Module,
        vocab_size: int,
        power_init: float = 1.0,
        t1: float = 1e-3,
        times: Times = UNIFORM,
    ):
        super().__init__(network, vocab_size, times)
        self.schedule: LearnedPolynomial = LearnedPolynomial(vocab_size, power_init)
        self.t1 = t1

    def forward(
        self,
        tokens: Tensor,
        t: Tensor,
        uniforms: Tensor,
        labels: Tensor | None = None,
        real: Tensor | None = None,
    ) -> Loss:
        """Surrogate and bound of each example `[B]`; `uniforms` is `[B, 2, L]`. See `MaskedDiffusion.forward`."""
        drawn, t = t, self.used_times(t)
        powers = self.schedule()
        terms = self.terms(tokens, self.corrupt(tokens, t, uniforms, powers, real), t, powers, labels, real)
        if not self.times.uniform:
            terms = terms.weighed(self.times.weight(drawn))
        return terms.loss

    def used_times(self, t: Tensor) -> Tensor:
        """The times `[B]` in [t1, 1) that masking, network and weight see, for t [B] in [0, 1)."""
        return (1 - self.t1) * t + self.t1

    @torch.no_grad()
    def corrupt(
        self, tokens: Tensor, t: Tensor, uniforms: Tensor, powers: Tensor, real: Tensor | None = None
    ) -> Tensor:
        """`tokens` [B, L] hidden at used times t [B] where a uniform is not below alpha: `[B, ..., L]`, as uniforms.

        Only where they are `real` [B, L] (bool), if that is given.
        """
        alpha = self.schedule.alpha(t.double()[:, None], powers[tokens])
        own = [len(tokens)] + [1] * (uniforms.ndim - 2) + [tokens.shape[1]]
        visible = uniforms < alpha.view(own)
        if real is not None:
            visible = visible | ~real.view(own)
        return torch.where(visible, tokens.view(own), self.mask_id)

    def terms(
        self,
        tokens: Tensor,
        z: Tensor,
        t: Tensor,
        powers: Tensor,
        labels: Tensor | None = None,
        real: Tensor | None = None,
    ) -> Terms:
        """The parts of the loss for tokens [B, L], hidden independently as z [B, 2, L] at used times t [B].

        Both copies go through the network in one pass of 2 B rows. `powers` [V] are those of the schedule; what is
        not `real` [B, L] is visible in z and costs nothing.
        """
        copies, times = tokens.repeat_interleave(2, 0), t.repeat_interleave(2)
        classes = None if labels is None else labels.repeat_interleave(2)
        diffusion = self._diffusion_nats(copies, z.flatten(0, 1), times, powers, classes).view(-1, 2)
        log_q = self._log_q(tokens, z, t, powers, real)
        weight = (diffusion[:, 0] - diffusion[:, 1]).detach() / 2
        score = weight * (log_q[:, 0] - log_q[:, 1])
        reconstruction = self.reconstruction_nats(tokens, powers, real)
        hidden = (z == self.mask_id).sum(2).float().mean(1)
        return Terms(diffusion, score.to(diffusion.dtype), reconstruction.to(diffusion.dtype), hidden)

    def _diffusion_nats(self, tokens: Tensor, z: Tensor, t: Tensor, powers: Tensor, labels: Tensor | None) -> Tensor:
        """l `[B]` for tokens [B, L] hidden as z [B, L] at used times t [B]; its gradient stops at the choice of z."""
        likelihood, mean_power = self.scores(tokens, z, t, labels, powers)
        assert mean_power is not None
        nats = mean_power - powers[tokens] * (likelihood + 1)
        return (torch.where(z == self.mask_id, nats, 0.0).sum(1) / t).to(likelihood.dtype)

    def _log_q(self, tokens: Tensor, z: Tensor, t: Tensor, powers: Tensor, real: Tensor | None) -> Tensor:
        """ln q(z | tokens) `[B, 2]`, over all (real) positions of z [B, 2, L], differentiable in the powers."""
        times, own = t[:, None], powers[tokens]
        if_hidden = self.schedule.log_masked(times, own)[:, None]
        if_visible = self.schedule.alpha(times, own).log()[:, None]
        log_q = torch.where(z == self.mask_id, if_hidden, if_visible)
        return (log_q if real is None else torch.where(real[:, None], log_q, 0.0)).sum(2)

    def reconstruction_nats(self, tokens: Tensor, powers: Tensor, real: Tensor | None = None) -> Tensor:
        """R `[B]`: the expected cost of coding what of tokens [B, L] is hidden at t1, by shares t1^p of the tokens."""
        log_t1 = math.log(self.t1)
        own = powers[tokens]
        surprise = (powers * log_t1).logsumexp(0) - own * log_t1
        return documents.per_row((1 - self.schedule.eps) * (own * log_t1).exp() * surprise, real)

    @torch.no_grad()
    def bound_estimate(
        self,
        tokens: Tensor,
        fraction: Tensor,
        uniforms: Tensor,
        labels: Tensor | None = None,
        real: Tensor | None = None,
    ) -> Tensor:
        """One draw of the negative ELBO of each example, float64 nats `[B]`, with 1 / (1 - t1) and reconstruction.

        Unbiased, in continuous time, if `fraction` [B] is uniform on [0, 1) and so are `uniforms` [B, L], which hide
        as in `forward`, which tells what `real` is. No gradient; dropout as the network's mode says.
        """
        t = self.used_times(fraction)
        powers = self.schedule()
        z = self.corrupt(tokens, t, uniforms, powers, real)
        nats = self._diffusion_nats(tokens, z, t, powers, labels).double()
        return nats + self.reconstruction_nats(tokens, powers.double(), real)
