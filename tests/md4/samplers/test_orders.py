"""Orders that the network decides: their laws against enumeration, their calls, their blocks, and long texts.

The chi-square tests reject a correct sampler once in 1,000 seeds; the seeds are fixed.
"""

import math
from collections.abc import Callable
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from md4 import noise, samplers
from md4.objectives import MD4
from md4.samplers import Job, SamplingConfig
from md4.samplers.orders import due_calls, rounded
from tests.md4.oracle import Toy, chi_square
from tests.md4.samplers.company import Recorder, check_alone_and_together, counts, outcomes, transformer

ALPHA = 1e-3
COUNT = 30_000
TOY = Toy(vocabulary=3, length=4)
ORDERS = ("confidence", "margin", "entropy")


def certainty(sampler: str, mu: Tensor) -> list[float]:
    """How sure mu `[L, V]` is of each position, written down plainly."""
    result = []
    for row in mu.tolist():
        top = sorted(row, reverse=True)
        entropy = -sum(p * math.log(p) for p in row if p > 0)
        result.append({"confidence": top[0], "margin": top[0] - top[1], "entropy": -entropy}[sampler])
    return result


def enumerated(temperature: float, timed: bool, choose: Callable[[list[int], Tensor, int], list[int]]) -> Tensor:
    """Law `[X]` of the chain that reveals the positions choose(masked ones, mu [L, V], call) independently.

    The network is shown the time at which the masked share is that of the row, with the linear schedule.
    """
    law = {tuple([TOY.mask] * TOY.length): 1.0}
    for call in range(TOY.length):
        after: dict[tuple[int, ...], float] = {}
        for state, chance in law.items():
            masked = [i for i, token in enumerate(state) if token == TOY.mask]
            time = max(0.0, len(masked) / TOY.length - 1e-4) / (1 - 2e-4)
            mu = TOY.mu(min(time, 1.0), timed)[TOY.state_index(torch.tensor(state))]
            mu = (mu.log() / temperature).softmax(dim=1)
            chosen = choose(masked, mu, call) if masked else []
            for tokens, factor in outcomes(mu, chosen):
                full = list(state)
                for position, token in zip(chosen, tokens, strict=True):
                    full[position] = token
                after[tuple(full)] = after.get(tuple(full), 0.0) + chance * factor
        law = after
    return torch.tensor([law.get(tuple(x), 0.0) for x in TOY.sequences.tolist()], dtype=torch.float64)


def best(sampler: str, calls: int, sign: int = 1) -> Callable[[list[int], Tensor, int], list[int]]:
    """The surest positions first, in so many calls; with sign -1 the least sure ones."""

    def choose(masked: list[int], mu: Tensor, call: int) -> list[int]:
        number = math.ceil(len(masked) / (calls - call))
        sure = certainty(sampler, mu)
        return sorted(masked, key=lambda i: -sign * sure[i])[:number]

    return choose


@pytest.mark.parametrize(
    ("sampler", "steps", "temperature", "timed"),
    [
        ("confidence", None, 0.7, False),
        ("confidence", 2, 1.0, True),
        ("margin", None, 1.3, True),
        ("margin", 3, 1.0, False),
    ],
)
def test_follows_its_enumerated_law(sampler, steps, temperature, timed):
    """Mutants: the least certain first; the model's own law; another temperature."""
    settings = SamplingConfig(sampler=sampler, steps=steps, temperature=temperature)
    found = counts(TOY, TOY.model(timed=timed), settings, COUNT)
    calls = steps or TOY.length
    assert chi_square(found, enumerated(temperature, timed, best(sampler, calls))) > ALPHA
    assert chi_square(found, enumerated(temperature, timed, best(sampler, calls, -1))) < ALPHA
    assert chi_square(found, enumerated(1.1 * temperature, timed, best(sampler, calls))) < ALPHA
    assert chi_square(found, TOY.law) < ALPHA
    if timed:
        assert chi_square(found, enumerated(temperature, False, best(sampler, calls))) < ALPHA


def entropy_bounded(bound: float) -> Callable[[list[int], Tensor, int], list[int]]:
    def choose(masked: list[int], mu: Tensor, call: int) -> list[int]:
        entropy = [-h for h in certainty("entropy", mu)]
        order = sorted(masked, key=lambda i: entropy[i])
        fits = [n for n in range(1, len(order) + 1) if sum(entropy[i] for i in order[: n - 1]) <= bound]
        return order[: max(fits)]

    return choose


@pytest.mark.parametrize("bound", [0.4, 1.2])
def test_entropy_follows_its_enumerated_law(bound):
    """Mutants: the sum of all entropies bounded, without the largest one left out; half the bound."""
    found = counts(TOY, TOY.model(), SamplingConfig(sampler="entropy", entropy_bound=bound), COUNT)

    def strict(masked: list[int], mu: Tensor, call: int) -> list[int]:
        entropy = [-h for h in certainty("entropy", mu)]
        order = sorted(masked, key=lambda i: entropy[i])
        fits = [n for n in range(1, len(order) + 1) if sum(entropy[i] for i in order[:n]) <= bound]
        return order[: max(fits, default=1)]

    assert chi_square(found, enumerated(1.0, False, entropy_bounded(bound))) > ALPHA
    assert chi_square(found, enumerated(1.0, False, strict)) < ALPHA
    assert chi_square(found, enumerated(1.0, False, entropy_bounded(bound / 2))) < ALPHA


def states_of_calls(samples: samplers.Samples, mask: int) -> list[tuple[int, Tensor, Tensor]]:
    """Row, state `[T]` and revealed positions `[T]` of every network call, read off the events."""
    found = []
    for row, (tokens, event) in enumerate(zip(samples.tokens, samples.event, strict=True)):
        for call in range(int(event.max()) + 1):
            found.append((row, torch.where(event < call, tokens, mask), event == call))
    return found


@pytest.mark.parametrize("bound", [0.0, 0.8, 1e9])
def test_the_entropy_bound_holds_in_every_call_and_is_used_up(bound):
    """What a call reveals has the least entropies, keeps the bound, and one position more would break it."""
    model = transformer(time_input=False)
    settings = SamplingConfig(sampler="entropy", entropy_bound=bound, temperature=0.6, top_k=4)
    (samples,) = samplers.run(model, [Job(torch.full((2, 24), 27), torch.arange(2), settings)])
    if bound in (0.0, 1e9):
        assert samples.calls.tolist() == [24 if bound == 0 else 1] * 2
    for _, state, revealed in states_of_calls(samples, 27):
        logits = model.logits(state[None].expand(4, -1), 0.5)[0].double() / 0.6
        entropy = torch.distributions.Categorical(logits=logits).entropy()
        inside, rest = entropy[revealed], entropy[(state == 27) & ~revealed]
        assert len(inside) >= 1
        assert inside.sum() - inside.max() <= bound + 1e-6
        if len(rest):
            assert rest.min() >= inside.max() - 1e-6
            assert inside.sum() > bound - 1e-6


@pytest.mark.parametrize("sampler", ["confidence", "margin"])
@pytest.mark.parametrize("steps", [None, 1, 4, 7, 24, 99])
def test_network_calls_are_the_steps(sampler, steps):
    """Shared out evenly: the numbers of tokens differ by one at most; a row with less to do makes fewer calls."""
    canvas = torch.full((4, 24), 27)
    canvas[3, 5:] = 1
    settings = SamplingConfig(sampler=sampler, steps=steps)
    (samples,) = samplers.run(transformer(), [Job(canvas, torch.arange(4), settings)])
    wanted = [min(steps or 24, 24)] * 3 + [min(steps or 24, 5)]
    assert samples.calls.tolist() == wanted
    assert samples.row_draws.tolist() == [24, 24, 24, 5]
    for row in range(4):
        sizes = samples.event[row][samples.event[row] >= 0].bincount()
        assert len(sizes) == wanted[row]
        assert sizes.max() - sizes.min() <= 1


@pytest.mark.parametrize("sampler", ORDERS)
def test_least_and_most_reveals(sampler):
    own = {"entropy_bound": 0.3} if sampler == "entropy" else {"steps": 9}
    for least, most in [(4, None), (None, 2), (3, 5)]:
        settings = SamplingConfig(sampler=sampler, min_reveals=least, max_reveals=most, **own)
        (samples,) = samplers.run(transformer(), [Job(torch.full((5, 24), 27), torch.arange(5), settings)])
        for event in samples.event:
            sizes = event.bincount().tolist()
            assert max(sizes) <= (most or 24)
            assert min(sizes[:-1]) >= (least or 1)


def test_calls_are_shared_out_over_blocks_by_their_size():
    """Exactly `steps` calls unless there are fewer tokens or more blocks; each block at most one call from its share
    (or as many as it needs at least)."""
    length, count = 24, 60
    unknown = noise.uniform(3, torch.arange(count * length)).view(count, length) < 0.6
    for size in (1, 5, 8, 24):
        block = torch.arange(length).expand(count, -1) // size
        for steps in (None, 1, 4, 7, 24):
            due = due_calls(unknown, block, steps)
            for row in range(count):
                number = torch.bincount(block[row], weights=unknown[row].double()).long().tolist()
                total, blocks = sum(number), sum(n > 0 for n in number)
                calls = min(total, steps or total)
                ends = [int(due[row][block[row] == k][0]) for k in range(len(number))]
                shares = [b - a for a, b in zip([0, *ends[:-1]], ends, strict=True)]
                assert sum(shares) == max(calls, blocks)
                assert all((share > 0) == (n > 0) for share, n in zip(shares, number, strict=True))
                assert all(share <= n for share, n in zip(shares, number, strict=True))
                if calls >= 2 * blocks:
                    assert all(abs(s - calls * n / total) < 2 for s, n in zip(shares, number, strict=True))
    assert due_calls(torch.ones(1, 12, dtype=torch.bool), torch.arange(12)[None] // 4, 6).tolist() == [
        [2] * 4 + [4] * 4 + [6] * 4
    ]


@pytest.mark.parametrize("sampler", ORDERS)
def test_blocks_run_from_left_to_right(sampler):
    own = {"entropy_bound": 1.0} if sampler == "entropy" else {"steps": 9}
    settings = SamplingConfig(sampler=sampler, block=8, **own)
    (samples,) = samplers.run(transformer(), [Job(torch.full((5, 24), 27), torch.arange(5), settings)])
    events = samples.event.view(5, 3, 8)
    assert (events[:, 1:].amin(2) > events[:, :-1].amax(2)).all()
    if sampler != "entropy":
        assert samples.calls.tolist() == [9] * 5
        assert events.amax(2).tolist() == [[2, 5, 8]] * 5
    within = [row.argsort().tolist() for row in events[:, 0]]
    assert any(order != sorted(order) for order in within)


SETTINGS = [
    {"sampler": "confidence"},
    {"sampler": "margin", "steps": 6},
    {"sampler": "entropy", "entropy_bound": 0.7},
    {"sampler": "confidence", "steps": 5, "block": 7},
    {"sampler": "margin", "min_reveals": 2, "max_reveals": 3},
    {"sampler": "entropy", "entropy_bound": 2.5, "max_reveals": 4, "block": 9},
    {"sampler": "confidence", "steps": 3, "max_reveals": 5},
    {"sampler": "entropy"},
]


@pytest.mark.parametrize(("objective", "count"), [("md4", 12), ("genmd4", 8)])
def test_a_row_gets_the_tokens_it_gets_alone(objective, count):
    check_alone_and_together(transformer(objective), SETTINGS, count)


def test_parts_looked_at_apart_change_nothing(monkeypatch):
    jobs = [Job(torch.full((3, 24), 27), torch.arange(3), SamplingConfig(**own)) for own in SETTINGS]
    whole = samplers.run(transformer(), jobs)
    monkeypatch.setattr("md4.samplers.batch._CHUNK", 27 * 8)
    for one, other in zip(whole, samplers.run(transformer(), jobs), strict=True):
        assert torch.equal(one.tokens, other.tokens)
        assert torch.equal(one.event, other.event)
        assert torch.equal(one.row_draws, other.row_draws)


class _Alike(torch.nn.Module):
    """The same prediction everywhere."""

    def forward(self, z: Tensor, t: Tensor, labels: Tensor | None = None) -> Tensor:
        return torch.tensor([0.1, 0.7, 0.3, -0.2]).expand(*z.shape, 4).clone()


@pytest.mark.parametrize("sampler", ORDERS)
def test_equally_certain_positions_follow_each_other_from_left_to_right(sampler):
    model = MD4(_Alike(), TOY.model().schedule, 4)
    for length in (5, 16, 37):
        job = Job(torch.full((3, length), 4), torch.arange(3), SamplingConfig(sampler=sampler))
        (samples,) = samplers.run(model, [job])
        assert torch.equal(samples.event, torch.arange(length).expand(3, -1))


def test_rounding_is_finer_than_any_score_that_matters():
    score = torch.tensor([0.1, -3.7, 1 - 1e-9, -0.0, torch.inf, -torch.inf], dtype=torch.float64)
    assert torch.allclose(rounded(score), score, atol=2.0**-33, rtol=0)
    assert len(rounded(torch.tensor([0.3, 0.3 + 1e-15, 0.3 - 1e-15], dtype=torch.float64)).unique()) == 1
    parts = rounded(noise.uniform(1, torch.arange(1000)))
    assert parts.sum() == parts.flip(0).cumsum(0)[-1] == parts[::3].sum() + parts[1::3].sum() + parts[2::3].sum()


@pytest.mark.parametrize(
    "own",
    [
        {"sampler": "ancestral", "steps": 20},
        {"sampler": "first_hitting", "steps": 15},
        {"sampler": "confidence"},
        {"sampler": "margin", "steps": 11},
        {"sampler": "entropy", "entropy_bound": 1.0},
    ],
)
def test_long_texts_are_written_in_blocks_through_the_networks_window(own):
    """40 tokens by a network that sees 16, some of them given, in blocks of 8."""
    model = transformer()
    model.network = recorder = Recorder(model.network)
    canvas = torch.full((3, 40), 27)
    canvas[1, 4:7] = torch.tensor([3, 1, 4])
    canvas[2, :20] = torch.arange(20)
    (samples,) = samplers.run(model, [Job(canvas, torch.arange(3), SamplingConfig(**own, block=8), window=16)])
    assert {z.shape[1] for z in recorder.seen} == {16}
    assert {float(t.max()) <= 1 and float(t.min()) >= 0 for t in recorder.times} == {True}
    assert (samples.tokens < 27).all()
    known = canvas != 27
    assert torch.equal(samples.tokens[known], canvas[known])
    for event in samples.event:
        blocks = [part[part >= 0] for part in event.view(5, 8)]
        blocks = [part for part in blocks if len(part)]
        assert all(a.max() < b.min() for a, b in pairwise(blocks))
    assert len(recorder.seen) == samples.network_calls
