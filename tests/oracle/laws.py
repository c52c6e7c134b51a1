"""Laws of samplers in continuous time, computed: enumerated over orders, integrated over times.

None shares a line with the samplers. Shapes as in `tests.md4.oracle`: S states, X sequences, L positions, V tokens.
"""

import math
from collections.abc import Callable, Sequence
from itertools import permutations

import torch
from torch import Tensor

from md4.schedules import parse_schedule
from tests.md4.oracle import Toy


def continuous_law(
    toy: Toy,
    schedule: str,
    eps: float,
    prediction: Callable[[float], Tensor],
    start: Tensor | None = None,
    cells: int = 64,
) -> Tensor:
    """Law `[X]` of tokens that are revealed at iid times, each by the `prediction(t)` [S, L, V] at its time.

    Let U = M(t) / M(1), the share of the positions still masked at t. With P_z(t) the probability of state z, of n
    masked positions, Q_z = P_z / U^n obeys

        -dQ_z / dU = sum over visible p of Q_(z without p) mu_p[z_p](z without p, t)

    which has no singularity: positions are revealed at rate 1 / U, and the loss of a state cancels. Integrated by
    fourth-order Runge-Kutta over t, from 1 down to 0; then over what is left of U at t = 0. The schedule is to be
    smooth in t. start: `[L]`, what is known.
    """
    states, base = torch.arange(len(toy.states)), toy.vocabulary + 1
    source, position = (toy.states == toy.mask).nonzero(as_tuple=True)
    digit = base ** (toy.length - 1 - position)
    target = states[source, None] + (torch.arange(toy.vocabulary) - toy.mask) * digit[:, None]  # [masked, V]
    curve = parse_schedule(schedule, eps=eps)
    whole = curve.masked(1.0).item()

    def flow(law: Tensor, mu: Tensor) -> Tensor:
        moved = law[source, None] * mu[source, position]
        return torch.zeros_like(law).index_add_(0, target.flatten(), moved.flatten())

    def step(law: Tensor, width: float, rates: Sequence[float], mus: Sequence[Tensor]) -> Tensor:
        first = rates[0] * flow(law, mus[0])
        second = rates[1] * flow(law + width / 2 * first, mus[1])
        third = rates[1] * flow(law + width / 2 * second, mus[1])
        fourth = rates[2] * flow(law + width * third, mus[2])
        return law + width / 6 * (first + 2 * second + 2 * third + fourth)

    law = torch.zeros(len(states), dtype=torch.float64)
    law[toy.state_index(torch.full((toy.length,), toy.mask) if start is None else start)] = 1
    for cell in range(cells):
        times = [1 - cell / cells, 1 - (cell + 0.5) / cells, 1 - (cell + 1) / cells]
        rates = [-curve.dalpha(t).item() / whole for t in times]
        law = step(law, 1 / cells, rates, [prediction(t) for t in times])
    left, late = curve.masked(0.0).item() / whole, prediction(0.0)
    for _ in range(cells):
        law = step(law, left / cells, [1.0] * 3, [late] * 3)
    return law[toy.state_index(toy.sequences)]


def conditional(toy: Toy, start: Tensor) -> Tensor:
    """The toy's law `[X]` given the tokens known in `start` [L]."""
    fits = ((toy.sequences == start) | (start == toy.mask)).all(dim=1)
    law = torch.where(fits, toy.law, 0.0)
    return law / law.sum()


def _after(toy: Toy, positions: Sequence[int]) -> Tensor:
    """What the network predicts, `[X, L, V]`, when it sees the tokens of each sequence at these positions."""
    z = torch.full_like(toy.sequences, toy.mask)
    z[:, list(positions)] = toy.sequences[:, list(positions)]
    return toy.posterior[toy.state_index(z)]


def parallel_law(toy: Toy, sizes: Sequence[int]) -> Tensor:
    """Law `[X]` when `sizes` tokens, at random places, are drawn from one time-free prediction after another."""
    law = torch.zeros(len(toy.sequences), dtype=torch.float64)
    orders = list(permutations(range(toy.length)))
    rows = torch.arange(len(law))
    for order in orders:
        product, done = torch.ones_like(law), 0
        for size in sizes:
            mu = _after(toy, order[:done])
            for position in order[done : done + size]:
                product = product * mu[rows, position, toy.sequences[:, position]]
            done += size
        law += product / len(orders)
    return law


def _midpoints(cells: int) -> Tensor:
    """Of equal cells of [0, 1], `[cells]`."""
    return (torch.arange(cells, dtype=torch.float64) + 0.5) / cells


def extrapolated_law(toy: Toy) -> Tensor:
    """Law `[X]` of 4 tokens in 2 extrapolated calls with a time-free network, the schedule being linear with eps = 0.

    The times are the order statistics of 4 uniforms, so gaps between them are as of iid exponentials. Nothing is
    extrapolated in the first call nor at the first reveal of the second; at its second, with the predictions P after
    two tokens and P' before any,

        max(0, (1 + r) P - r P'), normalised,    r = min(g_3 / (g_1 + g_2), 1),    P(r > x) = (1 + x)^-2 for x < 1
    """
    x, rows = toy.sequences, torch.arange(len(toy.sequences))
    quantiles = _midpoints(256)
    ratios = torch.cat([(1 - 0.75 * quantiles) ** -0.5 - 1, torch.ones(1)])  # three quarters lie below 1
    weights = torch.cat([torch.full((256,), 0.75 / 256), torch.tensor([0.25])]).double()
    law, before = torch.zeros(len(x), dtype=torch.float64), _after(toy, ())
    for a, b, c, d in permutations(range(4)):
        seen = _after(toy, (a, b))
        early = before[rows, a, x[:, a]] * before[rows, b, x[:, b]] * seen[rows, c, x[:, c]]
        r = ratios[:, None, None]
        mixed = ((1 + r) * seen[:, d] - r * before[:, d]).clamp(min=0)  # [ratios, X, V]
        late = (mixed / mixed.sum(dim=2, keepdim=True))[:, rows, x[:, d]]
        law += early * (weights[:, None] * late).sum(dim=0) / 24
    return law


def corrected_law(toy: Toy) -> Tensor:
    """Law `[X]` of 4 tokens in 2 calls, the first two corrected; V = 2, a time-free network, linear with eps = 0.

    The very first token stays (l = 0). The second is drawn again, with the same exponentials, from a mixture Q of its
    prediction P and of the one beside the first token, in parts 1 - l and l; l is uniform on (0, 1). The same token i
    wins both races with probability 1 / sum_v max(P_v / P_i, Q_v / Q_i). The last two tokens have seen the old one.
    """
    assert toy.vocabulary == 2
    assert toy.length == 4
    x, rows = toy.sequences, torch.arange(len(toy.sequences))
    before, law = _after(toy, ()), torch.zeros(len(toy.sequences), dtype=torch.float64)
    parts = _midpoints(64)
    flip = [toy.sequence_index(torch.where(torch.arange(4) == b, 1 - x, x)) for b in range(4)]
    for a, b in permutations(range(4), 2):
        c, d = (p for p in range(4) if p not in (a, b))
        seen = _after(toy, (a, b))
        pair = seen[rows, c, x[:, c]] * seen[rows, d, x[:, d]]  # given the first two tokens as in x
        p, beside = before[:, b], _after(toy, (a,))[:, b]  # [X, V]
        for part in parts:
            q = (1 - part) * p + part * beside
            own, other = x[:, b], 1 - x[:, b]

            def both(i: Tensor, p: Tensor = p, q: Tensor = q) -> Tensor:
                """Probability `[X]` that i wins with P and with Q."""
                return 1 / torch.maximum(p / p[rows, i, None], q / q[rows, i, None]).sum(dim=1)

            kept, gained = both(own), q[rows, own] - both(own)
            assert torch.allclose(gained, p[rows, other] - both(other))
            law += before[rows, a, x[:, a]] * (kept * pair + gained * pair[flip[b]]) / (12 * len(parts))
    return law


def window_law(toy: Toy, length: int) -> Tensor:
    """Law `[V^length]` of a text written from left to right by a network that sees two tokens at once, `toy`'s law."""
    first = toy.law.view(toy.vocabulary, toy.vocabulary)
    step, law = first / first.sum(dim=1, keepdim=True), first.sum(dim=1)
    for _ in range(length - 1):
        law = (law.view(-1, toy.vocabulary, 1) * step).flatten()
    return law


def tempered(logits: Sequence[float], temperature: float = 1.0, top_k: int | None = None, top_p: float = 1.0) -> Tensor:
    """The law `[V]` of one token: temperature, then the most probable ones; written out for a handful without ties."""
    weights = [math.exp(logit / temperature) for logit in logits]
    ranked = sorted(range(len(weights)), key=lambda v: -weights[v])[:top_k]
    whole, held, kept = sum(weights[v] for v in ranked), 0.0, []
    for token in ranked:
        kept.append(token)
        held += weights[token] / whole
        if held >= top_p - 1e-12:
            break
    law = [weights[v] if v in kept else 0.0 for v in range(len(weights))]
    return torch.tensor(law, dtype=torch.float64) / sum(law)
