"""Laws of GenMD4 small enough to enumerate: the true posterior as a network, and what each sampler must give for it.

Nothing here shares a line with the samplers: laws are Markov chains over whole states. Shapes: see tests/md4/oracle.py.
"""

import math

import torch
from torch import Tensor, nn

from md4.genmd4 import GenMD4
from tests.md4.oracle import Toy

POWERS = (0.5, 1.0, 3.0)  # of the three tokens: far from equal


class PowerToy(Toy):
    """A law p over X sequences whose token v is hidden by t^(p_v), and networks for it.

    exact   the true posterior, proportional to p(x) t^(sum of p_(x_q) over masked q): it depends on the time
    timed   another network that does: the posteriors of `Toy`, bent by a function of the time
    still   one that doesn't, and is no posterior either: `timed` at a fixed time
    """

    def __init__(self, powers: tuple[float, ...] = POWERS, length: int = 4, seed: int = 0):
        super().__init__(len(powers), length, seed)
        self.wanted = torch.tensor(powers, dtype=torch.float64)
        self.powers = self.model("exact").schedule().detach().double()  # [V], as the float32 parameters have them
        hidden = (self.states == self.mask)[:, None]  # [S, 1, L]
        visible_fits = ((self.states[:, None] == self.sequences) | hidden).all(dim=2)  # [S, X]
        exponent = (self.powers[self.sequences] * hidden).sum(dim=2)  # [S, X]
        self.log_weight = torch.where(visible_fits, self.law.log(), -torch.inf)  # [S, X]
        self.exponent = exponent
        self.one_hot = nn.functional.one_hot(self.sequences, self.vocabulary).double()  # [X, L, V]

    def model(self, kind: str = "exact", t1: float = 1e-12, **options) -> GenMD4:  # type: ignore[override]
        """A model with the toy's powers and the network of that kind, shown times down to t1."""
        model = GenMD4(_PowerNetwork(self, kind), self.vocabulary, t1=t1, **options)
        with torch.no_grad():
            model.schedule.w.copy_(self.wanted + torch.log(-torch.expm1(-self.wanted)))
        return model

    def prediction(self, index: Tensor, t: Tensor, kind: str) -> Tensor:
        """mu `[N, L, V]` float64 in states number `index` [N] at times [N]."""
        if kind == "exact":
            weight = (self.log_weight[index] + t.log()[:, None] * self.exponent[index]).softmax(dim=1)
            joint = (weight @ self.one_hot.flatten(1)).unflatten(1, (self.length, self.vocabulary))
            return joint / joint.sum(dim=2, keepdim=True)
        bent = torch.sin(3 * t)[:, None, None] if kind == "timed" else 1.0
        return torch.softmax(self.posterior[index].log() + bent * self.bend[index], dim=2)

    def all_states(self, t: float, kind: str) -> Tensor:
        """mu `[S, L, V]` in every state at time t."""
        return self.prediction(torch.arange(len(self.states)), torch.full((len(self.states),), t).double(), kind)

    def steps_law(self, times: Tensor, kind: str, start: Tensor | None = None) -> Tensor:
        """Probability `[X]` of every sequence after ancestral steps along `times`, from 1 to 0.

        In a step t -> s token v comes with mu_v (1 - (s / t)^p_v). start: a state `[L]`, all masked if not given.
        """
        probability = self._begin(start)
        masked = (self.states == self.mask)[..., None]
        own = nn.functional.one_hot(self.states, self.vocabulary + 1).double()
        for t, s in zip(times[:-1].tolist(), times[1:].tolist(), strict=True):
            come = self.all_states(t, kind) * (1 - (s / t) ** self.powers)
            step = torch.cat([come, 1 - come.sum(dim=2, keepdim=True)], dim=2)
            probability = self._product_step(probability, torch.where(masked, step, own))
        return probability[self.state_index(self.sequences)]

    def jumps_law(self, mu: Tensor | None = None, powers: Tensor | None = None) -> Tensor:
        """Probability `[X]` of every sequence if the next reveal is token v at p in proportion to p_v mu_pv.

        This is the law of a network that doesn't see the time, by default `still`, or mu `[S, L, V]`; with `powers` [V]
        equal: that of first hitting.
        """
        powers = self.powers if powers is None else powers
        mu = self.all_states(1.0, "still") if mu is None else mu
        probability = self._begin(None)
        hidden = self.states == self.mask
        rate = powers * mu * hidden[..., None]  # [S, L, V]
        share = rate / rate.sum(dim=(1, 2), keepdim=True).clamp(min=1e-300)
        for _ in range(self.length):
            moved = torch.zeros_like(probability)
            for position in range(self.length):
                digit = (self.vocabulary + 1) ** (self.length - 1 - position)
                here = hidden[:, position].nonzero()[:, 0]
                for token in range(self.vocabulary):
                    moved.index_add_(
                        0, here + (token - self.mask) * digit, (probability * share[:, position, token])[here]
                    )
            probability = moved
        return probability[self.state_index(self.sequences)]

    def first_event(self, s: Tensor) -> Tensor:
        """P(T <= s) `[N]` of the time T at which the first token is revealed, everything masked at t = 1."""
        return torch.exp(torch.log(s)[:, None] * self.powers[self.sequences].sum(dim=1)) @ self.law

    def given(self, start: Tensor) -> Tensor:
        """The law `[X]` given the visible tokens of a state [L]."""
        weight = self.log_weight[self.state_index(start)].exp()
        return weight / weight.sum()

    def _begin(self, start: Tensor | None) -> Tensor:
        state = torch.full((self.length,), self.mask) if start is None else start
        return nn.functional.one_hot(self.state_index(state), len(self.states)).double()


class _PowerNetwork(nn.Module):
    """Looks its prediction up; remembers the times that it was shown."""

    def __init__(self, toy: PowerToy, kind: str):
        super().__init__()
        self.toy, self.kind = toy, kind
        self.times: list[Tensor] = []

    def forward(self, z: Tensor, t: Tensor, labels: Tensor | None = None) -> Tensor:
        self.times.append(t)
        return self.toy.prediction(self.toy.state_index(z), t.double(), self.kind).log().float()


def variation(counts: Tensor, law: Tensor) -> float:
    """Total variation between the shares of counts `[K]` and a law `[K]`, as they are: noise of the counts adds."""
    return (counts / counts.sum() - law).abs().sum().item() / 2


def kolmogorov(values: Tensor, cumulative: Tensor) -> float:
    """p-value of the Kolmogorov-Smirnov test, for many values `[N]`, `cumulative` being the law's F at each of them."""
    order = values.argsort()
    count, expected = len(values), cumulative[order]
    rank = torch.arange(count, dtype=torch.float64)
    distance = torch.maximum((rank + 1) / count - expected, expected - rank / count).max().item() * math.sqrt(count)
    return min(1.0, 2 * sum((-1) ** (k - 1) * math.exp(-2 * (k * distance) ** 2) for k in range(1, 101)))
