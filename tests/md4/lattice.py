"""What a joint draw over {stay masked} + V tokens does when its uniforms are multiples of 2^-b: the law in closed form.

Let d = 2^-b, and race times E / weight with E = -ln(1 - m d), m = 1 .. 2^b all equally likely. Token v (weight
rho mu_v) can only arrive at its own times y_{v,m}; staying (weight 1 - rho) arrives at y_j = -ln(1 - j d) / (1 - rho).
A token wins a tie. Hence, S(y) being the probability that no token has arrived by y,

    P(stay) = d sum_j S(y_j),    S(y) = prod_v (1 - d floor((1 - exp(-rho mu_v y)) / d)).

S is a step function that changes at the y_{v,m} alone. Few of them lie before the last finite y_j, about b ln 2 rho /
d of all tokens together, so the sum is exact and cheap for 2^24 points and 50,257 tokens: sort the arrivals, and count
the j between two of them.

Shapes: V tokens, K classes of tokens of equal probability.
"""

import math

import torch
from torch import Tensor

_EVENTS = 1 << 21  # arrivals sorted at a time


def lattice_law(mu: Tensor, rho: float, bits: int) -> Tensor:
    """Probability of every token and, last, of staying masked, float64 `[V + 1]`; mu: `[V]` float64, rho in (0, 1).

    Staying is exact. What tokens win is exact but for ties among tokens of equal probability, counted as if they were
    broken fairly, and for the one case in 2^b in which staying never arrives and the token is taken to follow mu.
    """
    points = 2**bits
    mass, group, size = mu.double().unique(return_inverse=True, return_counts=True)  # [K], [V], [K]
    rate = rho * mass
    horizon = bits * math.log(2) / (1 - rho)  # the last finite y_j
    pieces = 1 + int(_arrived(rate, horizon, points).sum()) // _EVENTS
    log_s, stay, counted = torch.zeros(1, dtype=torch.float64), 0.0, torch.zeros(1, dtype=torch.float64)
    wins, done = torch.zeros_like(mass), torch.zeros_like(size)
    for end in torch.linspace(0, horizon, 1 + pieces, dtype=torch.float64)[1:]:
        # The arrivals m = done + 1 .. until of every class, sorted by their times.
        until = _arrived(rate, end, points)
        which = torch.repeat_interleave(until - done)
        start = torch.cumsum(until - done, 0) - (until - done)
        m = (torch.arange(len(which)) - start[which] + done[which] + 1).double()
        y, order = (-torch.log1p(-m / points) / rate[which]).sort()
        which, m = which[order], m[order]
        step = size[which] * torch.log1p(-1 / (points - m + 1))  # what each adds to ln S
        log_before = log_s + torch.cat([torch.zeros(1, dtype=torch.float64), step.cumsum(0)])
        earlier = torch.ceil(-torch.expm1(-(1 - rho) * y) * points) - 1  # how many y_j lie before
        now = torch.floor(-torch.expm1(-(1 - rho) * end) * points + 1e-6).clamp(max=points - 1)[None]
        stay += float((torch.cat([earlier, now]).diff(prepend=counted) * log_before.exp()).sum()) / points
        # One of this class arrives, none of any class has before, and staying comes no earlier.
        won = -torch.expm1(step) * log_before[:-1].exp() * (1 - earlier / points)
        wins.index_add_(0, which, won)
        log_s, counted, done = log_before[-1:], now, until
    tokens = wins[group] / size[group]
    tokens = tokens + (1 - stay - tokens.sum()).clamp(min=0) * mu.double()
    return torch.cat([tokens, torch.tensor([stay], dtype=torch.float64)])


def lattice_flip_probability(mu: Tensor, rho: float, bits: int) -> float:
    """Probability of being revealed where rho is intended."""
    return 1 - float(lattice_law(mu, rho, bits)[-1])


def entropy(probabilities: Tensor) -> float:
    """Nats."""
    return float(torch.special.entr(probabilities).sum())


def _arrived(rate: Tensor, y: Tensor | float, points: int) -> Tensor:
    """How many finite arrival times of each class `[K]` are not after y."""
    return torch.floor(-torch.expm1(-rate * y) * points).long().clamp(max=points - 1)
