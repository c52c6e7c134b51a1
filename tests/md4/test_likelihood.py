"""Each estimator against exact enumeration of its own quantity on a toy, with fixed seeds.

A mean lies within 4 of its standard errors except for 6e-5 of all seeds; with the 25 cases below about 1 seed in 600
would fail. Every case also names a wrong value that the same draws must tell from the right one.
"""

import math
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from md4 import noise
from md4.errors import UserError
from md4.genmd4 import GenMD4
from md4.likelihood import estimator_name, mean_and_error, nelbo, ratio_and_error
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


def subset_mean(m: float, t: float, timed: bool, x: Tensor = X) -> float:
    """Mean of C(S) when every position is hidden with probability m and the network sees t."""
    sizes, costs = TOY.cross_entropy(x, t, timed)
    return float((m**sizes * (1 - m) ** (TOY.length - sizes) * costs).sum())


def by_count(times: list[float], timed: bool, x: Tensor = X) -> float:
    """sum_k c_k / k with the network shown times[k - 1]."""
    total = 0.0
    for k, t in enumerate(times, start=1):
        sizes, costs = TOY.cross_entropy(x, t, timed)
        total += float(costs[sizes == k].mean()) / k
    return total


def at_least(k: int, n: int, p: float) -> float:
    """P(Binomial(n, p) >= k), which is the regularised incomplete beta function I_p(k, n - k + 1)."""
    return sum(math.comb(n, j) * p**j * (1 - p) ** (n - j) for j in range(k, n + 1))


def by_count_with_offset(eps: float, x: Tensor = X) -> float:
    """sum_k (c_k / k) [I_{1-eps}(k, L-k+1) - I_eps(k, L-k+1)] + L eps ln V: the continuous bound without time input."""
    sizes, costs = TOY.cross_entropy(x, 0.5, timed=False)
    total = TOY.length * eps * math.log(TOY.vocabulary)
    for k in range(1, TOY.length + 1):
        share = at_least(k, TOY.length, 1 - eps) - at_least(k, TOY.length, eps)
        total += float(costs[sizes == k].mean()) / k * share
    return total


def by_steps(model, steps: int, timed: bool, shown: int = 0, x: Tensor = X) -> float:
    """sum over T steps of (M(t) - M(s)) / M(t) E C, plus the reconstruction; the network sees t - shown / T."""
    total = model.reconstruction(TOY.length)
    for step in range(1, steps + 1):
        m, before = (float(model.schedule.masked(i / steps)) for i in (step, step - 1))
        total += (m - before) / m * subset_mean(m, (step - shown) / steps, timed, x)
    return total


def estimate(model, estimator: str, draws: int = 1, seed: int = 0, x: Tensor = X, **options) -> Tensor:
    """Per-row means of ROWS independent rows that all hold the same sequence."""
    rows, ids = x.expand(ROWS, -1), torch.arange(ROWS)
    return nelbo(model, rows, draws=draws, seed=seed, ids=ids, estimator=estimator, **options).mean(dim=1)


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


@pytest.mark.parametrize("eps", [1e-1, 1e-2])
def test_continuous_time_in_closed_form(eps):
    """Without time input the bound is a sum over counts. Mutants: without the offset; without the reconstruction."""
    model, truth = TOY.model(eps=eps), by_count_with_offset(eps)
    assert quadrature(
        lambda t: -float(model.schedule.weight(t)) * subset_mean(float(model.schedule.masked(t)), t, False), points=1500
    ) + model.reconstruction(TOY.length) == pytest.approx(truth, rel=1e-5)
    if eps == 1e-1:  # at 1e-2 the draws can't tell these apart
        values = estimate(model, "continuous", draws=4)
        assert deviation(values, truth) < 4
        assert deviation(values, truth - model.reconstruction(TOY.length)) > 4
        assert deviation(values, by_count([0.5] * 4, timed=False)) > 4


@pytest.mark.parametrize(("steps", "timed"), [(1, False), (3, True), (20, True)])
@pytest.mark.parametrize("continuous", [True, False])
def test_discrete_time(steps, timed, continuous):
    """For a model of continuous time, the bound of a sampler of T steps. Mutants: T + 1 steps; the network sees s."""
    model = TOY.model("linear", 1e-4, timed, continuous=continuous, timesteps=1000 if continuous else steps)
    values = estimate(model, "discrete", draws=6, timesteps=steps if continuous else None)
    assert deviation(values, by_steps(model, steps, timed)) < 4
    if steps < 20:
        assert deviation(values, by_steps(model, steps + 1, timed)) > 4
        assert not timed or deviation(values, by_steps(model, steps, timed, shown=1)) > 4


def test_a_model_of_discrete_time_has_its_own_bound():
    """`continuous` means the loss that it was trained by."""
    model = TOY.model("linear", 1e-4, True, continuous=False, timesteps=3)
    values = estimate(model, "continuous", draws=2)
    assert deviation(values, by_steps(model, 3, True)) < 4
    assert deviation(values, by_steps(model, 3, True, shown=1)) > 4
    assert estimator_name(model, "continuous") == "discrete, T = 3"
    assert estimator_name(model, "discrete", 7) == "discrete, T = 7"
    assert estimator_name(TOY.model(), "discrete") == "discrete, T = 1000"
    assert estimator_name(TOY.model(), "continuous") == "continuous"
    assert estimator_name(model, "mask_count") == "mask_count"


def test_more_steps_tighten_the_bound_like_one_over_t():
    """By enumeration: looser than the continuous bound, the gap halved by each doubling of T."""
    model = TOY.model()
    gaps = [by_steps(model, steps, False) - by_count_with_offset(1e-4) for steps in (32, 64, 128, 256)]
    assert all(gap > 0 for gap in gaps)
    for wide, narrow in pairwise(gaps):
        assert 1.85 < wide / narrow < 2.1


def test_the_two_bounds_differ_by_the_offset():
    """(continuous) - (mask count) = eps (L ln V - c_1 - c_L) + O(eps^2) nats, by quadrature at eps = 1e-3."""
    eps = 1e-3
    schedule = TOY.model("linear", eps).schedule
    continuous = quadrature(
        lambda t: -float(schedule.weight(t)) * subset_mean(float(schedule.masked(t)), t, False), points=1000
    )
    sizes, costs = TOY.cross_entropy(X, 0.5, False)
    first, last = 4 * float(costs[sizes == 1].mean()), float(costs[sizes == 4].mean())
    difference = continuous + 4 * eps * math.log(3) - by_count([0.5] * 4, timed=False)
    assert difference == pytest.approx(eps * (4 * math.log(3) - first - last), abs=20 * eps**2)


def test_mask_count_is_less_noisy_and_strata_help():
    """At one network call each. Measured here: 7.1 (mask count), 27.5 (continuous), 29.0 (T = 1000)."""
    model = TOY.model(timed=True)
    counted, timed = estimate(model, "mask_count"), estimate(model, "continuous")
    stepped = estimate(model, "discrete", timesteps=1000)
    assert counted.var() < timed.var() / 3
    assert counted.var() < stepped.var() / 3
    stratified = estimate(model, "mask_count", draws=4)
    assert stratified.var() < 0.8 * counted.var() / 4


@pytest.mark.parametrize("estimator", ["mask_count", "continuous", "discrete"])
def test_context_is_given_and_not_scored(estimator):
    """Scored at positions 1 and 3 alone, a network that knows the posteriors gives -ln p(x1, x3 | x0, x2).

    Mutants: the likelihood of the whole sequence; that of the two without their context.
    """
    scored = torch.tensor([False, True, False, True])
    fits = {
        "context": (TOY.sequences == X)[:, ~scored].all(dim=1),
        "scored": (TOY.sequences == X)[:, scored].all(dim=1),
    }
    whole = -math.log(TOY.law[TOY.sequence_index(X)])
    truth = whole + math.log(TOY.law[fits["context"]].sum())
    alone = -math.log(TOY.law[fits["scored"]].sum())
    model = TOY.model()
    options = {"timesteps": 200} if estimator == "discrete" else {}
    values = estimate(model, estimator, draws=4, scored=scored.expand(ROWS, -1), **options)
    # The other bounds are not tight: 2 eps ln V, and the gap of 200 steps, are well below the error.
    assert deviation(values, truth) < 4
    assert deviation(values, whole) > 4
    assert deviation(values, alone) > 4


def test_padding_changes_nothing():
    """Whatever the network does with it: the tokens shown there are the same in every call, and never hidden."""
    seen = []

    class Watch(torch.nn.Module):
        def forward(self, z, t, labels=None):
            seen.append(z)
            return torch.zeros(*z.shape, 3)

    model = TOY.model()
    model.network = Watch()
    scored = torch.tensor([[True, True, True, False], [True, False, False, False], [False] * 4, [True] * 4])
    for estimator in ("mask_count", "continuous", "discrete"):
        seen.clear()
        nats = nelbo(
            model, X.expand(4, -1), draws=3, seed=0, ids=torch.arange(4), estimator=estimator, scored=scored
        ).mean(dim=1)
        assert nats[2] == 0
        assert all(((z == X) | scored)[[0, 1, 3]].all() for z in seen)
        if estimator == "mask_count":  # every token costs ln 3, whatever is hidden
            torch.testing.assert_close(nats, scored.sum(dim=1).double() * math.log(3))


def test_genmd4_has_its_own_bound():
    """E of the diffusion term over [t1, 1], over 1 - t1, plus R. Mutants: without R; the bound of mask counts."""
    plain = TOY.model(timed=True)
    model = GenMD4(plain.network, TOY.vocabulary, t1=0.05)
    powers = torch.tensor([0.6, 1.0, 1.9], dtype=torch.float64)
    with torch.no_grad():
        model.schedule.w.copy_(torch.expm1(powers).log())
    hidden = torch.tensor([[bool(number >> i & 1) for i in range(4)] for number in range(16)])
    z = torch.where(hidden, TOY.mask, X)

    def diffusion(u: float) -> float:
        t = model.t1 + (1 - model.t1) * u
        mu = TOY.mu(t, timed=True)[TOY.state_index(z)]  # [16, L, V]
        own = mu.gather(2, X.expand(16, -1)[..., None])[..., 0]
        rate = (1 - model.schedule.eps) * t ** powers[X]
        chance = torch.where(hidden, rate, 1 - rate).prod(dim=1)
        cost = ((mu @ powers - powers[X] * (own.log() + 1)) * hidden).sum(dim=1)
        return float((chance * cost).sum()) / t

    reconstruction = float(model.reconstruction_nats(X[None], powers))
    truth = quadrature(diffusion) + reconstruction
    values = estimate(model, "continuous", draws=4)
    assert deviation(values, truth) < 4
    assert deviation(values, truth - reconstruction) > 4
    assert deviation(values, by_count([0.5] * 4, timed=False)) > 4
    assert estimator_name(model, "continuous") == "continuous, GenMD4"


REPEATS, SAMPLE, DRAWS = 400, 100, 8
COVERED = 1.984  # 95 % of Student's t with 99 degrees of freedom


@pytest.mark.parametrize("estimator", ["mask_count", "continuous", "discrete"])
def test_the_standard_error_covers_the_truth(estimator):
    """400 evaluations of 100 rows drawn from the law: 95 % intervals hold the population's bound, enumerated, in
    380 +- 4.4 of them; 363..397 is within 4 deviations, false-alarm rate 1e-4.

    Mutant: the draws of a row counted as independent evidence.
    """
    model, steps = TOY.model(), 8
    truth = {
        "mask_count": lambda x: by_count([0.5] * 4, False, x),
        "continuous": lambda x: by_count_with_offset(1e-4, x),
        "discrete": lambda x: by_steps(model, steps, False, x=x),
    }[estimator]
    population = sum(float(p) * truth(x) for p, x in zip(TOY.law, TOY.sequences, strict=True))
    uniforms = noise.uniform(noise.key(1, "rows"), torch.arange(REPEATS * SAMPLE))
    rows = TOY.sequences[torch.searchsorted(TOY.law.cumsum(0), uniforms)]
    options = {"timesteps": steps} if estimator == "discrete" else {}
    nats = nelbo(model, rows, draws=DRAWS, seed=2, ids=torch.arange(len(rows)), estimator=estimator, **options)
    nats = nats.view(REPEATS, SAMPLE, DRAWS)

    def hits(values: Tensor) -> int:
        return sum(abs(mean - population) < COVERED * error for mean, error in map(mean_and_error, values))

    assert 363 <= hits(nats.mean(dim=2)) <= 397
    assert hits(nats.flatten(1)) < 363


def test_windows_of_one_document_are_one_piece_of_evidence():
    """500 evaluations of 40 documents of 1 to 6 windows, whose costs share a term: 95 % intervals hold the truth in
    475 +- 4.9 of them (455..495 is within 4 deviations). Mutant: each window its own cluster."""
    generator = torch.Generator().manual_seed(3)

    def one() -> tuple[bool, bool]:
        windows = torch.randint(1, 7, (40,), generator=generator)
        document = torch.arange(40).repeat_interleave(windows)
        tokens = torch.randint(10, 30, (len(document),), generator=generator)
        level = 2 + 0.5 * torch.randn(40, generator=generator)
        nats = tokens * (level[document] + 0.3 * torch.randn(len(document), generator=generator))
        ratio, error = ratio_and_error(nats, tokens, document)
        _, naive = ratio_and_error(nats, tokens, torch.arange(len(document)))
        return abs(ratio - 2) < 2.023 * error, abs(ratio - 2) < 2.023 * naive

    clustered, naive = torch.tensor([one() for _ in range(500)]).sum(dim=0).tolist()
    assert 455 <= clustered <= 495
    assert naive < 455


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


@pytest.mark.parametrize(
    ("objective", "estimator"),
    [("md4", "mask_count"), ("md4", "continuous"), ("md4", "discrete"), ("genmd4", "continuous")],
)
@pytest.mark.parametrize("size", [27, 2000])
def test_an_examples_estimate_is_its_own(objective, estimator, size):
    """Bit-equal whatever the batch; other for another seed, another id, another draw. With 2,000 tokens, the logits of
    hidden positions alone are computed, in chunks."""
    network = TransformerConfig(feature_dim=16, heads=2, layers=1)
    model = build(ModelConfig(vocab_size=size, length=20, objective=objective, network=network))
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
    model = TOY.model(timed=True)
    found = nelbo(model, X.expand(6, -1), draws=1, seed=9, ids=torch.arange(6), estimator="continuous")
    keys = noise.derive(noise.key(9, "nelbo", "continuous"), torch.arange(6))
    t = noise.uniform(noise.derive(keys, "start"), torch.zeros(6, dtype=torch.int64))
    uniforms = noise.uniform(noise.derive(noise.derive(keys, "positions"), 0)[:, None], torch.arange(4))
    expected = model(X.expand(6, -1), t, uniforms).bound.double()
    torch.testing.assert_close(found[:, 0], expected, rtol=1e-5, atol=1e-5)


def test_mean_and_error():
    mean, error = mean_and_error(torch.tensor([1.0, 2.0, 3.0, 6.0]))
    assert mean == 3
    assert error == pytest.approx(math.sqrt(14 / 3 / 4))
    assert math.isnan(mean_and_error(torch.tensor([2.0]))[1])


def test_ratio_and_error():
    """Equal windows in clusters of their own: the plain mean. Two windows always together: as one of twice the size."""
    values, ones, own = torch.tensor([1.0, 2.0, 3.0, 6.0]), torch.ones(4), torch.arange(4)
    assert ratio_and_error(values * 5, ones * 5, own) == pytest.approx(mean_and_error(values))
    pairs = torch.tensor([7, 7, 3, 3])
    assert ratio_and_error(values, ones, pairs) == pytest.approx(mean_and_error(torch.tensor([1.5, 4.5])))
    assert math.isnan(ratio_and_error(values, ones, torch.zeros(4))[1])


def test_mistakes_are_named():
    model, rows, ids = TOY.model(), X.expand(2, -1), torch.arange(2)
    with pytest.raises(UserError, match="draws is 0"):
        nelbo(model, rows, draws=0, seed=0, ids=ids)
    with pytest.raises(UserError, match="mask_count, continuous, discrete"):
        nelbo(model, rows, draws=1, seed=0, ids=ids, estimator="exact")
    with pytest.raises(UserError, match="timesteps is 0"):
        nelbo(model, rows, draws=1, seed=0, ids=ids, estimator="discrete", timesteps=0)
    with pytest.raises(UserError, match="timesteps=5 is a setting of the estimator discrete, not of mask_count"):
        nelbo(model, rows, draws=1, seed=0, ids=ids, timesteps=5)
    learned = GenMD4(model.network, 3)
    for wrong in ("mask_count", "discrete"):
        with pytest.raises(UserError, match="use continuous"):
            nelbo(learned, rows, draws=1, seed=0, ids=ids, estimator=wrong)
    scored = torch.tensor([[True, False, True, True]] * 2)
    with pytest.raises(UserError, match="whole examples only"):
        nelbo(learned, rows, draws=1, seed=0, ids=ids, estimator="continuous", scored=scored)
    model.network = torch.nn.Identity()
    model.network.forward = lambda z, t, labels: torch.full((*z.shape, 3), torch.nan)  # type: ignore[method-assign]
    with pytest.raises(UserError, match="not finite"):
        nelbo(model, rows, draws=1, seed=0, ids=ids)
