"""P2: its law against enumeration, what it masks again, what it costs.

Chi-square tests reject a correct sampler once in 1,000 seeds; the seeds are fixed.
"""

import math
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from md4 import samplers
from md4.samplers import Job, SamplingConfig
from tests.md4.oracle import Toy, chi_square
from tests.md4.samplers.company import (
    Recorder,
    check_alone_and_together,
    counts,
    leave_one_out,
    outcomes,
    transformer,
)

ALPHA = 1e-3
COUNT = 30_000
TOY = Toy(vocabulary=3, length=4)


def config(**settings) -> SamplingConfig:
    return SamplingConfig(sampler="p2", **settings)


def enumerated(table: Tensor, steps: int, eta: float, temperature: float = 1.0, start: tuple = (3, 3, 3, 3)) -> Tensor:
    """Law `[X]` of P2 with predictions `table` [S, L, V], every draw of candidates followed by itself."""
    table = (table.log() / temperature).softmax(dim=2)
    unknown = [i for i, token in enumerate(start) if token == TOY.mask]
    law = {start: 1.0}
    for step in range(1, steps + 1):
        keep = math.floor(len(unknown) * step / steps + 1e-9)
        after: dict[tuple, float] = {}
        for state, chance in law.items():
            mu = table[TOY.state_index(torch.tensor(state))]
            masked = [i for i in unknown if state[i] == TOY.mask]
            for drawn, factor in outcomes(mu, masked):
                token = dict(zip(masked, drawn, strict=True))
                key = {i: (-math.log(mu[i, token[i]]), 1, i) for i in masked}
                for i in unknown:
                    if i not in token:
                        token[i] = state[i]
                        key[i] = (-eta * math.log(mu[i, state[i]]), 0, i)
                kept = sorted(unknown, key=lambda i: key[i])[:keep]
                new = list(state)
                for i in unknown:
                    new[i] = token[i] if i in kept else TOY.mask
                after[tuple(new)] = after.get(tuple(new), 0.0) + chance * factor
        law = after
    return torch.tensor([law.get(tuple(x), 0.0) for x in TOY.sequences.tolist()], dtype=torch.float64)


@pytest.mark.parametrize(
    ("steps", "eta", "temperature"), [(4, 0.0, 1.0), (4, 1.0, 1.0), (6, 2.0, 0.8), (3, 2.0, 1.3), (1, 1.0, 1.0)]
)
def test_follows_its_enumerated_law(steps, eta, temperature):
    """A network that predicts visible positions too. Mutants: another eta; one step less; the model's own law."""
    model, table = leave_one_out(TOY)
    found = counts(TOY, model, config(steps=steps, eta=eta, temperature=temperature), COUNT)
    assert chi_square(found, enumerated(table, steps, eta, temperature)) > ALPHA
    if steps > 1:
        assert chi_square(found, enumerated(table, steps, 0.0 if eta else 1.0, temperature)) < ALPHA
        assert chi_square(found, enumerated(table, steps - 1, eta, temperature)) < ALPHA
    assert chi_square(found, TOY.law) < ALPHA


def test_infilling_follows_its_enumerated_law():
    """Two given tokens: shares are those of the unknown positions; the given ones have no score."""
    model, table = leave_one_out(TOY)
    start = (3, 1, 3, 2)
    found = counts(TOY, model, config(steps=4, eta=1.0), COUNT, torch.tensor(start))
    law = enumerated(table, 4, 1.0, start=start)
    assert law[(TOY.sequences[:, 1] != 1) | (TOY.sequences[:, 3] != 2)].sum() == 0
    assert chi_square(found, law) > ALPHA
    assert chi_square(found, enumerated(table, 1, 1.0, start=start)) < ALPHA


@pytest.mark.parametrize("eta", [0.0, 1.0, 5.0])
def test_revealed_tokens_change_with_eta_alone(eta):
    """What the network is shown, call by call: with eta = 0 a token stands, with more of it more are masked again."""
    model = transformer()
    model.network = recorder = Recorder(model.network)
    canvas = torch.full((4, 24), 27)
    canvas[:, 10:14] = torch.tensor([3, 1, 4, 1])
    (samples,) = samplers.run(model, [Job(canvas, torch.arange(4), config(steps=20, eta=eta))])
    states = [*recorder.seen, samples.tokens]
    again = sum(int(((a != 27) & (b == 27)).sum()) for a, b in pairwise(states))
    assert all(((a == 27) | (b == 27) | (a == b)).all() for a, b in pairwise(states))
    assert all((z[:, 10:14] == canvas[:, 10:14]).all() for z in states)
    assert [(z != 27).sum(dim=1).tolist() for z in states] == [[4 + i] * 4 for i in range(21)]
    assert (again == 0) if eta == 0 else (again > 20)
    assert samples.row_draws.tolist() == [sum(20 - i for i in range(20))] * 4


def test_network_calls_are_the_steps():
    """At most: of 10 steps for 4 tokens the first 2 keep nothing (10 // 4 = 2 steps before the first token)."""
    canvas = torch.full((3, 24), 27)
    canvas[1, 4:] = 1
    canvas[2] = 1
    for steps, calls in [(1, [1, 1, 0]), (4, [4, 4, 0]), (10, [10, 8, 0]), (24, [24, 19, 0]), (50, [48, 38, 0])]:
        (samples,) = samplers.run(transformer(), [Job(canvas, torch.arange(3), config(steps=steps))])
        assert samples.calls.tolist() == calls
        assert (samples.tokens < 27).all()


def test_the_network_is_shown_the_masked_share():
    model = transformer()
    model.network = recorder = Recorder(model.network)
    samplers.run(model, [Job(torch.full((4, 24), 27), torch.arange(4), config(steps=8))])
    times = torch.stack([t[0] for t in recorder.times])
    torch.testing.assert_close(times, 1 - torch.arange(8) / 8, atol=2e-4, rtol=0)


SETTINGS = [
    {"sampler": "p2", "steps": 12},
    {"sampler": "p2", "steps": 5, "eta": 0.0},
    {"sampler": "p2", "steps": 40, "eta": 3.0},
    {"sampler": "confidence", "steps": 5},
]


@pytest.mark.parametrize("objective", ["md4", "genmd4"])
def test_a_row_gets_the_tokens_it_gets_alone(objective):
    check_alone_and_together(transformer(objective), SETTINGS, count=8)
