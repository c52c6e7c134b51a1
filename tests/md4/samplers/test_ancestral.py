"""The plan: when positions are revealed. Statistical tests state their false-alarm rates; seeds are fixed."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from md4 import noise
from md4.samplers import SamplingConfig
from md4.samplers.ancestral import ancestral_plan, reveal_probability
from md4.samplers.grids import time_grid
from md4.samplers.rows import KNOWN
from md4.schedules import parse_schedule
from tests.md4.oracle import chi_square


def resolved(**settings) -> SamplingConfig:
    return SamplingConfig(**settings).resolve("md4")


def row_keys(count: int, seed: int = 0) -> torch.Tensor:
    return noise.derive(torch.arange(seed, seed + count), "sample")


@pytest.mark.parametrize("schedule", ["linear", "cosine", "poly0.5", "poly2"])
def test_reveal_probability(schedule):
    """Against alpha in float64, away from the ends where the plain formula cancels; at the end the leftovers show."""
    schedule = parse_schedule(schedule)
    t = torch.linspace(0.1, 1.0, 19, dtype=torch.float64)
    s = t - 0.07
    expected = (schedule.alpha(s) - schedule.alpha(t)) / (1 - schedule.alpha(t))
    torch.testing.assert_close(reveal_probability(schedule, t, s), expected, atol=1e-12, rtol=0)
    last = reveal_probability(schedule, 1e-3, 0.0)
    torch.testing.assert_close(1 - last, 1e-4 / schedule.masked(1e-3), atol=1e-12, rtol=0)


@pytest.mark.parametrize("grid", ["uniform", "cosine"])
@pytest.mark.parametrize("schedule", ["linear", "cosine", "poly2"])
def test_flip_counts(schedule, grid):
    """Reveals of each step among the still masked: every step's count against its rho, p > 1e-4 each (48 steps in all:
    false-alarm rate 5e-3 together). The mutant leaves out the division by 1 - alpha(t)."""
    steps, rows, length = 8, 2000, 50
    law = parse_schedule(schedule, eps=0.01)
    plan, _ = ancestral_plan(
        law, torch.ones(rows, length, dtype=torch.bool), row_keys(rows), resolved(steps=steps, grid=grid)
    )
    times = time_grid(grid, steps)
    rho = reveal_probability(law, times[:-1], times[1:])
    undivided = law.masked(times[:-1]) - law.masked(times[1:])
    wrong = 0
    for step in range(steps):
        at_risk = int((plan.event >= step).sum())
        revealed = int((plan.event == step).sum())
        counts = torch.tensor([revealed, at_risk - revealed])
        assert chi_square(counts, torch.stack([rho[step], 1 - rho[step]])) > 1e-4
        wrong += chi_square(counts, torch.stack([undivided[step], 1 - undivided[step]])) < 1e-4
    assert wrong >= steps // 2


def test_leftovers_are_eps_and_come_one_at_a_time():
    """With eps = 0.05 a token in 19 is left at t = 0 (chi-square, false-alarm rate 1e-3)."""
    law = parse_schedule("linear", eps=0.05)
    rows, length, steps = 1000, 40, 5
    unknown = torch.ones(rows, length, dtype=torch.bool)
    plan, _ = ancestral_plan(law, unknown, row_keys(rows), resolved(steps=steps))
    left = plan.event >= steps
    share = 0.05 / 0.95
    assert chi_square(torch.tensor([int(left.sum()), int((~left).sum())]), torch.tensor([share, 1 - share])) > 1e-3
    assert (plan.time[left] == 0).all()
    for row in range(rows):
        events = plan.event[row][left[row]].sort().values
        assert torch.equal(events, torch.arange(steps, steps + len(events)))
    at_once, _ = ancestral_plan(law, unknown, row_keys(rows), resolved(steps=steps, leftovers="argmax"))
    assert torch.equal(at_once.event.clamp(max=steps), plan.event.clamp(max=steps))
    assert at_once.event.max() == steps


@settings(max_examples=50, deadline=None)
@given(
    seed=st.integers(0, 2**53),
    steps=st.integers(1, 40),
    grid=st.sampled_from(["uniform", "cosine"]),
    schedule=st.sampled_from(["linear", "cosine", "poly0.5", "poly3"]),
    known=st.sets(st.integers(0, 19)),
    eps=st.sampled_from([1e-4, 0.2]),
)
def test_a_plan_is_the_rows_own(seed, steps, grid, schedule, known, eps):
    """Times fall as events rise and are those of the grid; known positions have no event; company changes nothing."""
    law, config = parse_schedule(schedule, eps=eps), resolved(steps=steps, grid=grid)
    unknown = torch.ones(3, 20, dtype=torch.bool)
    unknown[1, list(known)] = False
    plan, _ = ancestral_plan(law, unknown, row_keys(3, seed), config)
    assert ((plan.event == KNOWN) == ~unknown).all()
    times = torch.cat([time_grid(grid, steps)[:-1], torch.zeros(1, dtype=torch.float64)])
    hidden = plan.event[unknown]
    assert torch.equal(plan.time[unknown], times[hidden.clamp(max=steps)])
    alone, _ = ancestral_plan(law, unknown[1:2], row_keys(3, seed)[1:2], config)
    assert torch.equal(alone.event[0], plan.event[1])


def test_finer_grids_reveal_in_the_same_order():
    """One uniform stands for a position's whole series of coins, so only ties within a step differ between grids."""
    law, unknown = parse_schedule("linear"), torch.ones(4, 30, dtype=torch.bool)
    coarse, _ = ancestral_plan(law, unknown, row_keys(4), resolved(steps=7))
    fine, _ = ancestral_plan(law, unknown, row_keys(4), resolved(steps=7000))
    for row in range(4):
        order = fine.event[row].argsort()
        assert (coarse.event[row][order].diff() >= 0).all()
