"""ReMDM: its steps, its law against enumeration, what it costs.

Chi-square tests reject a correct sampler once in 1,000 seeds; the seeds are fixed.
"""

import math
from itertools import pairwise, product

import pytest
import torch
from torch import Tensor

from md4 import samplers
from md4.errors import UserError
from md4.samplers import Job, SamplingConfig
from md4.samplers.grids import time_grid
from md4.samplers.remasking import remasking_steps
from md4.schedules import parse_schedule
from tests.md4.oracle import Toy, chi_square
from tests.md4.samplers.company import Recorder, check_alone_and_together, counts, outcomes, transformer

ALPHA = 1e-3
COUNT = 60_000
TOY = Toy(vocabulary=3, length=4)


def config(**settings) -> SamplingConfig:
    return SamplingConfig(sampler="remdm", **settings)


def plain_steps(
    schedule: str, eps: float, times: list[float], remask: str, eta: float
) -> list[tuple[float, float, float]]:
    """Time, sigma and reveal probability of every step, by the paper's formulas in alpha; no loop."""
    alpha = parse_schedule(schedule, eps=eps).alpha
    found = []
    for t, s in pairwise(times):
        a, b = alpha(t).item(), alpha(s).item()
        largest = min(1.0, (1 - b) / a)
        sigma = min(eta, largest) if remask == "cap" else eta * largest
        found.append((t, sigma, (b - (1 - sigma) * a) / (1 - a)))
    return found


def chain(steps: list[tuple[float, float, float]], timed: bool, start: Tensor | None = None) -> Tensor:
    """Law `[X]` after steps (time, sigma, reveal probability) and one call at t = 0 that reveals the rest.

    A Markov chain over whole states, every step the product of its positions' laws.
    """
    first = torch.full((TOY.length,), TOY.mask) if start is None else start
    law = torch.zeros(len(TOY.states), dtype=torch.float64)
    law[TOY.state_index(first)] = 1.0
    masked, given = TOY.states == TOY.mask, first != TOY.mask
    own = torch.nn.functional.one_hot(TOY.states, TOY.vocabulary + 1).double()
    hidden = torch.nn.functional.one_hot(torch.tensor(TOY.mask), TOY.vocabulary + 1).double()
    for time, sigma, reveal in [*steps, (0.0, 0.0, 1.0)]:
        stay = torch.full((*masked.shape, 1), 1 - reveal, dtype=torch.float64)
        shown = torch.cat([reveal * TOY.mu(time, timed), stay], dim=2)
        kept = torch.where(given[:, None], own, (1 - sigma) * own + sigma * hidden)
        law = TOY._product_step(law, torch.where(masked[..., None], shown, kept))
    return law[TOY.state_index(TOY.sequences)]


@pytest.mark.parametrize("schedule", ["linear", "cosine", "poly2"])
@pytest.mark.parametrize("remask", ["cap", "rescale"])
def test_steps_are_those_of_the_paper_and_keep_the_masked_share(schedule, remask):
    """With the remasking sigma the share of masked tokens follows M(t), down to t = 0 without cancellation."""
    law = parse_schedule(schedule)
    for eta in (0.0, 0.3, 1.0):
        steps = remasking_steps(law, config(steps=13, remask=remask, eta=eta).resolve("md4"))
        times = time_grid("cosine", 13)
        assert torch.equal(steps.time, times)
        expected = torch.tensor(plain_steps(schedule, 1e-4, times.tolist(), remask, eta), dtype=torch.float64)
        torch.testing.assert_close(steps.sigma[:-1], expected[:, 1], atol=1e-12, rtol=1e-9)
        torch.testing.assert_close(steps.reveal[:-1], expected[:, 2], atol=1e-9, rtol=1e-9)
        assert (steps.sigma[-1], steps.reveal[-1]) == (0, 1)
        share = law.masked(1.0)
        for i in range(13):
            share = share * (1 - steps.reveal[i]) + (1 - share) * steps.sigma[i]
            torch.testing.assert_close(share, law.masked(times[i + 1]), atol=0, rtol=1e-9)


def test_the_loop_holds_alpha_where_the_paper_does():
    """t_on = 0.55 and t_off = 0.05 give alpha_on = 0.9 with the linear schedule; around it time runs twice as fast."""
    law = parse_schedule("linear", eps=1e-12)
    steps = remasking_steps(law, config(steps=20, grid="uniform", remask="loop", eta=0.2).resolve("md4"))
    clock = time_grid("uniform", 20)
    expected = [1 - 2 * (1 - c) if c > 0.56 else (0.1 if c > 0.04 else 0.0) for c in clock.tolist()]
    torch.testing.assert_close(steps.time, torch.tensor(expected, dtype=torch.float64), atol=1e-12, rtol=0)
    inside = (clock[:-1] < 0.56) & (clock[:-1] > 0.06)
    sigma = torch.where(inside, 0.1 / 0.9, 0.0).double()  # sigma_max, below eta
    torch.testing.assert_close(steps.sigma[:-1], sigma, atol=1e-7, rtol=0)
    torch.testing.assert_close(steps.reveal[:-1][inside], torch.ones(10, dtype=torch.float64), atol=1e-9, rtol=0)
    small = remasking_steps(law, config(steps=20, grid="uniform", remask="loop", eta=0.01).resolve("md4"))
    torch.testing.assert_close(small.reveal[12], torch.tensor(0.01 * 0.9 / 0.1, dtype=torch.float64))


@pytest.mark.parametrize(
    ("schedule", "eps", "steps", "remask", "eta", "timed"),
    [
        ("linear", 1e-4, 5, "cap", 0.3, False),
        ("cosine", 0.05, 6, "cap", 0.15, True),
        ("linear", 1e-4, 6, "rescale", 0.5, True),
        ("poly2", 1e-4, 4, "rescale", 1.0, False),
    ],
)
def test_follows_its_enumerated_law(schedule, eps, steps, remask, eta, timed):
    """Mutants: no remasking; half of it; sigma that the reveal probability doesn't know of."""
    settings = config(steps=steps, grid="uniform", remask=remask, eta=eta)
    found = counts(TOY, TOY.model(schedule, eps, timed), settings, COUNT)
    times = time_grid("uniform", steps).tolist()
    right = plain_steps(schedule, eps, times, remask, eta)
    none = plain_steps(schedule, eps, times, remask, 0.0)
    assert chi_square(found, chain(right, timed)) > ALPHA
    assert chi_square(found, chain(none, timed)) < ALPHA
    assert chi_square(found, chain(plain_steps(schedule, eps, times, remask, eta / 2), timed)) < ALPHA
    mixed = [(t, sigma, reveal) for (t, sigma, _), (_, _, reveal) in zip(right, none, strict=True)]
    assert chi_square(found, chain(mixed, timed)) < ALPHA


def test_the_loop_follows_its_enumerated_law():
    """Clock 1, .8, .6, .4, .2, 0 with the loop from .6 to .2: time 1, 2/3, 1/3, 1/3, 1/3, 0."""
    settings = config(steps=5, grid="uniform", remask="loop", eta=0.4, loop=(0.6, 0.2))
    found = counts(TOY, TOY.model(timed=True), settings, 2 * COUNT)
    times = [1, 2 / 3, 1 / 3, 1 / 3, 1 / 3, 0]
    plain, again = (plain_steps("linear", 1e-4, times, "cap", eta) for eta in (0.0, 0.4))
    assert chi_square(found, chain([*plain[:2], *again[2:4], *plain[4:]], True)) > ALPHA
    # Mutants: masked again in all steps; one step of the loop left out; no loop.
    assert chi_square(found, chain(again, True)) < ALPHA
    assert chi_square(found, chain([*plain[:3], again[3], *plain[4:]], True)) < ALPHA
    assert chi_square(found, chain(plain, True)) < ALPHA


def test_without_eta_it_is_ancestral_sampling():
    """For conf, loop and cap alike; leftovers at eps = 1e-4 are too few to be seen."""
    law = TOY.ancestral_law("linear", 1e-4, time_grid("uniform", 4), True)
    for remask in ("cap", "conf"):
        settings = config(steps=4, grid="uniform", eta=0.0, remask=remask)
        assert chi_square(counts(TOY, TOY.model(timed=True), settings, COUNT), law) > ALPHA
    # A loop in which nothing happens: the step from .6 to .2.
    clock = (1.0, 0.8, 0.6, 0.2, 0.1, 0.0)
    settings = config(grid=clock, eta=0.0, remask="loop", loop=(0.6, 0.2))
    found = counts(TOY, TOY.model(timed=True), settings, COUNT)
    times = torch.tensor([1.0, 2 / 3, 1 / 3, 1 / 6, 0.0], dtype=torch.float64)
    assert chi_square(found, TOY.ancestral_law("linear", 1e-4, times, True)) > ALPHA
    assert chi_square(found, TOY.ancestral_law("linear", 1e-4, torch.tensor(clock).double(), True)) < ALPHA


def test_given_tokens_are_never_masked_and_the_rest_follows_its_law():
    start = torch.tensor([TOY.mask, 1, TOY.mask, 2])
    model = TOY.model(timed=True)
    recorder = Recorder(model.network)
    model.network = recorder
    found = counts(TOY, model, config(steps=5, grid="uniform", remask="cap", eta=0.4), COUNT, start)
    times = time_grid("uniform", 5).tolist()
    assert chi_square(found, chain(plain_steps("linear", 1e-4, times, "cap", 0.4), True, start)) > ALPHA
    assert chi_square(found, chain(plain_steps("linear", 1e-4, times, "cap", 0.0), True, start)) < ALPHA
    for z in recorder.seen:
        assert (z[:, 1] == 1).all()
        assert (z[:, 3] == 2).all()


def confident_chain(toy: Toy, steps: int, eta: float, uniform: bool) -> Tensor:
    """Law `[X]` of remask=conf: states carry the probability with which each token was revealed.

    uniform: the mutant whose weights don't see these probabilities.
    """
    alpha = parse_schedule("linear").alpha
    times = time_grid("uniform", steps).tolist()
    states: dict[tuple, float] = {((toy.mask,) * toy.length, (0.0,) * toy.length): 1.0}
    for t, s in [*pairwise(times), (0.0, 0.0)]:
        a, b = alpha(t).item(), alpha(s).item()
        last = t == 0
        after: dict[tuple, float] = {}
        for (tokens, psi), chance in states.items():
            mu = toy.posterior[toy.state_index(torch.tensor(tokens))]
            shown = [i for i, v in enumerate(tokens) if v != toy.mask]
            scores = torch.tensor([1.0 if uniform else -psi[i] for i in shown]).double().softmax(0).tolist()
            sigma = eta * min(1.0, (1 - b) / a) * (not last)
            flip = [1.0 if last else (b - a) / (1 - a)] * toy.length
            for i, weight in zip(shown, scores, strict=True):
                flip[i] = sigma * weight
            for flips in product([False, True], repeat=toy.length):
                factor = chance
                for p, f in zip(flip, flips, strict=True):
                    factor *= p if f else 1 - p
                if factor == 0:
                    continue
                opened = [i for i in range(toy.length) if flips[i] and i not in shown]
                for drawn, probability in outcomes(mu, opened):
                    new, memory = list(tokens), list(psi)
                    for i in shown:
                        if flips[i]:
                            new[i], memory[i] = toy.mask, 0.0
                    for i, v in zip(opened, drawn, strict=True):
                        new[i], memory[i] = v, round(mu[i, v].item(), 12)
                    key = (tuple(new), tuple(memory))
                    after[key] = after.get(key, 0.0) + factor * probability
        states = after
    law = torch.zeros(len(toy.sequences), dtype=torch.float64)
    for (tokens, _), chance in states.items():
        law[toy.sequence_index(torch.tensor(tokens))] += chance
    return law


def test_confident_tokens_are_masked_again_more_rarely():
    """The enumerated law with remembered probabilities. Mutants: equal weights; no remasking."""
    toy = Toy(vocabulary=2, length=3)
    settings = config(steps=4, grid="uniform", remask="conf", eta=1.0)
    found = counts(toy, toy.model(), settings, 250_000)
    assert chi_square(found, confident_chain(toy, 4, 1.0, uniform=False)) > ALPHA
    assert chi_square(found, confident_chain(toy, 4, 1.0, uniform=True)) < ALPHA
    assert chi_square(found, confident_chain(toy, 4, 0.0, uniform=False)) < ALPHA


def test_steps_without_a_reveal_need_no_call():
    """Without eta as many calls as there are steps with a reveal; with it, as many as expected (4 standard errors,
    false-alarm rate 6e-5): the sum over steps of P(some masked position is revealed)."""
    job = Job(torch.full((4, 24), 27), torch.arange(4), config(steps=300, eta=0.0))
    (samples,) = samplers.run(transformer(), [job])
    assert samples.calls.tolist() == [event.unique().numel() for event in samples.event]
    assert samples.network_calls < 150

    steps, rows = 32, 5_000
    settings = config(steps=steps, grid="uniform", remask="cap", eta=0.02)
    (samples,) = samplers.run(TOY.model(), [Job(torch.full((rows, 4), 3), torch.arange(rows), settings)], rows)
    expected, law = 0.0, {0: 0.0, 1: 0.0, 2: 0.0, 3: 0.0, 4: 1.0}  # number of masked positions
    for _, sigma, reveal in plain_steps("linear", 1e-4, time_grid("uniform", steps).tolist(), "cap", 0.02):
        expected += sum(p * (1 - (1 - reveal) ** m) for m, p in law.items())
        after = dict.fromkeys(law, 0.0)
        for m, p in law.items():
            for opened, shut in product(range(m + 1), range(4 - m + 1)):
                chance = math.comb(m, opened) * reveal**opened * (1 - reveal) ** (m - opened)
                chance *= math.comb(4 - m, shut) * sigma**shut * (1 - sigma) ** (4 - m - shut)
                after[m - opened + shut] += p * chance
        law = after
    expected += 1 - law[0]
    calls = samples.calls.double()
    assert abs(calls.mean().item() - expected) < 4 * calls.std().item() / rows**0.5
    assert expected < 0.6 * steps
    assert (samples.row_draws >= 4).all()
    assert samples.row_draws.double().mean() > 4.1


SETTINGS = [
    {"sampler": "remdm", "steps": 12},
    {"sampler": "remdm", "steps": 30, "grid": "uniform", "remask": "rescale", "eta": 0.3},
    {"sampler": "remdm", "steps": 9, "remask": "conf", "eta": 1.0},
    {"sampler": "remdm", "steps": 40, "remask": "loop", "eta": 0.1},
    {"sampler": "remdm", "grid": (1.0, 0.8, 0.5, 0.2, 0.0), "eta": 0.5},
    {"sampler": "first_hitting", "steps": 5},
]


def test_a_row_gets_the_tokens_it_gets_alone():
    check_alone_and_together(transformer(), SETTINGS, count=12)


def test_tokens_change():
    """Some of what the network saw as a token is another one in the end, and some positions were masked again."""
    model = transformer()
    model.network = recorder = Recorder(model.network)
    settings = config(steps=40, remask="rescale", eta=0.5)
    (samples,) = samplers.run(model, [Job(torch.full((4, 24), 27), torch.arange(4), settings)])
    full = [z for z in recorder.seen if len(z) == 4]
    assert any(((z != 27) & (z != samples.tokens)).any() for z in full[:-1])
    assert any(((a != 27) & (b == 27)).any() for a, b in pairwise(full))
    assert samples.row_draws.min() > 24


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"eta": 1.5}, r"eta=1.5 of remdm .* \[0, 1\]"),
        ({"remask": "loop", "loop": (1.0, 0.0)}, "leaves no time"),
        ({"remask": "loop", "loop": (0.2, 0.5)}, "an earlier one"),
        ({"loop": (0.5, 0.2)}, "about remask=loop alone"),
    ],
)
def test_mistakes_are_named(wrong, message):
    with pytest.raises(UserError, match=message):
        config(**wrong).resolve("md4")
    with pytest.raises(UserError, match="not for models of objective genmd4"):
        config().resolve("genmd4")
