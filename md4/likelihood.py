"""Estimates of the negative ELBO, an upper bound on -ln p(x), with standard errors.

Two estimators of (nearly) the same bound; every reported number names its own.

`mask_count`: the bound as an average over the number k of hidden tokens, uniform on 1..L. With C(S) the summed
cross-entropy of the positions S, hidden uniformly at random among all sets of size k, (L / k) C(S) nats are an unbiased
estimate for the whole example. A network that sees the time must be shown one that goes with k: given k, the fraction
hidden is distributed as Beta(k, L - k + 1), which is the law of the k-th smallest of L uniforms. Its schedule has no
offset: nothing stays visible at t = 1 or hidden at t = 0.

`continuous`: the training loss, -alpha'/(1 - alpha) C at uniform t, plus the reconstruction term (arXiv 2406.04329,
equation 5). It is what published numbers are made with, and its variance is an order of magnitude larger, since the
weight reaches 1/eps. For a model of discrete time it is the finite sum over steps instead (`discrete`), a looser bound.

The two differ by eps (ln V - c_1 - c_L / L) nats a token, with c_k the mean of C at k hidden tokens.
"""

import math
from typing import TYPE_CHECKING, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from md4 import inference, noise
from md4.errors import UserError

if TYPE_CHECKING:
    from md4.objectives import MD4

Estimator = Literal["mask_count", "continuous"]


def estimator_name(model: "MD4", estimator: str) -> str:
    """What a report calls the estimate that `nelbo` makes for this model."""
    return f"discrete, T = {model.timesteps}" if estimator == "continuous" and not model.continuous else estimator


def nelbo(
    model: "MD4",
    tokens: Tensor,
    *,
    draws: int,
    seed: int,
    ids: Tensor,
    estimator: str = "mask_count",
    labels: Tensor | None = None,
) -> Tensor:
    """Estimates of the negative ELBO of whole examples, in nats: float64 `[B, draws]`.

    tokens: `[B, L]` int64, without masks; ids: `[B]` the examples' numbers, which with `seed` name all noise, so that
    an example's estimates don't depend on the batch it comes in; labels: classes `[B]` of class-conditional models.

    The draws of an example are stratified (its k-draws or times are an even grid with a random start of its own): their
    mean is unbiased and less noisy than that of independent draws, but its standard error must come from the spread
    *between* examples, see `mean_and_error`.

    Raises `UserError` for an unknown estimator, fewer than one draw, or a network whose answer is not finite.
    """
    if draws < 1:
        raise UserError(f"draws is {draws}; at least 1 is needed")
    if estimator not in ("mask_count", "continuous"):
        raise UserError(f"estimator {estimator!r} is unknown; allowed: mask_count, continuous")
    estimate = _mask_count if estimator == "mask_count" else _continuous
    keys = noise.derive(noise.key(seed, "nelbo", estimator), ids.to(tokens.device))
    start = noise.uniform(noise.derive(keys, "start"), torch.zeros_like(keys))
    columns = []
    for draw in range(draws):
        fraction = (start + draw / draws) % 1.0
        positions = torch.arange(tokens.shape[1], device=tokens.device)
        uniforms = noise.uniform(noise.derive(noise.derive(keys, "positions"), draw)[:, None], positions)
        columns.append(estimate(model, tokens, fraction, uniforms, labels))
    nats = torch.stack(columns, dim=1)
    if not bool(torch.isfinite(nats).all()):
        raise UserError("the network's logits are not finite: the model is damaged or its training diverged")
    return nats


def _mask_count(model: "MD4", tokens: Tensor, fraction: Tensor, uniforms: Tensor, labels: Tensor | None) -> Tensor:
    """(L / k) C(S), `[B]`, for k = 1 + floor(L fraction).

    One set of uniforms `[B, L]` gives both the set and the time: the k positions with the smallest ones are a uniform
    set of size k, and the k-th smallest value, which is independent of where it stands, is the fraction hidden.
    """
    length = tokens.shape[1]
    count = (1 + (length * fraction).long()).clamp(max=length)[:, None]
    largest = uniforms.sort(dim=1).values.gather(1, count - 1)
    hidden = uniforms <= largest
    t = model.used_times(model.schedule.inverse_masked(largest[:, 0]))
    return length / count[:, 0] * _cross_entropy(model, tokens, hidden, t, labels)


def _continuous(model: "MD4", tokens: Tensor, fraction: Tensor, uniforms: Tensor, labels: Tensor | None) -> Tensor:
    """The training loss at t = fraction, `[B]`, with its reconstruction and prior terms."""
    length = tokens.shape[1]
    t = model.used_times(fraction)
    hidden = model.corrupt(tokens, t, uniforms) == model.mask_id
    diffusion = -model.loss_weight(t) * _cross_entropy(model, tokens, hidden, t, labels)
    return diffusion + model.reconstruction(length) + model.prior(length)


def _cross_entropy(model: "MD4", tokens: Tensor, hidden: Tensor, t: Tensor, labels: Tensor | None) -> Tensor:
    """C(S): -ln mu of the true tokens, summed over the positions `hidden` `[B, L]`: float64 `[B]`."""
    logits = inference.logits(model, torch.where(hidden, model.mask_id, tokens), t, labels)
    targets = torch.where(hidden, tokens, -100)
    nats = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-100, reduction="none")
    return nats.view(tokens.shape).double().sum(dim=1)


def mean_and_error(values: Tensor) -> tuple[float, float]:
    """Mean of independent values `[N]` and its standard error sd / sqrt(N); the error of one value is NaN.

    Give it one value for each example (the mean over its draws). Windows of one document are not quite independent.
    """
    values = values.double()
    if values.numel() < 2:
        return float(values.mean()), math.nan
    return float(values.mean()), float(values.std() / math.sqrt(values.numel()))
