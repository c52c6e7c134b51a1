"""Ancestral sampling of GenMD4: its enumerated law, its candidates, its grids.

Chi-square tests reject a correct sampler once in 1,000 seeds each; the seeds are fixed.
"""

import pytest
import torch
from torch import Tensor

from md4 import samplers
from md4.samplers import Job, SamplingConfig, registry
from md4.samplers.genmd4_ancestral import PowerAncestral, step_before, times
from md4.samplers.grids import time_grid
from tests.md4.genmd4_oracle import PowerToy, sampled
from tests.md4.oracle import chi_square

ALPHA = 1e-3
TOY = PowerToy()
GIVEN = (1.0, 0.7, 0.1, 0.0)


class Pooled(PowerAncestral):
    """Mutant: a candidate takes its token whatever its power is."""

    def __init__(self, model):
        super().__init__(model)
        self.powers = self.most.expand_as(self.powers)


class Late(PowerAncestral):
    """Mutant: the network is shown the end of the step."""

    def ask(self, rows):
        step, candidates = self.next(rows)
        return samplers.sampler.Ask(times(rows.own, step + 1).clamp(min=self.t1), candidates)


def grid_of(grid, steps: int) -> Tensor:
    return torch.tensor(grid, dtype=torch.float64) if isinstance(grid, tuple) else time_grid(grid, steps)


@pytest.mark.parametrize(
    ("kind", "grid", "steps"),
    [
        ("exact", "uniform", 1),
        ("exact", "cosine", 2),
        ("timed", "uniform", 5),
        ("timed", GIVEN, 3),
        ("exact", "uniform", 16),
    ],
)
def test_follows_its_enumerated_law(kind, grid, steps):
    """T steps against the chain over whole states of which each position turns into v by mu_v g_v.

    Rejected: one step more, where the steps are few, and with them the true law.
    """
    counts, _ = sampled(TOY, TOY.model(kind), 50_000, sampler="ancestral", steps=steps, grid=grid)
    assert chi_square(counts, TOY.steps_law(grid_of(grid, steps), kind)) > ALPHA
    if steps <= 5:
        assert chi_square(counts, TOY.law) < ALPHA
    if steps <= 2:
        assert chi_square(counts, TOY.steps_law(time_grid(str(grid), steps + 1), kind)) < ALPHA


@pytest.mark.parametrize("mutant", [Pooled, Late])
def test_mutants_miss_the_law(monkeypatch, mutant):
    monkeypatch.setitem(registry._SAMPLERS, ("genmd4", "ancestral"), mutant)
    counts, _ = sampled(TOY, TOY.model("timed"), 30_000, sampler="ancestral", steps=5, grid="uniform")
    assert chi_square(counts, TOY.steps_law(time_grid("uniform", 5), "timed")) < ALPHA


def test_infilling_follows_its_enumerated_law():
    start = torch.tensor([TOY.mask, 1, TOY.mask])
    counts, samples = sampled(TOY, TOY.model("exact"), 30_000, start, sampler="ancestral", steps=3, grid="uniform")
    assert (samples.tokens[:, 1] == 1).all()
    assert chi_square(counts, TOY.steps_law(time_grid("uniform", 3), "exact", start)) > ALPHA
    assert chi_square(counts, TOY.steps_law(time_grid("uniform", 2), "exact", start)) < ALPHA


def test_one_step_reveals_all_that_is_masked():
    _, samples = sampled(TOY, TOY.model("exact"), 500, sampler="ancestral", steps=1)
    assert (samples.calls == 1).all()
    assert (samples.counted["rejected"] == 0).all()


def test_idle_steps_cost_nothing():
    """100,000 steps: a row makes a call for each step with a candidate, which are few; its draws are the candidates."""
    model = TOY.model("exact")
    _, samples = sampled(TOY, model, 200, sampler="ancestral", steps=100_000, grid="uniform")
    assert torch.equal(samples.row_draws, samples.counted["rejected"] + 3)
    assert (samples.calls <= samples.row_draws).all()
    assert samples.calls.double().mean() < 3 * 4
    assert samples.network_calls == samples.calls.max() == len(model.network.times)  # type: ignore[arg-type]


def test_the_network_is_shown_no_time_below_t1():
    model = TOY.model("exact", t1=0.05)
    sampled(TOY, model, 200, sampler="ancestral", steps=1000, grid="uniform")
    shown = torch.cat(model.network.times)  # type: ignore[arg-type]
    assert shown.min() == torch.tensor(0.05)
    assert shown.max() > 0.98


def own_of(*settings: dict) -> dict[str, Tensor]:
    """The tensors of rows with these settings, put together as a batch does."""
    batch = samplers.Batch(TOY.model("still"))
    for number, changes in enumerate(settings):
        config = SamplingConfig(sampler="ancestral", **changes)
        batch.join(Job(torch.full((1, 3), TOY.mask), torch.tensor([number]), config), [number])
    (rows,) = batch._rows.values()
    return rows.own


def test_times_and_steps_are_those_of_the_grids():
    """Rows of several grids at once: every time of each, and the step that a level between two of them lies in."""
    settings = [{"steps": 7, "grid": "uniform"}, {"grid": GIVEN}, {"steps": 7, "grid": "cosine"}, {"steps": 1}]
    settings.append({"grid": (1.0, 0.9, 0.5, 0.2, 0.1, 0.0)})
    for chosen in (settings, [settings[0], settings[2], settings[3]]):
        own = own_of(*chosen)
        for row, changes in enumerate(chosen):
            grid = grid_of(changes.get("grid", "cosine"), changes.get("steps", 0))
            for step in range(len(grid)):
                at = torch.where(torch.arange(len(chosen)) == row, step, 0)
                torch.testing.assert_close(times(own, at)[row], grid[step], rtol=1e-14, atol=0)
            for step in range(len(grid) - 1):
                inside = 0.6 * grid[step] + 0.4 * grid[step + 1]
                level = inside.expand(len(chosen), 3)
                assert (step_before(own, level)[row] == step).all()
        assert own["grid"].shape[1] == (6 if chosen is settings else 0)
