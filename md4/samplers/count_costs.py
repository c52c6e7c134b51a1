"""Costs of a sampler's steps, estimated by the number of hidden tokens: with little noise, at any number of times.

Given the number k of a row's n tokens that are hidden, which ones is uniform. Hence the cost C(t) of `grid_costs` is

    C(t) = sum over k of Binomial(k; n, M(t)) c_k(t),      c_k(t) = E[ sum over k hidden of -ln mu(x | z) ], shown t

A network without time input has c_k(t) = c_k. Rows are masked with every k, and the binomial is summed exactly: what is
left of the noise is common to neighbouring times, and two grids differ by little. A network that sees the time is shown
the one that goes with k, tau(k), where M(tau) = k / n; what the true times change, E[c_k(t) - c_k(tau(k))], is
estimated apart, by showing the network the same masks twice. Their k come in pairs, as far above the middle of the
binomial as below. Both parts are exact on average.

Shapes: N times, B rows, L tokens, D draws.
"""

import math

import torch
from torch import Tensor

from md4 import noise
from md4.objectives import MD4

LONGEST = 256  # tokens of a row: there are as many network calls for each draw


def cost(model: MD4, tokens: Tensor, z: Tensor, t: Tensor, labels: Tensor | None) -> Tensor:
    """-ln mu of what is hidden in z `[B, L]`, summed: float64 `[B]`."""
    return -model.scores(tokens, z, t.float(), labels).log_likelihood.double().sum(dim=1)


def sees_time(model: MD4) -> bool:
    """Whether the network may predict otherwise at another time; True of one that doesn't say."""
    conditioning = getattr(model.network, "conditioning", model)
    return conditioning is not None and getattr(conditioning, "time_input", True)


class Rows:
    """Rows of data `[B, L]` and the times [N] at which their costs are wanted; see `estimate_costs` for the rest."""

    def __init__(
        self,
        model: MD4,
        tokens: Tensor,
        times: Tensor,
        seed: int,
        labels: Tensor | None,
        real: Tensor | None,
        batch_size: int,
    ):
        self.model, self.tokens, self.labels, self.times = model, tokens, labels, times
        self.seed, self.batch_size = seed, batch_size
        self.inside = torch.ones(tokens.shape, dtype=torch.bool) if real is None else real.cpu()
        self.count = self.inside.sum(1)  # [B]
        self.masked = model.schedule.masked(times[:-1])  # [N - 1]; no step begins at the last time

    def costs(self, draws: int) -> Tensor:
        """C `[N, B]` of `draws` masks for each number of hidden tokens, the network being shown tau.

        The sets of a draw are nested: the first tokens of one random order.
        """
        rows, length = self.tokens.shape
        order = self._orders("by count", draws)
        found = torch.zeros(length + 1, rows, dtype=torch.float64)  # [k, B]
        index = torch.cartesian_prod(torch.arange(1, length + 1), torch.arange(draws), torch.arange(rows))
        index = index[index[:, 0] <= self.count[index[:, 2]]]
        for hidden, draw, row in (part.unbind(1) for part in index.split(self.batch_size)):
            z = self._hide(order[draw, row], hidden, row)
            found.index_put_((hidden, row), self._cost(z, row, self._tau(hidden, row)) / draws, accumulate=True)
        result = torch.zeros(len(self.times), rows, dtype=torch.float64)
        for size in self.count.unique().tolist():
            here = self.count == size
            result[:-1, here] = self._law(size) @ found[: size + 1, here]
        return result

    def shifts(self, pairs: int) -> Tensor:
        """What the times themselves change of C `[N, B]`, from `pairs` pairs of masks for each row and time."""
        rows, order = len(self.tokens), self._orders("shift", pairs)
        keys = noise.derive(noise.key(self.seed, "grid search", "quantile"), torch.arange(pairs))
        keys = noise.derive(keys[:, None], torch.arange(rows))
        level = noise.uniform(keys, torch.zeros_like(keys))  # [pairs, B], of the binomial's quantile
        number = torch.zeros(len(self.masked), 2 * pairs, rows, dtype=torch.int64)
        for size in self.count.unique().tolist():
            here = self.count == size
            levels = torch.cat([level[:, here], 1 - level[:, here]])  # [2 pairs, b]
            below = self._law(size).cumsum(1)[:, :-1].contiguous()  # [N - 1, size]
            flat = levels.flatten().expand(len(below), -1).contiguous()
            number[:, :, here] = torch.searchsorted(below, flat).unflatten(1, levels.shape)
        result = torch.zeros(len(self.times), rows, dtype=torch.float64)
        index = torch.cartesian_prod(torch.arange(len(self.masked)), torch.arange(2 * pairs), torch.arange(rows))
        for time, draw, row in (part.unbind(1) for part in index.split(self.batch_size)):
            hidden = number[time, draw, row]
            z = self._hide(order[draw % pairs, row], hidden, row)
            change = self._cost(z, row, self.times[time]) - self._cost(z, row, self._tau(hidden, row))
            result.index_put_((time, row), torch.where(hidden > 0, change, 0.0) / (2 * pairs), accumulate=True)
        return result

    def _orders(self, purpose: str, draws: int) -> Tensor:
        """Ranks `[D, B, L]` of the tokens in random orders, padding last."""
        keys = noise.derive(noise.key(self.seed, "grid search", purpose), torch.arange(draws))
        keys = noise.derive(keys[:, None], torch.arange(len(self.tokens)))
        uniforms = noise.uniform(keys[..., None], torch.arange(self.tokens.shape[1]))
        order = torch.where(self.inside, uniforms, 2.0).argsort(dim=2).argsort(dim=2)
        return order.to(self.tokens.device)

    def _hide(self, order: Tensor, hidden: Tensor, row: Tensor) -> Tensor:
        """Rows `row` [b] with the first `hidden` [b] tokens of their `order` [b, L] masked."""
        return torch.where(order < hidden[:, None].to(order.device), self.model.mask_id, self.tokens[row])

    def _cost(self, z: Tensor, row: Tensor, t: Tensor) -> Tensor:
        labels = None if self.labels is None else self.labels[row]
        return cost(self.model, self.tokens[row], z, t.to(self.tokens.device), labels).cpu()

    def _tau(self, hidden: Tensor, row: Tensor) -> Tensor:
        return self.model.schedule.inverse_masked(hidden.double() / self.count[row].clamp(min=1))

    def _law(self, size: int) -> Tensor:
        """The binomial of `size` tokens at each time but the last, `[N - 1, size + 1]`."""
        k, masked = torch.arange(size + 1, dtype=torch.float64), self.masked[:, None]
        choose = math.lgamma(size + 1) - torch.lgamma(k + 1) - torch.lgamma(size - k + 1)
        return (choose + torch.xlogy(k, masked) + torch.xlogy(size - k, 1 - masked)).exp()
