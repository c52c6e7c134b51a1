"""What the steps of a sampler along a time grid cost in its bound, estimated from data.

The negative ELBO of a sampler that goes from t to s < t in one step, summed over its steps, is of MD4

    sum over steps of  (M(t) - M(s)) / M(t) C(t)  +  reconstruction,      C(t) = E[ sum over masked of -ln mu(x | z_t) ]

with M = 1 - alpha (arXiv 2406.04329, appendix on discrete time). GenMD4 reveals v with g_v = 1 - (s / t)^(p_v), so that
a masked position that hides x costs KL(true step || model's step):

    -g_x ln mu_x  +  (1 - g_x) ln( (1 - g_x) / (1 - sum_v mu_v g_v) )

(the shares eps of its schedule cancel in every step, and the sampler begins with all masked: no other term is left.)

Shapes: N times, B rows, L tokens, V real tokens, K masked positions.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from md4 import noise
from md4.errors import UserError
from md4.genmd4 import GenMD4
from md4.objectives import MD4, MaskedDiffusion, evaluating
from md4.samplers import count_costs
from md4.samplers.grids import check_times

_CHUNK = 1 << 22  # numbers of a prediction looked at together: 32 MB


@dataclass(frozen=True)
class Costs(ABC):
    """What was found of the costs of steps between `times`."""

    times: Tensor  # [N] float64, from 1 down to 0
    constant: Tensor | float  # what a row costs beside its steps, in nats; of rows with padding `[B]`
    tokens: Tensor | None  # [B] float64, of each row without its padding; None: there is no padding

    @abstractmethod
    def steps(self, begin: Tensor, end: Tensor) -> Tensor:
        """Nats `[T, B]` of steps from the times numbered `begin` [T] to those numbered `end` [T]."""

    @abstractmethod
    def mean(self) -> Tensor:
        """Nats `[N, N]` of a step from one time (row) to a later one (column), the mean over rows of data."""

    def bound(self, grid: Sequence[float]) -> Tensor:
        """The negative ELBO of each row `[B]` in nats for a grid of these times. ValueError for any other grid."""
        check_times(grid)
        place = torch.searchsorted(-self.times, -torch.tensor(grid, dtype=torch.float64))
        if not torch.equal(self.times[place], torch.tensor(grid, dtype=torch.float64)):
            raise ValueError("the grid has times at which the cost is not known")
        return self.steps(place[:-1], place[1:]).sum(0) + self.constant


@dataclass(frozen=True)
class SharedCosts(Costs):
    """Of MD4, all tokens of which are revealed alike: a step costs a share of C at its beginning."""

    masked: Tensor  # [N] float64, M at these times
    nats: Tensor  # [N, B] float64, C of each row; 0 at the last time, where no step begins

    def steps(self, begin: Tensor, end: Tensor) -> Tensor:
        return (1 - self.masked[end] / self.masked[begin])[:, None] * self.nats[begin]

    def mean(self) -> Tensor:
        return (1 - self.masked / self.masked[:, None]) * self.nats.mean(dim=1)[:, None]


@dataclass(frozen=True)
class PairCosts(Costs):
    """Of GenMD4, each token of which has a rate of its own: every pair of times has a cost of its own."""

    nats: Tensor  # [N, N, B] float32, of a step from the first to the second; 0 unless the second is later

    def steps(self, begin: Tensor, end: Tensor) -> Tensor:
        return self.nats[begin, end].double()

    def mean(self) -> Tensor:
        return self.nats.double().mean(dim=2)


def estimate_costs(
    model: MaskedDiffusion,
    tokens: Tensor,
    times: Tensor,
    *,
    draws: int,
    seed: int,
    labels: Tensor | None = None,
    real: Tensor | None = None,
    exact: bool = True,
    batch_size: int = 64,
) -> Costs:
    """Costs of steps between `times` [N] from rows of data `[B, L]`, of `draws` masks for each row and time.

    labels: classes `[B]`, for class-conditional models. real: bool `[B, L]`, what is no padding; all if None. exact:
    False leaves out what the time as an input changes beside the number of masks, and its two calls at each time; that
    does for a search, whose result is checked.

    A row's masks of one draw are nested: what is hidden at a time is hidden at all later ones, so that neighbouring
    times differ little by chance.

    Raises `UserError` for less than one row or draw, or a network whose answer is not finite.
    """
    if len(tokens) < 1 or draws < 1:
        raise UserError(f"rows and draws are {len(tokens)} and {draws}; at least 1 of each is needed")
    cases = _cases(tokens, times, draws, seed, labels, real, batch_size)
    counts = None if real is None else real.sum(1).double().cpu()
    with torch.no_grad(), evaluating(model.network):
        if isinstance(model, MD4):
            paid = tokens.shape[1] if counts is None else counts
            constant = model.reconstruction(paid) + model.prior(paid)
            if by_count(model, tokens.shape[1]):
                counted = count_costs.Rows(model, tokens, times, seed, labels, real, batch_size)
                nats = counted.costs(draws)
                if exact and count_costs.sees_time(model):
                    nats += counted.shifts(math.ceil(draws / 4))  # a small part, which costs four calls at every time
            else:
                nats = _shared(model, cases, torch.zeros(len(times), len(tokens), dtype=torch.float64)) / draws
            costs = SharedCosts(times, constant, counts, model.schedule.masked(times), nats)
        elif isinstance(model, GenMD4):
            shape = (len(times), len(times), len(tokens))
            costs = PairCosts(times, 0.0, counts, _pairs(model, cases, times, torch.zeros(shape)) / draws)
        else:
            raise TypeError(f"the bound of {type(model).__name__} is not known")
    if not bool(torch.isfinite(costs.nats).all()):
        raise UserError("the network's logits are not finite: the model is damaged or its training diverged")
    return costs


@dataclass(frozen=True)
class _Cases:
    """Rows at some of the times, to be masked and shown to the network together."""

    time: Tensor  # [B] numbers of the times
    row: Tensor  # [B] numbers of the rows
    t: Tensor  # [B] float64
    tokens: Tensor  # [B, L]
    uniforms: Tensor  # [B, L]
    labels: Tensor | None  # [B]
    real: Tensor | None  # [B, L]


def _cases(
    tokens: Tensor,
    times: Tensor,
    draws: int,
    seed: int,
    labels: Tensor | None,
    real: Tensor | None,
    batch_size: int,
) -> Iterator[_Cases]:
    """All (time, draw, row), but the last time, where no step begins: a batch after another."""
    length, keys = tokens.shape[1], noise.derive(noise.key(seed, "grid search"), torch.arange(draws))
    row_keys = noise.derive(keys[:, None], torch.arange(len(tokens)))  # [draws, B]
    uniforms = noise.uniform(row_keys[..., None], torch.arange(length)).to(tokens.device)
    index = torch.cartesian_prod(torch.arange(len(times) - 1), torch.arange(draws), torch.arange(len(tokens)))
    for time, draw, row in (part.unbind(1) for part in index.split(batch_size)):
        yield _Cases(
            time,
            row,
            times[time].to(tokens.device),
            tokens[row],
            uniforms[draw, row],
            None if labels is None else labels[row],
            None if real is None else real[row],
        )


def _shared(model: MD4, cases: Iterator[_Cases], nats: Tensor) -> Tensor:
    """C of all cases added to `nats` [N, B]."""
    for case in cases:
        z = model.corrupt(case.tokens, case.t, case.uniforms)
        z = z if case.real is None else torch.where(case.real, z, case.tokens)
        cost = count_costs.cost(model, case.tokens, z, case.t, case.labels)
        nats.index_put_((case.time, case.row), cost.cpu(), accumulate=True)
    return nats


def by_count(model: MaskedDiffusion, length: int) -> bool:
    """Whether costs are estimated by the number of hidden tokens (`count_costs`): more times cost no calls."""
    return isinstance(model, MD4) and length <= count_costs.LONGEST


def _pairs(model: GenMD4, cases: Iterator[_Cases], times: Tensor, nats: Tensor) -> Tensor:
    """Costs of the steps from the times of all cases to all later times, added to `nats` [N, N, B]."""
    powers = model.schedule().double()  # [V]
    times = times.to(powers.device)
    for case in cases:
        # The sampler's own law: what hides x at time t has t^(p_x), without the share eps of training.
        visible = case.uniforms >= case.t[:, None] ** powers[case.tokens]
        visible = visible if case.real is None else visible | ~case.real
        z = torch.where(visible, case.tokens, model.mask_id)
        logits = model.logits(z, case.t.float().clamp(min=model.t1), case.labels)
        row, position = (~visible).nonzero(as_tuple=True)
        size = max(1, _CHUNK // model.vocab_size)
        for r, p in zip(row.split(size), position.split(size), strict=True):
            log_mu, x, time = logits[r, p].double().log_softmax(-1), case.tokens[r, p], case.time[r.cpu()]
            for begin in time.unique().tolist():
                here = (time == begin).to(r.device)
                found = _step_nats(log_mu[here], x[here], times[begin + 1 :] / times[begin], powers)
                nats[begin, begin + 1 :].index_add_(1, case.row[r[here].cpu()], found.t().to(nats.dtype).cpu())
    return nats


def _step_nats(log_mu: Tensor, x: Tensor, ratio: Tensor, powers: Tensor) -> Tensor:
    """Nats `[K, N]` of steps that shrink the time by `ratio` [N] in [0, 1), for predictions `[K, V]` of x [K]."""
    stay = ratio[:, None] ** powers  # [N, V]: 1 - g
    own = stay.t()[x]  # [K, N]
    predicted = log_mu.exp() @ stay.t()
    kept = torch.where(own > 0, own * (own / predicted).log(), 0.0)
    return kept - (1 - own) * log_mu.gather(1, x[:, None])
