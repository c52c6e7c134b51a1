"""GenMD4: its gradient against enumeration over everything that is random, its bound against the likelihood."""

import math
from collections.abc import Callable
from itertools import pairwise, product

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from md4 import noise
from md4.errors import UserError
from md4.genmd4 import GenMD4, Terms
from md4.model import ModelConfig, build
from md4.networks.transformer import TransformerConfig
from md4.objectives import MD4, mask_uniforms
from md4.schedules import EPS, LearnedPolynomial, Linear

V, L, MASK = 3, 3, 3
SEQUENCES = torch.tensor(list(product(range(V), repeat=L)))  # [27, L]
HIDDEN = torch.tensor(list(product([False, True], repeat=L)))  # [8, L]
TIMES = [0.01, 0.1, 0.3, 0.6, 0.9]
T1 = 1e-3


def law(seed: int = 0) -> Tensor:
    """A law over SEQUENCES, `[27]`, far from uniform."""
    weights = noise.exponential(noise.key(seed, "law"), torch.arange(len(SEQUENCES)))
    return weights**2 / (weights**2).sum()


class Table(nn.Module):
    """A network with a parameter for each (state, position, token), whose answer also depends on the time. float64."""

    def __init__(self, seed: int = 1):
        super().__init__()
        size = (V + 1) ** L * L * V
        values = 3 * noise.uniform(noise.key(seed, "table"), torch.arange(2 * size)) - 1.5
        self.logits, bend = (nn.Parameter(part) for part in values.view(2, (V + 1) ** L, L, V))
        self.bend = bend.detach()
        self.shown: tuple = ()

    def forward(self, z: Tensor, t: Tensor, labels: Tensor | None = None) -> Tensor:
        self.shown = (z, t, labels)
        index = (z * (V + 1) ** torch.arange(L)).sum(1)
        return self.logits[index] + torch.sin(3 * t)[:, None, None] * self.bend[index]


def toy() -> GenMD4:
    """Unequal powers, float64."""
    model = GenMD4(Table(), V).double()
    model.schedule.w.data = torch.tensor([0.9, -0.4, 0.2], dtype=torch.float64)
    return model


# --- the enumerated objective, written down from the definition, sharing nothing with the code under test ---


def exact_at(model: GenMD4, t: float) -> Tensor:
    """E over x, z of the diffusion term at time t, differentiable in w through the law of z as well."""
    powers = torch.log(1 + torch.exp(model.schedule.w))
    masked = (1 - EPS) * t**powers  # [V]
    total = torch.zeros((), dtype=torch.float64)
    for x, chance_x in zip(SEQUENCES, law(), strict=True):
        z = torch.where(HIDDEN, MASK, x)
        chance_z = torch.where(HIDDEN, masked[x], 1 - masked[x]).prod(1)
        mu = model.network(z, torch.full((len(z),), t, dtype=torch.float64)).softmax(-1)  # [8, L, V]
        own = nn.functional.one_hot(x, V)  # [L, V]
        inside = (mu[:, torch.arange(L), x].log() + 1)[..., None] * own - mu
        nats = (-powers / t * inside).sum(2) * HIDDEN
        total = total + chance_x * (chance_z * nats.sum(1)).sum()
    return total


def exact_bound(model: GenMD4, nodes: int = 32) -> Tensor:
    """E over x, z, t of the whole bound: time by Gauss-Legendre quadrature in ln t, divided by 1 - t1."""
    points, weights = np.polynomial.legendre.leggauss(nodes)
    low = math.log(model.t1)
    total = torch.zeros((), dtype=torch.float64)
    for point, weight in zip(points, weights, strict=True):
        t = math.exp(low * (1 - point) / 2)
        total = total - low / 2 * weight * t * exact_at(model, t)
    shares = model.t1 ** torch.log(1 + torch.exp(model.schedule.w))  # t1^p
    surprise = -(1 - EPS) * shares * (shares / shares.sum()).log()
    return total / (1 - model.t1) + (law() * surprise[SEQUENCES].sum(1)).sum()


def gradients(value: Tensor, model: GenMD4) -> tuple[Tensor, Tensor]:
    """In w `[V]` and in the network's table."""
    network: nn.Module = model.network
    assert isinstance(network, Table)
    of_w, of_table = torch.autograd.grad(value, [model.schedule.w, network.logits], allow_unused=True)
    return of_w, of_table


def all_pairs() -> tuple[Tensor, Tensor, Tensor]:
    """All (x, z1, z2) of positive probability: x `[N, L]`, what is hidden `[N, 2, L]` bool, the law of x `[N]`."""
    index = torch.cartesian_prod(*(torch.arange(n) for n in (len(SEQUENCES), len(HIDDEN), len(HIDDEN))))
    return SEQUENCES[index[:, 0]], HIDDEN[index[:, 1:]], law()[index[:, 0]]


def chance_of(hidden: Tensor, x: Tensor, t: Tensor, model: GenMD4) -> Tensor:
    """q(z1 | x) q(z2 | x) `[N]`, a constant."""
    masked = (1 - EPS) * t[:, None] ** torch.log(1 + torch.exp(model.schedule.w.detach()))[x]
    return torch.where(hidden, masked[:, None], 1 - masked[:, None]).flatten(1).prod(1)


def surrogate_nats(terms: Terms) -> Tensor:
    return terms.loss.optimised


MUTANTS: dict[str, Callable[[Terms], Tensor]] = {
    "no score term": lambda terms: terms.diffusion.mean(1) + terms.reconstruction,
    "its sign reversed": lambda terms: terms.diffusion.mean(1) + terms.reconstruction - terms.score,
    "twice as strong": lambda terms: terms.diffusion.mean(1) + terms.reconstruction + 2 * terms.score,
}


def surrogate_at(model: GenMD4, t: float, what: Callable[[Terms], Tensor]) -> Tensor:
    """The surrogate averaged over all (x, z1, z2) at time t, without the reconstruction term."""
    x, hidden, chance_x = all_pairs()
    times = torch.full((len(x),), t, dtype=torch.float64)
    terms = model.terms(x, torch.where(hidden, MASK, x[:, None]), times, model.schedule())
    chance = chance_x * chance_of(hidden, x, times, model)
    assert chance.sum().item() == pytest.approx(1, abs=1e-12)
    return (chance * (what(terms) - terms.reconstruction)).sum()


@pytest.mark.parametrize("t", TIMES)
def test_expected_gradient_of_the_surrogate_is_that_of_the_enumerated_objective(t):
    model = toy()
    for ours, exact in zip(
        gradients(surrogate_at(model, t, surrogate_nats), model), gradients(exact_at(model, t), model), strict=True
    ):
        assert exact.abs().max() > 1e-3
        assert (ours - exact).abs().max() < 1e-10


@pytest.mark.parametrize("mutant", MUTANTS)
@pytest.mark.parametrize("t", TIMES)
def test_that_proof_rejects_a_wrong_score_term(t, mutant):
    model = toy()
    ours, _ = gradients(surrogate_at(model, t, MUTANTS[mutant]), model)
    exact, _ = gradients(exact_at(model, t), model)
    assert (ours - exact).abs().max() > 1e-3


def integrated_surrogate(model: GenMD4) -> Tensor:
    """E of `forward(...).optimised` over all (x, z1, z2) and the fraction u in [0, 1) that times are made of.

    Gauss-Legendre on panels of u that halve towards 0, where the integrand is steepest.
    """
    points, weights = (torch.from_numpy(a) for a in np.polynomial.legendre.leggauss(8))
    edges = [0.0, *(2.0**-k for k in range(12, -1, -1))]
    total = torch.zeros((), dtype=torch.float64)
    x, hidden, chance_x = all_pairs()
    for low, high in pairwise(edges):
        for point, weight in zip(points, weights, strict=True):
            u = (low + (high - low) * (point + 1) / 2).expand(len(x))
            chance = chance_x * chance_of(hidden, x, T1 + (1 - T1) * u, model)
            loss = model(x, u, hidden.double())  # uniform 1 hides, 0 keeps
            total = total + (high - low) / 2 * weight * (chance * loss.optimised).sum()
    return total


def test_integrated_over_time_it_is_the_gradient_of_the_whole_bound():
    """The factor 1 / (1 - t1) and the reconstruction term included; either of them amiss would show."""
    model = toy()
    ours, exact = gradients(integrated_surrogate(model), model), gradients(exact_bound(model), model)
    for one, other in zip(ours, exact, strict=True):
        assert (one - other).abs().max() < 1e-6
    without_factor = gradients(exact_bound(model) * (1 - T1), model)
    assert (ours[0] - without_factor[0]).abs().max() > 1e-5
    (of_reconstruction,) = torch.autograd.grad(
        (law() * model.reconstruction_nats(SEQUENCES, model.schedule())).sum(), model.schedule.w
    )
    assert of_reconstruction.abs().max() > 1e-5


def test_drawn_gradients_scatter_around_the_exact_one():
    """Mean of 300 stratified batches of 64 examples against the enumeration, within 5 standard errors of each of the
    three components (batches are independent). False alarm 2e-6, the seed is fixed."""
    model = toy()
    (exact, _), drawn = gradients(exact_bound(model), model), []
    slots = torch.arange(64)
    cumulative = law().cumsum(0)
    for step in range(300):
        u = noise.uniform(noise.key(4, "x", step), slots)
        x = SEQUENCES[torch.searchsorted(cumulative, u).clamp(max=len(SEQUENCES) - 1)]
        drawn.append(gradients(model(x, **model.noise(4, step, slots, 64, 8, L)).optimised.mean(), model)[0])
    drawn = torch.stack(drawn)
    error = drawn.std(0) / len(drawn) ** 0.5
    assert ((drawn.mean(0) - exact).abs() < 5 * error).all()
    assert (error < exact.abs().max()).all()  # else the test would say nothing


class Posterior(nn.Module):
    """The network that knows the law: the exact posterior under powers `[V]` (equal ones: it does not ask the time)."""

    def __init__(self, powers: Tensor):
        super().__init__()
        self.powers = powers

    def forward(self, z: Tensor, t: Tensor, labels: Tensor | None = None) -> Tensor:
        fits = ((z[:, None] == SEQUENCES) | (z[:, None] == MASK)).all(2)  # [B, 27]
        hidden = t[:, None, None] ** self.powers[SEQUENCES]  # [B, 27, L]: each token's chance to be hidden
        joint = fits * law() * torch.where(z[:, None] == MASK, hidden, 1.0).prod(2)
        return torch.einsum("bx,xlv->blv", joint, nn.functional.one_hot(SEQUENCES, V).double()).log()


def test_the_bound_of_the_true_posterior_is_the_likelihood():
    """E[bound] = -ln p(x) for every x, whatever the powers, where t1 and eps vanish: weight, masks, both parts of the
    loss and the reconstruction term are right together, for no other combination gives this."""
    w = torch.tensor([0.9, -0.4, 0.2], dtype=torch.float64)
    model = GenMD4(Posterior(torch.nn.functional.softplus(w)), V, t1=1e-9).double()
    model.schedule.w.data, model.schedule.eps = w, 1e-12
    points, weights = np.polynomial.legendre.leggauss(48)
    low, powers = math.log(model.t1), model.schedule().detach()
    for x, chance in zip(SEQUENCES, law(), strict=True):
        tokens, rest = x.expand(len(HIDDEN), L), model.reconstruction_nats(x[None], powers).item()
        total = rest
        for point, weight in zip(points, weights, strict=True):
            t = math.exp(low * (1 - point) / 2)
            masked = t ** powers[x]
            chance_z = torch.where(HIDDEN, masked, 1 - masked).prod(1)
            fraction = torch.full((len(HIDDEN),), (t - model.t1) / (1 - model.t1), dtype=torch.float64)
            nats = model.bound_estimate(tokens, fraction, HIDDEN.double()) - rest
            total -= low / 2 * weight * t * (chance_z * nats).sum().item()
        assert total == pytest.approx(-chance.log().item(), abs=2e-3)


def learn(what: Callable[[Terms], Tensor]) -> tuple[GenMD4, float, float]:
    """Train w alone on drawn surrogates, for a network that is right iff all powers are equal.

    Returns the model and how far its exact bound was above the entropy before and after.
    """
    model = GenMD4(Posterior(torch.ones(V)), V).double()
    model.schedule.w.data = torch.tensor([1.5, -0.5, 0.5], dtype=torch.float64)
    entropy = -(law() * law().log()).sum().item()
    before = exact_bound(model).item() - entropy
    optimizer = torch.optim.Adam([model.schedule.w], lr=0.03)
    slots, cumulative = torch.arange(128), law().cumsum(0)
    for step in range(160):
        u = noise.uniform(noise.key(5, "x", step), slots)
        x = SEQUENCES[torch.searchsorted(cumulative, u).clamp(max=len(SEQUENCES) - 1)]
        drawn, powers = model.noise(5, step, slots, 128, 8, L), model.schedule()
        t = model.used_times(drawn["t"])
        terms = model.terms(x, model.corrupt(x, t, drawn["uniforms"], powers), t, powers)
        optimizer.zero_grad()
        what(terms).mean().backward()
        optimizer.step()
    return model, before, exact_bound(model).item() - entropy


def test_learning_moves_the_powers_where_the_exact_bound_improves():
    """There it is best that all powers are equal, and the bound is then the entropy but for what t1 and eps cost."""
    model, before, after = learn(surrogate_nats)
    assert before > 0.3
    assert -1e-3 < after < 0.05 * before
    powers = model.schedule()
    assert powers.max() / powers.min() < 1.3  # from 3.6


def test_without_the_score_term_it_learns_the_wrong_powers():
    """The explicit part of the gradient alone only sees that small powers make small weights."""
    model, before, after = learn(MUTANTS["no score term"])
    assert after > before
    assert model.schedule().max() < 0.5


# --- what is computed, for one draw ---


def test_tokens_are_hidden_at_their_own_rates():
    """20,000 positions of each token at four times, to 5 standard deviations: false alarm 7e-6, the seed is fixed."""
    n, t = 20_000, torch.tensor([0.05, 0.4, 0.8, 0.99], dtype=torch.float64)
    model = toy()
    powers = model.schedule()
    tokens = torch.arange(V).repeat_interleave(n).expand(4, -1)
    z = model.corrupt(tokens, t, mask_uniforms(0, 0, torch.arange(4), V * n), powers)
    assert (z == tokens).logical_or(z == MASK).all()
    shares = (z == MASK).view(4, V, n).double().mean(2)
    expected = ((1 - EPS) * t[:, None] ** powers).detach()
    assert ((shares - expected).abs() < 5 * (expected * (1 - expected) / n).sqrt()).all()


def test_equal_powers_give_the_polynomial_schedule_of_md4():
    """With all powers p the diffusion term is p / t times the cross-entropy: MD4's for t^p and eps = 0."""
    table = Table()
    genmd4, md4 = GenMD4(table, V).double(), MD4(table, Linear(eps=0.0), V)
    x, hidden, _ = all_pairs()
    t = torch.full((len(x),), 0.37, dtype=torch.float64)
    z = torch.where(hidden, MASK, x[:, None])
    terms = genmd4.terms(x, z, t, genmd4.schedule())
    for copy in (0, 1):
        expected = md4.diffusion_nats(x, z[:, copy], t)
        assert torch.allclose(terms.diffusion[:, copy], expected.double(), rtol=1e-6)


def test_bound_and_surrogate_differ_by_the_score_term_alone():
    model = toy()
    tokens, slots = SEQUENCES[:16], torch.arange(16)
    drawn = model.noise(1, 2, slots, 16, 4, L)
    assert drawn["uniforms"].shape == (16, 2, L)
    loss = model(tokens, **drawn)
    assert loss.optimised.dtype == loss.bound.dtype == torch.float64
    assert not loss.bound.requires_grad
    t, powers = model.used_times(drawn["t"]), model.schedule()
    terms = model.terms(tokens, model.corrupt(tokens, t, drawn["uniforms"], powers), t, powers)
    assert torch.allclose(loss.optimised - loss.bound, terms.score)
    assert terms.score.abs().max() > 0.1
    assert (terms.diffusion >= 0).all()
    assert (terms.reconstruction > 0).all()
    assert t.min() >= T1
    one, other = (model.bound_estimate(tokens, drawn["t"], drawn["uniforms"][:, copy]) for copy in (0, 1))
    assert torch.allclose((one + other) / 2, loss.bound)


def test_micro_batches_get_the_losses_of_the_batch():
    model = toy()
    drawn = model.noise(1, 2, torch.arange(16), 16, 4, L)
    whole = model(SEQUENCES[:16], **drawn)
    part = model(SEQUENCES[6:10], **{name: value[6:10] for name, value in drawn.items()})
    assert torch.equal(part.optimised, whole.optimised[6:10])


def test_both_copies_are_shown_with_the_same_time_and_label():
    model = toy()
    tokens, labels = SEQUENCES[5:8], torch.tensor([4, 0, 9])
    drawn = model.noise(1, 2, torch.arange(3), 3, 3, L)
    model(tokens, **drawn, labels=labels)
    network: nn.Module = model.network
    assert isinstance(network, Table)
    z, t, shown = network.shown
    assert shown.tolist() == [4, 4, 0, 0, 9, 9]
    assert torch.equal(t, model.used_times(drawn["t"]).repeat_interleave(2))
    assert torch.equal(z, model.corrupt(tokens, t[::2], drawn["uniforms"], model.schedule()).flatten(0, 1))
    assert not torch.equal(z[::2], z[1::2])


def test_visible_positions_cost_nothing_even_where_the_answer_is_not_finite():
    class Sure(nn.Module):
        def __init__(self):
            super().__init__()
            self.table = nn.Parameter(torch.zeros(L, V))

        def forward(self, z, t, labels=None):
            sure = torch.zeros(L, V)
            sure[1, 1] = -math.inf  # of a token that is wrong where it matters, and right where it does not
            return (self.table + sure).expand(len(z), -1, -1)

    model = GenMD4(Sure(), V)
    hidden = torch.tensor([[[1.0, 0.0, 1.0], [1.0, 0.0, 0.0]]])
    loss = model(torch.tensor([[0, 1, 2]]), torch.tensor([0.5]), hidden)
    loss.optimised.sum().backward()
    for parameter in model.parameters():
        assert parameter.grad is not None
        assert torch.isfinite(parameter.grad).all()
    assert model.network.table.grad[1].abs().max() == 0
    t = T1 + (1 - T1) / 2
    reconstruction = 3 * (1 - EPS) * T1 * math.log(3)
    assert loss.bound.item() == pytest.approx(1.5 * math.log(3) / t + reconstruction, rel=1e-5)
    assert loss.bound.dtype == torch.float32


# --- the schedule and the whole model ---


def test_the_learned_schedule_is_a_schedule():
    schedule = LearnedPolynomial(4, power_init=0.7).double()
    assert torch.allclose(schedule(), torch.full((4,), 0.7, dtype=torch.float64), rtol=1e-6)
    schedule.w.data = torch.tensor([-40.0, -1.0, 2.0, 60.0], dtype=torch.float64)
    powers = schedule()
    assert (powers > 0).all()
    assert torch.isfinite(powers).all()
    t = torch.linspace(1e-3, 1, 400, dtype=torch.float64)[:, None].requires_grad_()
    alpha = schedule.alpha(t, powers)
    assert torch.allclose(alpha[-1], torch.full((4,), EPS, dtype=torch.float64), rtol=1e-9)
    assert (alpha[:, 1:3].diff(dim=0) < 0).all()
    (slope,) = torch.autograd.grad(alpha[:, 2].sum(), t, retain_graph=True)
    assert torch.allclose(schedule.dalpha(t, powers)[:, 2], slope[:, 0], rtol=1e-9)
    ratio = schedule.dalpha(t, powers) / schedule.log_masked(t, powers).exp()
    assert torch.allclose(ratio[:, 1:3], schedule.weight(t, powers)[:, 1:3], rtol=1e-9)
    (alpha[1:-1].log().sum() + schedule.log_snr(t, powers)[1:-1].sum()).backward()
    assert schedule.w.grad is not None
    assert torch.isfinite(schedule.w.grad).all()


@pytest.mark.parametrize("power", [0.0, -1.0, math.nan, math.inf])
def test_an_impossible_initial_power_is_refused(power):
    with pytest.raises(UserError, match="must be a number above 0"):
        LearnedPolynomial(4, power)


def test_it_is_built_from_its_configuration():
    network = TransformerConfig(feature_dim=16, heads=2, layers=1)
    config = ModelConfig(objective="genmd4", power_init=0.7, vocab_size=9, length=8, network=network)
    model = build(config, seed=3)
    assert isinstance(model, GenMD4)
    assert "schedule.w" in model.state_dict()
    assert torch.allclose(model.schedule(), torch.tensor(0.7))
    tokens, slots = torch.arange(32).remainder(9).view(4, 8), torch.arange(4)
    loss = model(tokens, **model.noise(0, 0, slots, 4, 2, 8))
    loss.optimised.mean().backward()
    assert loss.optimised.dtype == torch.float32
    assert model.schedule.w.grad is not None
    assert model.schedule.w.grad.abs().max() > 0
