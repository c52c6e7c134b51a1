"""Searched grids: the least-cost path against brute force, solvable costs, and estimates against enumeration."""

from itertools import combinations

import pytest
import torch

from md4.errors import UserError
from md4.likelihood import nelbo
from md4.samplers import SamplingConfig, count_costs
from md4.samplers.grid_costs import SharedCosts, estimate_costs
from md4.samplers.grid_search import candidates, search
from md4.samplers.grids import GRIDS, time_grid
from md4.schedules import parse_schedule
from tests.md4.genmd4_oracle import PowerToy
from tests.md4.oracle import Toy


def costs_of(times, masked, nats) -> SharedCosts:
    """A table for one row, the cost given at all times but the last."""
    return SharedCosts(times, 0.0, None, masked, torch.cat([nats[:-1], torch.zeros(1, dtype=torch.float64)])[:, None])


def brute_force(costs: SharedCosts, steps: int) -> tuple[float, tuple[float, ...]]:
    """The least bound and its grid among all grids of `steps`, each bound by `Costs.bound`."""
    inner = costs.times[1:-1].tolist()
    grids = [(1.0, *chosen, 0.0) for chosen in combinations(inner, steps - 1)]
    return min((float(costs.bound(grid).mean()), grid) for grid in grids)


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("steps", [1, 2, 3, 5, 9])
def test_is_the_best_of_all_grids(seed, steps):
    """Ten uneven times with costs of no particular shape, so that the best path jumps."""
    draw = torch.Generator().manual_seed(seed)
    times = torch.rand(8, generator=draw, dtype=torch.float64).sort(descending=True).values
    times = torch.cat([torch.ones(1, dtype=torch.float64), times, torch.zeros(1, dtype=torch.float64)])
    schedule = parse_schedule(["linear", "cosine", "poly2"][seed % 3])
    costs = costs_of(times, schedule.masked(times), 5 * torch.rand(10, generator=draw, dtype=torch.float64) + 0.1)
    least, grid = brute_force(costs, steps)
    found = search(costs, steps)
    assert found == grid
    assert float(costs.bound(found).mean()) == least
    assert len(found) == steps + 1
    SamplingConfig(grid=found)  # is a setting as it is


@pytest.mark.parametrize("schedule", ["linear", "poly2"])
def test_a_cost_that_grows_with_the_square_wants_even_steps_of_the_masked_share(schedule):
    """C = M^2: the bound is sum M_i (M_i - M_{i+1}), least where M falls evenly; known in closed form."""
    law, steps = parse_schedule(schedule), 8
    masked = torch.linspace(1, 0, 33, dtype=torch.float64)
    masked = law.masked(1.0) * masked + law.masked(0.0) * (1 - masked)
    times = law.inverse_masked(masked)
    times[0], times[-1] = 1.0, 0.0
    costs = costs_of(times, masked, masked**2)
    found = search(costs, steps)
    assert found == tuple(times[::4].tolist())
    first, last = float(masked[0]), float(masked[-1])
    expected = (first**2 - last**2) / 2 + (first - last) ** 2 / (2 * steps)
    assert float(costs.bound(found)[0]) == pytest.approx(expected, rel=1e-12)


def test_tokens_that_say_nothing_of_each_other_make_all_grids_equal():
    """C = c M: every grid costs c (M(1) - M(0))."""
    law = parse_schedule("linear")
    times = candidates(32, [4])
    costs = costs_of(times, law.masked(times), 3 * law.masked(times))
    whole = 3 * float(law.masked(1.0) - law.masked(0.0))
    for grid in (search(costs, 4), time_grid("uniform", 4).tolist(), time_grid("cosine", 4).tolist()):
        assert float(costs.bound(grid)[0]) == pytest.approx(whole, rel=1e-12)


@pytest.fixture(scope="module")
def toy():
    """A law, 400 of its sequences, and the costs of its own network that sees the time."""
    law = Toy(vocabulary=3, length=4)
    model = law.model("linear", timed=True)
    which = torch.multinomial(law.law, 400, replacement=True, generator=torch.Generator().manual_seed(0))
    tokens = law.sequences[which]
    times = candidates(12, [6, 3])
    return law, model, tokens, estimate_costs(model, tokens, times, draws=50, seed=3, batch_size=4096)


def test_estimated_costs_are_the_enumerated_ones(toy):
    """Each time's mean within 4.5 standard errors of the enumeration: false-alarm rate below 2e-4 for all of them.

    Mutant: the cost at the time of the step's end instead, which the same errors reject.
    """
    law, model, tokens, costs = toy
    sequences, counts = tokens.unique(dim=0, return_counts=True)
    exact = []
    for t in costs.times[:-1].tolist():
        share = float(model.schedule.masked(t))
        total = 0.0
        for sequence, count in zip(sequences, counts.tolist(), strict=True):
            size, cost = law.cross_entropy(sequence, t, timed=True)
            total += count * float((share**size * (1 - share) ** (law.length - size) * cost).sum())
        exact.append(total / len(tokens))
    found, exact = costs.nats[:-1].mean(dim=1), torch.tensor(exact, dtype=torch.float64)
    # Rows are the ones enumerated over, so only the masks are chance: at most the whole spread of a row.
    error = costs.nats[:-1].std(dim=1) / len(tokens) ** 0.5
    assert ((found - exact).abs() < 4.5 * error + 1e-6).all()
    assert ((found[1:] - exact[:-1]).abs() > 4.5 * error[1:]).any()


def test_what_the_time_changes_is_part_of_the_costs(toy):
    """Left out, the costs of a network that sees the time are rejected; one that doesn't has the same either way."""
    law, model, tokens, costs = toy
    rough = estimate_costs(model, tokens, costs.times, draws=50, seed=3, exact=False)
    error = (costs.nats - rough.nats).std(dim=1) / len(tokens) ** 0.5
    assert ((costs.nats - rough.nats).mean(dim=1).abs() > 4.5 * error + 1e-6).any()
    still = law.model("linear")
    one, other = (
        estimate_costs(still, tokens[:20], costs.times, draws=2, seed=3, exact=exact) for exact in (True, False)
    )
    assert torch.allclose(one.nats, other.nats, atol=1e-6)


def test_long_rows_are_masked_at_each_time_to_the_same_costs(toy, monkeypatch):
    """The direct estimate agrees within 4.5 standard errors of the difference (11 times: false-alarm rate below 1e-4),
    and is the noisier one."""
    _, model, tokens, costs = toy
    monkeypatch.setattr(count_costs, "LONGEST", 3)
    direct = estimate_costs(model, tokens, costs.times, draws=50, seed=4, batch_size=4096)
    difference = (direct.nats - costs.nats)[:-1]
    error = difference.std(dim=1) / len(tokens) ** 0.5
    assert (difference.mean(dim=1).abs() < 4.5 * error + 1e-6).all()
    one, other = (
        table.bound(time_grid("uniform", 6).tolist()) - table.bound(time_grid("uniform", 3).tolist())
        for table in (direct, costs)
    )
    assert float(other.std()) < float(one.std())


def test_the_bound_is_the_likelihoods_own(toy):
    """On the uniform grid it is what `discrete` estimates, within 4.5 standard errors; another grid's is rejected."""
    _, model, tokens, costs = toy
    other = nelbo(
        model, tokens, draws=60, seed=1, ids=torch.arange(len(tokens)), estimator="discrete", timesteps=6
    ).mean(dim=1)
    difference = costs.bound(time_grid("uniform", 6).tolist()) - other
    assert abs(float(difference.mean())) < 4.5 * float(difference.std()) / len(tokens) ** 0.5
    coarse = costs.bound(time_grid("uniform", 3).tolist()) - other
    assert abs(float(coarse.mean())) > 4.5 * float(coarse.std()) / len(tokens) ** 0.5


def test_is_never_worse_than_the_named_grids(toy):
    costs = toy[3]
    bounds = {kind: float(costs.bound(time_grid(kind, 6).tolist()).mean()) for kind in ("uniform", "cosine")}
    found = float(costs.bound(search(costs, 6)).mean())
    assert found < min(bounds.values())  # for this law strictly


def test_estimates_do_not_depend_on_the_batch(toy):
    _, model, tokens, _ = toy
    times = candidates(4, [2])
    one, other = (estimate_costs(model, tokens[:5], times, draws=2, seed=1, batch_size=size) for size in (3, 1000))
    assert torch.allclose(one.nats, other.nats, atol=1e-5)
    assert not torch.allclose(one.nats, estimate_costs(model, tokens[:5], times, draws=2, seed=2).nats, atol=1e-2)


@pytest.fixture(scope="module")
def power_toy():
    """A law, a GenMD4 model with its true posterior, all its sequences many times, and the costs that were found."""
    law = PowerToy()
    tokens = law.sequences.repeat(30, 1)
    times = candidates(8, [4])
    return law, estimate_costs(law.model(), tokens, times, draws=8, seed=2, batch_size=4096)


def step_law(probabilities: torch.Tensor, leaves: torch.Tensor) -> torch.Tensor:
    """What a masked position is after a step, `[..., V + 1]`, the mask last: v with probabilities[v] leaves[v]."""
    moved = probabilities * leaves
    return torch.cat([moved, 1 - moved.sum(-1, keepdim=True)], dim=-1)


@pytest.mark.parametrize(("begin", "end"), [(0, 1), (0, 5), (3, 4), (2, 9), (7, -1)])
def test_a_step_of_genmd4_costs_the_divergence_of_its_laws(power_toy, begin, end):
    """KL(true step || model's step) over all states and positions, enumerated; within 4.5 standard errors (five
    comparisons: false-alarm rate below 4e-5)."""
    law, costs = power_toy
    t, s = float(costs.times[begin]), float(costs.times[end])
    prediction = law.all_states(t, "exact")  # [S, L, V]
    masked = law.states == law.mask  # [S, L]
    total = torch.zeros(len(law.sequences), dtype=torch.float64)
    for number, sequence in enumerate(law.sequences):
        hidden = t ** law.powers[sequence]  # [L]
        fits = ((law.states == sequence) | masked).all(1)
        share = torch.where(masked, hidden, 1 - hidden).prod(1) * fits  # [S]
        leaves = 1 - (s / t) ** law.powers
        true = step_law(torch.nn.functional.one_hot(sequence, law.vocabulary).double(), leaves)
        model = step_law(prediction, leaves)
        divergence = torch.where(true > 0, true * (true.clamp(min=1e-300) / model).log(), 0.0).sum(-1)  # [S, L]
        total[number] = (share * torch.where(masked, divergence, 0.0).sum(1)).sum()
    found = costs.steps(torch.tensor([begin]), torch.tensor([end % len(costs.times)]))[0].view(30, -1)
    assert abs(float((found - total).mean())) < 4.5 * float((found - total).std()) / found.numel() ** 0.5 + 1e-6


def test_genmd4s_bound_falls_to_the_entropy_and_holds_for_its_sampler(power_toy):
    """With the true posterior the bound is above the cross-entropy of the sampler's own law, and near it when fine."""
    law, _ = power_toy
    # So that the mean over rows is that over the law.
    which = torch.multinomial(law.law, 1500, replacement=True, generator=torch.Generator().manual_seed(1))
    tokens = law.sequences[which]
    costs = estimate_costs(law.model(), tokens, candidates(32, [3]), draws=1, seed=5, batch_size=4096)
    for steps, slack in ((3, 0.3), (32, 0.03)):
        grid = time_grid("uniform", steps)
        nats = costs.bound(grid.tolist())
        own = -law.steps_law(grid, "exact").log()[which]  # -ln p of the sampler
        gap, error = float((nats - own).mean()), float((nats - own).std()) / len(nats) ** 0.5
        assert -4.5 * error < gap < slack + 4.5 * error
    found = costs.bound(search(costs, 3))
    assert float(found.mean()) < min(float(costs.bound(time_grid(kind, 3).tolist()).mean()) for kind in GRIDS)


def test_mistakes_are_named(toy):
    _, model, tokens, costs = toy
    with pytest.raises(ValueError, match="not known"):
        costs.bound([1.0, 0.123, 0.0])
    with pytest.raises(UserError, match="steps is 0"):
        search(costs, 0)
    with pytest.raises(UserError, match=f"1 to {len(costs.times) - 1} are possible"):
        search(costs, len(costs.times))
    with pytest.raises(UserError, match="steps is 0"):
        candidates(8, [4, 0])
    with pytest.raises(UserError, match="points is 0"):
        candidates(0, [8])
    with pytest.raises(UserError, match="rows and draws"):
        estimate_costs(model, tokens, costs.times, draws=0, seed=0)

    class Broken(torch.nn.Module):
        def forward(self, z, t, labels=None):
            return torch.full((*z.shape, 3), torch.nan)

    broken = toy[0].model("linear")
    broken.network = Broken()
    with pytest.raises(UserError, match="not finite"):
        estimate_costs(broken, tokens[:4], costs.times, draws=1, seed=0)
