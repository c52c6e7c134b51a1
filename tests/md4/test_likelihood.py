"""Both estimators against exact enumeration on a toy, with fixed seeds.

A mean lies within 4 of its standard errors except for 6e-5 of all seeds; with the cases below about 1 seed in 1,000
would fail. Every case also names a wrong value that the same draws must tell from the right one.
"""

import math

import pytest
import torch
from torch import Tensor

from md4.errors import UserError
from md4.likelihood import estimator_name, mean_and_error, nelbo
from md4.model import ModelConfig, build
from md4.networks.transformer import TransformerConfig
from tests.md4.oracle import Toy

TOY = Toy(vocabulary=3, length=4, seed=3)
X = torch.tensor([0, 1, 2, 0])
ROWS = 20_000


def quadrature(function, points: int = 400) -> float:
    """Integral over [0, 1] by the midpoint rule in a variable that crowds the points towards 0, where weights peak."""
    u = (torch.arange(points, dtype=torch.float64) + 0.5) / points
    return sum(function(v**4) * 4 * v**3 for v in u.tolist()) / points


def subset_mean(m: float, t: float, timed: bool) -> float:
    """Mean of C(S) when every position is hidden with probability m and the network sees t."""
    sizes, costs = TOY.cross_entropy(X, t, timed)
    return float((m**sizes * (1 - m) ** (TOY.length - sizes) * costs).sum())


def by_count(times: list[float], timed: bool) -> float:
    """sum_k c_k / k with the network shown times[k - 1]."""
    total = 0.0
    for k, t in enumerate(times, start=1):
        sizes, costs = TOY.cross_entropy(X, t, timed)
        total += float(costs[sizes == k].mean()) / k
    return total


def estimate(model, estimator: str, draws: int = 1, seed: int = 0, x: Tensor = X) -> Tensor:
    """Per-row means of ROWS independent rows that all hold the same sequence."""
    return nelbo(model, x.expand(ROWS, -1), draws=draws, seed=seed, ids=torch.arange(ROWS), estimator=estimator).mean(
        dim=1
    )


def deviation(values: Tensor, truth: float) -> float:
    """Distance of the mean from `truth` in standard errors."""
    mean, error = mean_and_error(values)
    return abs(mean - truth) / error


@pytest.mark.parametrize("draws", [1, 3])
def test_mask_count_of_a_network_without_time(draws):
    """Equals sum_k c_k / k, which for a network that knows the posteriors is -ln p(x): each order is a chain rule."""
    truth = by_count([0.5] * 4, timed=False)
    assert truth == pytest.approx(-math.log(TOY.law[TOY.sequence_index(X)]), rel=1e-12)
    values = estimate(TOY.model(), "mask_count", draws)
    assert deviation(values, truth) < 4
    assert deviation(values, truth * 1.02) > 4


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_mask_count_of_a_network_with_time(schedule):
    """Integral over the hidden fraction m of E C / m, the network seeing the time that goes with m.

    Mutant: the time of the fraction k / L itself.
    """
    model = TOY.model(schedule, timed=True)

    def when(m: float) -> float:
        return float(model.schedule.inverse_masked(m))

    truth = quadrature(lambda m: subset_mean(m, when(m), True) / m)
    plugged = by_count([when(k / 4) for k in range(1, 5)], timed=True)
    values = estimate(model, "mask_count", draws=4)
    assert deviation(values, truth) < 4
    assert deviation(values, plugged) > 4


@pytest.mark.parametrize(("schedule", "timed"), [("linear", False), ("linear", True), ("cosine", True)])
def test_continuous_time(schedule, timed):
    """The integral of weight(t) E C over t, plus L eps ln V. Mutant: without the reconstruction term, at eps = 0.1."""
    eps = 0.1
    model = TOY.model(schedule, eps, timed)

    def integrand(t: float) -> float:
        return -float(model.schedule.weight(t)) * subset_mean(float(model.schedule.masked(t)), t, timed)

    truth = quadrature(integrand) + 4 * eps * math.log(3)
    values = estimate(model, "continuous", draws=2)
    assert deviation(values, truth) < 4
    assert deviation(values, truth - 4 * eps * math.log(3)) > 4


def test_discrete_time():
    """The sum over T = 3 steps of (M(t) - M(s)) / M(t) E C, plus the reconstruction. Mutant: the network sees s."""
    model = TOY.model("linear", 1e-4, True, continuous=False, timesteps=3)

    def total(shown: int) -> float:
        value = model.reconstruction(4)
        for step in (1, 2, 3):
            m, before = (float(model.schedule.masked(i / 3)) for i in (step, step - 1))
            value += (m - before) / m * subset_mean(m, (step - shown) / 3, True)
        return value

    values = estimate(model, "continuous", draws=2)
    assert deviation(values, total(shown=0)) < 4
    assert deviation(values, total(shown=1)) > 4
    assert estimator_name(model, "continuous") == "discrete, T = 3"
    assert estimator_name(TOY.model(), "continuous") == "continuous"
    assert estimator_name(model, "mask_count") == "mask_count"


def test_the_two_bounds_differ_by_the_offset():
    """(continuous) - (mask count) = eps (L ln V - c_1 - c_L) + O(eps^2) nats, by quadrature at eps = 1e-3."""
    eps = 1e-3
    schedule = TOY.model("linear", eps).schedule
    continuous = quadrature(
        lambda t: -float(schedule.weight(t)) * subset_mean(float(schedule.masked(t)), t, False), points=2000
    )
    sizes, costs = TOY.cross_entropy(X, 0.5, False)
    first, last = 4 * float(costs[sizes == 1].mean()), float(costs[sizes == 4].mean())
    difference = continuous + 4 * eps * math.log(3) - by_count([0.5] * 4, timed=False)
    assert difference == pytest.approx(eps * (4 * math.log(3) - first - last), abs=20 * eps**2)


def test_mask_count_is_less_noisy_and_strata_help():
    model = TOY.model(timed=True)
    counted, timed = estimate(model, "mask_count"), estimate(model, "continuous")
    assert counted.var() < timed.var() / 3
    stratified = estimate(model, "mask_count", draws=4)
    assert stratified.var() < 0.8 * counted.var() / 4


def test_strata_cover_every_count():
    """With K = L draws each example sees every number of hidden tokens exactly once."""
    seen = []

    class Counter(torch.nn.Module):
        def forward(self, z, t, labels=None):
            seen.append((z == 3).sum(dim=1)[:50])  # without the rows that fill the batch up
            return torch.zeros(*z.shape, 3)

    model = TOY.model()
    model.network = Counter()
    nats = nelbo(model, X.expand(50, -1), draws=4, seed=1, ids=torch.arange(50))
    assert torch.equal(torch.stack(seen, dim=1).sort(dim=1).values, torch.arange(1, 5).expand(50, -1))
    assert torch.stack(seen)[0].unique().numel() == 4  # each example starts elsewhere
    torch.testing.assert_close(nats, torch.full((50, 4), 4 * math.log(3), dtype=torch.float64))


@pytest.mark.parametrize("estimator", ["mask_count", "continuous"])
def test_an_examples_estimate_is_its_own(estimator):
    """Bit-equal whatever the batch; other for another seed, another id, another draw."""
    network = TransformerConfig(feature_dim=16, heads=2, layers=1)
    model = build(ModelConfig(vocab_size=27, length=20, network=network))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    tokens, ids = torch.randint(0, 27, (9, 20), generator=generator), torch.arange(100, 109)
    together = nelbo(model, tokens, draws=3, seed=4, ids=ids, estimator=estimator)
    for part in (slice(0, 1), slice(3, 5), slice(2, 9)):
        own = nelbo(model, tokens[part], draws=3, seed=4, ids=ids[part], estimator=estimator)
        assert torch.equal(own, together[part])
    assert (nelbo(model, tokens, draws=3, seed=5, ids=ids, estimator=estimator) != together).any(dim=1).all()
    assert (nelbo(model, tokens, draws=3, seed=4, ids=ids + 1, estimator=estimator) != together).any(dim=1).all()
    assert together.unique().numel() > 20  # the same only where nothing was hidden


def test_continuous_is_the_training_loss():
    """The same times and masks through MD4.forward give the same nats."""
    from md4 import noise

    model = TOY.model(timed=True)
    found = nelbo(model, X.expand(6, -1), draws=1, seed=9, ids=torch.arange(6), estimator="continuous")
    keys = noise.derive(noise.key(9, "nelbo", "continuous"), torch.arange(6))
    t = noise.uniform(noise.derive(keys, "start"), torch.zeros(6, dtype=torch.int64))
    uniforms = noise.uniform(noise.derive(noise.derive(keys, "positions"), 0)[:, None], torch.arange(4))
    expected = model(X.expand(6, -1), t, uniforms).double() + model.reconstruction(4)
    torch.testing.assert_close(found[:, 0], expected, rtol=1e-5, atol=1e-5)


def test_mean_and_error():
    mean, error = mean_and_error(torch.tensor([1.0, 2.0, 3.0, 6.0]))
    assert mean == 3
    assert error == pytest.approx(math.sqrt(14 / 3 / 4))
    assert math.isnan(mean_and_error(torch.tensor([2.0]))[1])


def test_mistakes_are_named():
    model, rows, ids = TOY.model(), X.expand(2, -1), torch.arange(2)
    with pytest.raises(UserError, match="draws is 0"):
        nelbo(model, rows, draws=0, seed=0, ids=ids)
    with pytest.raises(UserError, match="mask_count, continuous"):
        nelbo(model, rows, draws=1, seed=0, ids=ids, estimator="exact")
    model.network = torch.nn.Identity()
    model.network.forward = lambda z, t, labels: torch.full((*z.shape, 3), torch.nan)  # type: ignore[method-assign]
    with pytest.raises(UserError, match="not finite"):
        nelbo(model, rows, draws=1, seed=0, ids=ids)
