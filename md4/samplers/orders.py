"""Orders that the network decides: the most certain positions first.

    confidence  largest probability of the most probable token first
    margin      largest difference between the two most probable tokens first
    entropy     smallest entropy H first, as many as the bound allows: the largest set U of the most certain positions
                with sum_U H - max_U H <= entropy_bound (EB-Sampler, arXiv 2505.24857). The left side bounds the
                dependence between tokens that are drawn apart though they are revealed together, in nats

How certain a position is follows from the model's own probabilities at the row's temperature, before top-k and top-p
cut them; its token is drawn from what is left after them. Positions of equal certainty follow each other from left to
right. Such orders don't sample the model's law, not even with one token a call: a token may decide which position is
next. The network is shown the time at which as large a share of the tokens is masked.

Shapes: B rows, T tokens of a row, N positions, V tokens of the vocabulary, K blocks.
"""

from abc import abstractmethod

import torch
from torch import Tensor

from md4.samplers.draws import log_weights
from md4.samplers.plans import NEVER
from md4.samplers.rows import Rows
from md4.samplers.sampler import Ask, Sampler, Seen, Sight
from md4.samplers.settings import SamplingConfig

_GRAIN = 2.0**-32


def rounded(score: Tensor) -> Tensor:
    """Scores `[...]` float64 as multiples of 2^-32.

    The last bits of a score depend on where a number lies in memory, hence on a row's company: they must not decide
    between positions that are equally good. Sums of such numbers are exact in any order.
    """
    return torch.round(score / _GRAIN) * _GRAIN + 0.0  # of two zeros one


def due_calls(unknown: Tensor, block: Tensor, steps: int | None) -> Tensor:
    """The row's number of calls `[B, T]` by which each position's block is to be full.

    unknown: `[B, T]` bool; block: `[B, T]`, the block of each position, rising from 0. The calls, `steps` of them but
    at most one a token (None = so many), are shared out over the blocks by their unknown positions: block k is full
    after the rounded share C (u_0 + ... + u_k) / n of all C calls, but each block with something unknown has at least
    one call, even if `steps` is too small for that.
    """
    number = unknown.new_zeros(len(unknown), int(block.max()) + 1, dtype=torch.int64)
    number.scatter_add_(1, block, unknown.long())  # [B, K] unknown positions of each block
    total, some = number.sum(dim=1), number > 0
    calls = total if steps is None else total.clamp(max=steps)
    # Integer arithmetic for round(C N / n), N the positions up to the end of a block.
    share = (2 * calls[:, None] * number.cumsum(dim=1) + total[:, None]) // (2 * total[:, None]).clamp(min=1)
    latest = calls[:, None] - (some.sum(dim=1, keepdim=True) - some.cumsum(dim=1))
    due, last = torch.zeros_like(number), torch.zeros_like(total)
    for index in range(number.shape[1]):
        wish = torch.minimum(share[:, index], latest[:, index])
        last = torch.where(some[:, index], torch.maximum(wish, last + 1), last)
        due[:, index] = last
    return due.gather(1, block)


class Ordered(Sampler):
    """Rows that reveal the positions of least `cost` in each call, `number` of them within the row's bounds."""

    @abstractmethod
    def cost(self, weights: Tensor) -> Tensor:
        """How uncertain distributions are: `[N]` float64, of unnormalised log-probabilities [N, V]."""

    @abstractmethod
    def number(self, rows: Rows, which: Tensor, costs: Tensor) -> Tensor:
        """How many positions the rows at `which` [n] reveal: `[n]`.

        costs: `[n, T]`, rising, inf behind the last one. Where these are only some of the row's active positions the
        answer may be too large, but must not be too small.
        """

    def begin(self, rows: Rows, settings: SamplingConfig) -> dict[str, Tensor]:
        def every(value: float, dtype: torch.dtype = torch.int64) -> Tensor:
            return torch.full((len(rows),), value, dtype=dtype, device=rows.tokens.device)

        return {
            "least": every(settings.min_reveals or 1),
            "most": every(settings.max_reveals or NEVER),
            "due": due_calls(rows.unknown, rows.block_index(), settings.steps),
            "bound": every(settings.entropy_bound or 0.0, torch.float64),
        }

    def ask(self, rows: Rows) -> Ask:
        return Ask(self.time_of_share(rows), rows.active(self.mask))

    def look(self, rows: Rows, sight: Sight) -> dict[str, Tensor]:
        row, position, logits = sight
        cost = rounded(self.cost(log_weights(logits, rows.temperature[row])))
        # Only those that are among the first of the positions in sight can be among the first of all.
        near = self._first(rows, row, position, cost)
        token = torch.full_like(row, self.mask)
        token[near] = self.draw(rows, Sight(row[near], position[near], logits[near]))
        return {"cost": cost, "token": token}

    def tell(self, rows: Rows, seen: Seen) -> None:
        first = self._first(rows, seen.row, seen.position, seen.values["cost"])
        row = seen.row[first]
        self.reveal(rows, row, seen.position[first], seen.values["token"][first])
        # Draws that came to nothing don't count: how many there are depends on the row's company.
        rows.draws.index_add_(0, row, torch.ones_like(row))

    def _first(self, rows: Rows, row: Tensor, position: Tensor, cost: Tensor) -> Tensor:
        """Which `[N]` (bool) of the positions [N] of rows [N] with costs [N] are revealed, if these were all."""
        which, place = row.unique(return_inverse=True)
        table = cost.new_full((len(which), rows.tokens.shape[1]), torch.inf)
        table[place, position] = cost
        costs, order = table.sort(dim=1, stable=True)
        number = self.number(rows, which, costs).clamp(min=rows.own["least"][which], max=rows.own["most"][which])
        return order.argsort(dim=1)[place, position] < number[place]


class Confidence(Ordered):
    """Largest top probability first; the tokens still masked are shared out evenly over the calls left."""

    def cost(self, weights: Tensor) -> Tensor:
        return -torch.exp(weights.amax(dim=1) - weights.logsumexp(dim=1))

    def number(self, rows: Rows, which: Tensor, costs: Tensor) -> Tensor:
        active = rows.active(self.mask)[which]
        due = torch.where(active, rows.own["due"][which], 0).amax(dim=1)  # the same in all positions of a block
        left = (due - rows.calls[which]).clamp(min=1)
        return (active.sum(dim=1) + left - 1) // left


class Margin(Confidence):
    """Largest difference of the two top probabilities first."""

    def cost(self, weights: Tensor) -> Tensor:
        top = weights.softmax(dim=1).topk(min(2, weights.shape[1]), dim=1).values
        return top[:, 1:].sum(dim=1) - top[:, 0]


class Entropy(Ordered):
    """Smallest entropy first, as many tokens a call as depend little on each other."""

    def cost(self, weights: Tensor) -> Tensor:
        return torch.special.entr(weights.softmax(dim=1)).sum(dim=1)

    def number(self, rows: Rows, which: Tensor, costs: Tensor) -> Tensor:
        # Costs rise: the largest entropy of a set is the last one, so the sum of those before it must not exceed.
        before = torch.cat([torch.zeros_like(costs[:, :1]), costs[:, :-1].cumsum(dim=1)], dim=1)
        return ((before <= rows.own["bound"][which, None]) & torch.isfinite(costs)).sum(dim=1)
