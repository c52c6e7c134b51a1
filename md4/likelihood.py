"""Estimates of the negative ELBO, an upper bound on -ln p(x), with standard errors.

Three estimators of three (slightly) different numbers; every reported number names its own. C(S) is the cross-entropy
of the network, in nats, summed over the hidden positions S, c_k its mean over the sets of size k, L the tokens scored,
eps the offset of the schedule, and M(t) = 1 - alpha(t) the probability of being hidden at time t.

`mask_count`: the number k of hidden tokens is uniform on 1..L and S uniform among the sets of that size; the estimate
is (L / k) C(S), its mean sum_k c_k / k. A bound without any offset: nothing stays visible at t = 1 or hidden at t = 0.
A network that sees the time must be shown one that goes with k: given k, the fraction hidden is distributed as
Beta(k, L - k + 1), which is the law of the k-th smallest of L uniforms. The least noisy of the three.

`continuous`: the training loss, -alpha'/(1 - alpha) C at uniform t, plus the reconstruction term L eps ln V
(arXiv 2406.04329, equation 5). Published numbers are made with it. Its variance is an order of magnitude larger, since
the weight reaches 1 / eps. Without time input its mean is sum_k (c_k / k) P(eps < B_k <= 1 - eps) + L eps ln V, where
B_k is Beta(k, L - k + 1); per token it exceeds that of `mask_count` by eps (ln V - c_1 - c_L / L) + O(eps^2).

`discrete`: what a sampler of T steps is bounded by. The time is one of 1/T, 2/T .. 1, the weight T (M(t) - M(s)) / M(t)
with s = t - 1/T. Looser; it falls to `continuous` as 1/T.

GenMD4 has no single M(t): only its own continuous bound is known (md4/genmd4.py).
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Literal, NamedTuple, cast, get_args

import torch
from torch import Tensor

from md4 import inference, noise
from md4.errors import UserError

if TYPE_CHECKING:
    from md4.genmd4 import GenMD4
    from md4.objectives import MD4, MaskedDiffusion

Estimator = Literal["mask_count", "continuous", "discrete"]
ESTIMATORS: tuple[str, ...] = get_args(Estimator)


def estimator_name(model: "MaskedDiffusion", estimator: str, timesteps: int | None = None) -> str:
    """What a report calls the estimate that `nelbo` makes with these arguments.

    A model of discrete time has no continuous bound: asked for it, `nelbo` gives that of the model's own steps.

    Raises `UserError` for what is unknown, or can't be had of this model.
    """
    if estimator not in ESTIMATORS:
        raise UserError(f"estimator {estimator!r} is unknown; allowed: {', '.join(ESTIMATORS)}")
    if _is_genmd4(model):
        if estimator != "continuous":
            raise UserError(f"estimator {estimator!r}: GenMD4's bound is known in continuous time only; use continuous")
        if timesteps is not None:
            raise UserError(f"timesteps={timesteps}: GenMD4's bound is known in continuous time only")
        return "continuous, GenMD4"
    steps = _steps(cast("MD4", model), estimator, timesteps)
    return estimator if steps is None else f"discrete, T = {steps}"


def _is_genmd4(model: "MaskedDiffusion") -> bool:
    from md4.genmd4 import GenMD4

    return isinstance(model, GenMD4)


def _steps(model: "MD4", estimator: str, timesteps: int | None) -> int | None:
    """The number of time steps of an estimate; None if it has no steps."""
    if estimator != "discrete" and timesteps is not None:
        raise UserError(f"timesteps={timesteps} is a setting of the estimator discrete, not of {estimator}")
    if timesteps is not None and timesteps < 1:
        raise UserError(f"timesteps is {timesteps}; at least 1 is needed")
    if estimator == "mask_count" or (estimator == "continuous" and model.continuous):
        return None
    return timesteps or model.timesteps


class _Draw(NamedTuple):
    """One draw for a batch of examples, and the randomness that makes it."""

    tokens: Tensor  # [B, L]
    scored: Tensor  # [B, L]
    fraction: Tensor  # [B] in [0, 1): the stratified coordinate, a share of 1..L or a time
    uniforms: Tensor  # [B, L] in (0, 1): which positions are hidden
    labels: Tensor | None  # [B]
    real: Tensor | None = None  # [B, L]: what is no padding; all if None


def nelbo(
    model: "MaskedDiffusion",
    tokens: Tensor,
    *,
    draws: int,
    seed: int,
    ids: Tensor,
    estimator: str = "mask_count",
    labels: Tensor | None = None,
    scored: Tensor | None = None,
    real: Tensor | None = None,
    timesteps: int | None = None,
) -> Tensor:
    """Estimates of the negative ELBO of whole examples, in nats: float64 `[B, draws]`.

    tokens: `[B, L]` int64, without masks; ids: `[B]` the examples' numbers, which with `seed` name all noise, so that
    an example's estimates don't depend on the batch it comes in; labels: classes `[B]` of class-conditional models;
    scored: `[B, L]` bool, the positions whose likelihood is asked for, given the others, which stay visible as their
    context; all if None; real: `[B, L]` bool, what is no padding (padding stays visible and is never scored, as in
    training); all if None; timesteps: T of the estimator `discrete`, the model's own if None.

    The draws of an example are stratified (its k-draws or times are an even grid with a random start of its own): their
    mean is unbiased and less noisy than that of independent draws, but its standard error must come from the spread
    *between* examples, see `mean_and_error`.

    Raises `UserError` for an unknown estimator or one that the model doesn't have, fewer than one draw, or a network
    whose answer is not finite.
    """
    columns = nelbo_draws(
        model,
        tokens,
        draws=draws,
        seed=seed,
        ids=ids,
        estimator=estimator,
        labels=labels,
        scored=scored,
        real=real,
        timesteps=timesteps,
    )
    nats = torch.stack(list(columns), dim=1)
    if not bool(torch.isfinite(nats).all()):
        raise UserError("the network's logits are not finite: the model is damaged or its training diverged")
    return nats


def nelbo_draws(
    model: "MaskedDiffusion",
    tokens: Tensor,
    *,
    draws: int,
    seed: int,
    ids: Tensor,
    estimator: str = "mask_count",
    labels: Tensor | None = None,
    scored: Tensor | None = None,
    real: Tensor | None = None,
    timesteps: int | None = None,
) -> Iterator[Tensor]:
    """The columns of `nelbo` one by one, `[B]` each, for who has something else to do between two network calls.

    What is not finite is given as it is.
    """
    if draws < 1:
        raise UserError(f"draws is {draws}; at least 1 is needed")
    estimator_name(model, estimator, timesteps)  # raises for what can't be had
    if _is_genmd4(model) and scored is not None and not bool(scored.all()):
        raise UserError("GenMD4's bound is known for whole examples only: there can't be context")
    keys = noise.derive(noise.key(seed, "nelbo", estimator), ids.to(tokens.device))
    start = noise.uniform(noise.derive(keys, "start"), torch.zeros_like(keys))
    positions = torch.arange(tokens.shape[1], device=tokens.device)
    wanted = torch.ones_like(tokens, dtype=torch.bool) if scored is None else scored.to(tokens.device)
    if real is not None:
        real = real.to(tokens.device)
        wanted = wanted & real
    for draw in range(draws):
        case = _Draw(
            tokens=tokens,
            scored=wanted,
            fraction=(start + draw / draws) % 1.0,
            uniforms=noise.uniform(noise.derive(noise.derive(keys, "positions"), draw)[:, None], positions),
            labels=labels,
            real=real,
        )
        yield _estimate(model, case, estimator, timesteps)


def _estimate(model: "MaskedDiffusion", case: _Draw, estimator: str, timesteps: int | None) -> Tensor:
    """One estimate of each example, `[B]`."""
    if _is_genmd4(model):
        return _genmd4(cast("GenMD4", model), case)
    model = cast("MD4", model)
    if estimator == "mask_count":
        return _mask_count(model, case)
    steps = _steps(model, estimator, timesteps)
    return _continuous(model, case) if steps is None else _discrete(model, case, steps)


def _mask_count(model: "MD4", case: _Draw) -> Tensor:
    """(n / k) C(S), `[B]`, for k = 1 + floor(n fraction) of the n scored positions.

    One set of uniforms `[B, L]` gives both the set and the time: the k positions with the smallest ones are a uniform
    set of size k, and the k-th smallest value, which is independent of where it stands, is the fraction hidden.
    """
    total = case.scored.sum(dim=1)
    count = torch.minimum(1 + (total * case.fraction).long(), total).clamp(min=1)
    uniforms = torch.where(case.scored, case.uniforms, 2.0)  # of the others, none is ever among the smallest
    largest = uniforms.sort(dim=1).values.gather(1, count[:, None] - 1)
    t = model.used_times(model.schedule.inverse_masked(largest[:, 0]))
    return total / count * _cross_entropy(model, case, uniforms <= largest, t)


def _continuous(model: "MD4", case: _Draw) -> Tensor:
    """The training loss at t = fraction, `[B]`, with its reconstruction and prior terms."""
    t = case.fraction
    return -model.loss_weight(t) * _cross_entropy(model, case, _hidden(model, case, t), t) + _constants(model, case)


def _discrete(model: "MD4", case: _Draw, steps: int) -> Tensor:
    """The term of the step that ends at t = (floor(T fraction) + 1) / T, times T, `[B]`, and the constants."""
    index = torch.floor(case.fraction * steps).clamp(max=steps - 1)
    t, s = (index + 1) / steps, index / steps
    now, next_ = model.schedule.masked(t), model.schedule.masked(s)
    weight = steps * (now - next_) / now
    return weight * _cross_entropy(model, case, _hidden(model, case, t), t) + _constants(model, case)


def _genmd4(model: "GenMD4", case: _Draw) -> Tensor:
    """GenMD4's own draw, `[B]`."""
    fill, labels = _filled(case)
    with _evaluating(model):
        real = None if case.real is None else case.real[fill]
        nats = model.bound_estimate(case.tokens[fill], case.fraction[fill], case.uniforms[fill], labels, real)
    return nats[: len(case.tokens)]


def _filled(case: _Draw) -> tuple[Tensor, Tensor | None]:
    """Numbers of the batch's rows, and their labels, filled up to the multiple that `inference` tells the reason of."""
    rows = len(case.tokens)
    fill = torch.arange(rows + -rows % inference.ROW_MULTIPLE, device=case.tokens.device) % rows
    return fill, None if case.labels is None else case.labels[fill]


@contextmanager
def _evaluating(model: "MaskedDiffusion") -> Iterator[None]:
    """Without dropout and gradients."""
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(training)


def _hidden(model: "MD4", case: _Draw, t: Tensor) -> Tensor:
    """The scored positions that are hidden at times t [B]: bool `[B, L]`."""
    return (model.corrupt(case.tokens, t, case.uniforms) == model.mask_id) & case.scored


def _constants(model: "MD4", case: _Draw) -> Tensor:
    """Reconstruction and prior of the scored tokens: float64 `[B]`."""
    return case.scored.sum(dim=1).double() * (model.reconstruction(1) + model.prior(1))


def _cross_entropy(model: "MD4", case: _Draw, hidden: Tensor, t: Tensor) -> Tensor:
    """C(S): -ln mu of the true tokens, summed over the positions `hidden` `[B, L]`: float64 `[B]`."""
    fill, labels = _filled(case)
    z = torch.where(hidden, model.mask_id, case.tokens)
    with _evaluating(model):
        scores = model.scores(case.tokens[fill], z[fill], t.float()[fill], labels)
    return -scores.log_likelihood[: len(z)].double().sum(dim=1)


def mean_and_error(values: Tensor) -> tuple[float, float]:
    """Mean of independent values `[N]` and its standard error sd / sqrt(N); the error of one value is NaN.

    Give it one value for each example (the mean over its draws). Windows of one document are not independent: see
    `ratio_and_error`.
    """
    values = values.double()
    if values.numel() < 2:
        return float(values.mean()), math.nan
    return float(values.mean()), float(values.std() / math.sqrt(values.numel()))


def ratio_and_error(nats: Tensor, tokens: Tensor, clusters: Tensor) -> tuple[float, float]:
    """sum(nats) / sum(tokens), and its standard error when only different clusters are independent.

    nats, tokens: `[N]` of each window; clusters: `[N]` ids, such as the document that a window is cut from. With G
    clusters and r_g = sum over g of (nats - ratio tokens), the error is sqrt(G / (G - 1) sum_g r_g^2) / sum(tokens),
    the linearised error of a ratio of means; for windows of equal size, each its own cluster, it is that of
    `mean_and_error`. It is NaN for a single cluster.
    """
    nats, tokens = nats.double(), tokens.double()
    ratio = nats.sum() / tokens.sum()
    unique, member = clusters.unique(return_inverse=True)
    groups = len(unique)
    if groups < 2:
        return float(ratio), math.nan
    residual = torch.zeros(groups, dtype=torch.float64).index_add(0, member, nats - ratio * tokens)
    error = (residual.square().sum() * groups / (groups - 1)).sqrt() / tokens.sum()
    return float(ratio), float(error)
