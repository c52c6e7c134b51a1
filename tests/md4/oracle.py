"""Laws small enough to enumerate, networks that know them, and what samplers and estimators must give for them.

Shapes: V tokens, L positions, S = (V + 1)^L states (token or mask at each position), X = V^L full sequences. States
and sequences are numbered in base V + 1 and base V, the first position being the most significant digit.
"""

import math
from itertools import product

import torch
from torch import Tensor, nn

from md4 import noise
from md4.objectives import MD4
from md4.schedules import parse_schedule


class Toy:
    """A law over X sequences and a network that knows its posteriors, optionally bent by a function of the time."""

    def __init__(self, vocabulary: int = 3, length: int = 4, seed: int = 0):
        self.vocabulary, self.length = vocabulary, length
        self.mask = vocabulary
        self.sequences = torch.tensor(list(product(range(vocabulary), repeat=length)))  # [X, L]
        self.states = torch.tensor(list(product(range(vocabulary + 1), repeat=length)))  # [S, L]
        weights = noise.exponential(noise.key(seed, "law"), torch.arange(len(self.sequences)))
        self.law = weights**2 / (weights**2).sum()  # [X], far from uniform
        # posterior[s, l, v]: probability of v at position l given the visible tokens of state s.
        visible = self.states[:, None] != self.mask
        fits = ((self.states[:, None] == self.sequences) | ~visible).all(dim=2).double()  # [S, X]
        one_hot = nn.functional.one_hot(self.sequences, vocabulary).double()  # [X, L, V]
        joint = torch.einsum("sx,x,xlv->slv", fits, self.law, one_hot)
        self.posterior = joint / joint.sum(dim=2, keepdim=True)
        bend = noise.uniform(noise.key(seed, "bend"), torch.arange(self.posterior.numel()))
        self.bend = 4 * bend.view(self.posterior.shape) - 2

    def mu(self, t: float, timed: bool) -> Tensor:
        """What the network predicts in every state at time t: `[S, L, V]`."""
        logits = self.posterior.log()
        return torch.softmax(logits + math.sin(3 * t) * self.bend, dim=2) if timed else self.posterior

    def model(self, schedule: str = "linear", eps: float = 1e-4, timed: bool = False, **options) -> MD4:
        network = _ToyNetwork(self, timed)
        return MD4(network, parse_schedule(schedule, eps=eps), self.vocabulary, **options)

    def state_index(self, z: Tensor) -> Tensor:
        """Numbers of states z `[..., L]`."""
        return (z * (self.vocabulary + 1) ** torch.arange(self.length - 1, -1, -1)).sum(dim=-1)

    def sequence_index(self, x: Tensor) -> Tensor:
        """Numbers of sequences x `[..., L]`."""
        return (x * self.vocabulary ** torch.arange(self.length - 1, -1, -1)).sum(dim=-1)

    def cross_entropy(self, x: Tensor, t: float, timed: bool) -> tuple[Tensor, Tensor]:
        """For one sequence x `[L]`: sizes `[2^L]` of all sets S of hidden positions and C(S) `[2^L]` at time t."""
        hidden = torch.tensor(list(product([False, True], repeat=self.length)))  # [2^L, L]
        z = torch.where(hidden, self.mask, x)
        surprise = -self.mu(t, timed)[self.state_index(z)].log()  # [2^L, L, V]
        own = surprise.gather(2, x.expand(len(z), -1)[..., None])[..., 0]
        return hidden.sum(dim=1), (own * hidden).sum(dim=1)

    def ancestral_law(
        self, schedule: str, eps: float, times: Tensor, timed: bool, start: Tensor | None = None
    ) -> Tensor:
        """Probability `[X]` of every sequence after ancestral steps along `times` and exact leftovers.

        Written as the Markov chain over whole states of which each step is the product of its positions' laws: it
        shares no line with the sampler. start: a state `[L]` with known tokens, all masked if not given.
        """
        alpha = parse_schedule(schedule, eps=eps).alpha
        masked = self.states == self.mask
        first = torch.full((self.length,), self.mask) if start is None else start
        probability = torch.zeros(len(self.states), dtype=torch.float64)
        probability[self.state_index(first)] = 1.0
        own = nn.functional.one_hot(self.states, self.vocabulary + 1).double()  # [S, L, V + 1]
        for t, s in zip(times[:-1].tolist(), times[1:].tolist(), strict=True):
            rho = ((alpha(s) - alpha(t)) / (1 - alpha(t))).item()
            step = torch.cat([rho * self.mu(t, timed), torch.full((*masked.shape, 1), 1 - rho)], dim=2)
            probability = self._product_step(probability, torch.where(masked[..., None], step, own))
        for _ in range(self.length):
            probability = self._reveal_one(probability, self.mu(0.0, timed))
        return probability[self.state_index(self.sequences)]

    def _product_step(self, probability: Tensor, positions: Tensor) -> Tensor:
        """Law of the next state, given the law `[S]` of this one and each state's position laws `[S, L, V + 1]`."""
        table = probability[:, None]
        for position in range(self.length):
            table = (table[:, :, None] * positions[:, position, None, :]).flatten(1)
        return table.sum(dim=0)

    def _reveal_one(self, probability: Tensor, mu: Tensor) -> Tensor:
        """One masked position, chosen uniformly, gets its token; full sequences stay."""
        hidden = self.states == self.mask
        result = torch.where(hidden.any(dim=1), 0.0, probability)
        share = probability / hidden.sum(dim=1).clamp(min=1)
        index = torch.arange(len(self.states))
        for position in range(self.length):
            digit = (self.vocabulary + 1) ** (self.length - 1 - position)
            here = hidden[:, position]
            for token in range(self.vocabulary):
                after = index[here] + (token - self.mask) * digit
                result.index_add_(0, after, share[here] * mu[here, position, token])
        return result


class _ToyNetwork(nn.Module):
    """Looks its prediction up; counts its calls and the rows they had."""

    def __init__(self, toy: Toy, timed: bool):
        super().__init__()
        self.toy, self.timed = toy, timed
        self.calls: list[int] = []

    def forward(self, z: Tensor, t: Tensor, labels: Tensor | None = None) -> Tensor:
        self.calls.append(len(z))
        index = self.toy.state_index(z)
        logits = self.toy.posterior[index].log()
        if self.timed:
            logits = logits + torch.sin(3 * t.double())[:, None, None] * self.toy.bend[index]
        return logits.float()


def chi_square(counts: Tensor, probabilities: Tensor) -> float:
    """p-value of Pearson's test of counts `[K]` against probabilities `[K]`.

    Cells expecting fewer than 5 are pooled into one; counts in a cell of probability 0 give p = 0.
    """
    counts, probabilities = counts.double(), probabilities.double()
    if counts[probabilities == 0].sum() > 0:
        return 0.0
    expected = probabilities * counts.sum()
    large = expected >= 5
    observed = torch.cat([counts[large], counts[~large].sum()[None]])
    expected = torch.cat([expected[large], expected[~large].sum()[None]])
    used = expected > 0
    statistic = ((observed[used] - expected[used]) ** 2 / expected[used]).sum()
    freedom = torch.tensor((int(used.sum()) - 1) / 2, dtype=torch.float64)
    return torch.special.gammaincc(freedom, statistic / 2).item()
