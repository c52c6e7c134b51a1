"""Times, masks and the loss: against enumeration, against hand computation, and against what the bound must be."""

import math

import numpy as np
import pytest
import torch
from torch import nn

from md4.errors import UserError
from md4.objectives import MD4, antithetic, bits_per_token, global_times, mask_uniforms, stratified_times
from md4.schedules import parse_schedule
from tests.md4.oracle import Toy

SCHEDULES = ["linear", "cosine", "poly2", "poly0.5"]


class Table(nn.Module):
    """A network that answers with fixed logits [L, V] whatever it is asked, and remembers what it was shown."""

    def __init__(self, logits: torch.Tensor):
        super().__init__()
        self.table = nn.Parameter(logits)

    def forward(self, z, t, labels=None):
        self.shown = (z, t, labels)
        return self.table.expand(len(z), -1, -1)


# --- times ---


def test_antithetic_times_are_one_shifted_grid():
    assert torch.allclose(antithetic(0.3, 4), torch.tensor([0.3, 0.55, 0.8, 0.05], dtype=torch.float64))
    for size in (1, 49, 98, 103, 512):  # some of which give the reference's grid a point too many
        assert antithetic(0.99, size).shape == (size,)


def test_times_never_reach_1():
    almost = torch.tensor(1 - 2.0**-53, dtype=torch.float64)
    t = stratified_times(almost, torch.arange(1000), 1000)
    assert (t >= 0).all()
    assert (t < 1).all()


@pytest.mark.parametrize(("batch", "slices"), [(16, 1), (16, 4), (16, 16), (24, 8), (512, 32), (60, 5)])
def test_times_of_a_global_batch_are_one_stratified_grid(batch, slices):
    t = global_times(3, 17, torch.arange(batch), batch, slices)
    assert t.dtype == torch.float64
    assert torch.allclose(t.sort().values.diff(), torch.full((batch - 1,), 1 / batch, dtype=torch.float64))
    assert t.min() < 1 / batch


@pytest.mark.parametrize(("batch", "slices"), [(16, 4), (512, 32), (60, 5)])
def test_every_slice_spans_all_times_evenly(batch, slices):
    """Each slice's times are an even grid by themselves, up to the wrap from 1 to 0 within one cell."""
    size = batch // slices
    for part in range(slices):
        slots = torch.arange(part * size, (part + 1) * size)
        t = global_times(3, 17, slots, batch, slices).sort().values
        gaps = torch.cat((t.diff(), t[:1] + 1 - t[-1:]))
        assert torch.allclose(gaps, torch.full((size,), 1 / size, dtype=torch.float64))


def test_times_are_a_function_of_seed_step_and_slot_alone():
    slots = torch.arange(64)
    whole = global_times(5, 9, slots, 64, 8)
    share = torch.tensor([40, 3, 3, 63])
    assert torch.equal(global_times(5, 9, share, 64, 8), whole[share])
    assert not torch.equal(global_times(5, 10, slots, 64, 8), whole)
    assert not torch.equal(global_times(6, 9, slots, 64, 8), whole)


def test_offsets_are_uniform_over_steps():
    """Kolmogorov-Smirnov distance of 2,000 offsets below 1.95 / sqrt(n): false alarm 1e-3, the seed is fixed."""
    n = 2000
    u = torch.stack([global_times(0, step, torch.tensor([0]), 1, 1) for step in range(n)]).flatten().sort().values
    grid = torch.arange(1, n + 1, dtype=torch.float64) / n
    assert (u - grid).abs().max() < 1.95 / n**0.5


def test_slices_must_divide_the_batch():
    with pytest.raises(UserError, match="10 examples cannot be cut into 4 equal slices"):
        global_times(0, 0, torch.arange(10), 10, 4)


def test_mask_uniforms_are_a_function_of_seed_step_and_slot_alone():
    whole = mask_uniforms(5, 9, torch.arange(64), 100)
    assert whole.shape == (64, 100)
    share = torch.tensor([40, 3, 63])
    assert torch.equal(mask_uniforms(5, 9, share, 100), whole[share])
    assert torch.equal(mask_uniforms(5, 9, share, 30), whole[share, :30])
    assert whole.unique().numel() == whole.numel()
    for other in (mask_uniforms(6, 9, torch.arange(64), 100), mask_uniforms(5, 10, torch.arange(64), 100)):
        assert not torch.isin(other, whole).any()


def test_noise_is_what_the_loss_asks_for_and_may_be_cut_into_micro_batches():
    slots = torch.arange(16)
    model = MD4(Table(torch.randn(5, 3)), parse_schedule("linear"), 3)
    noise = model.noise(5, 9, slots, 16, 4, 5)
    assert torch.equal(noise["t"], global_times(5, 9, slots, 16, 4))
    assert torch.equal(noise["uniforms"], mask_uniforms(5, 9, slots, 5))
    tokens = torch.arange(80).remainder(3).view(16, 5)
    whole = model(tokens, **noise)
    assert not whole.bound.requires_grad
    assert torch.equal(whole.bound, whole.optimised)
    part = model(tokens[6:10], **{name: value[6:10] for name, value in noise.items()})
    assert torch.equal(part.bound, whole.bound[6:10])


# --- corruption ---


def test_a_position_stays_exactly_if_its_uniform_is_below_alpha():
    model = Toy(vocabulary=5, length=2).model("linear", eps=0.0)
    tokens = torch.tensor([[4, 0], [1, 2]])
    uniforms = torch.tensor([[0.2499, 0.25], [0.75, 0.7501]], dtype=torch.float64)
    z = model.corrupt(tokens, torch.tensor([0.75, 0.25]), uniforms)
    assert z.tolist() == [[4, 5], [5, 5]]


@pytest.mark.parametrize("name", SCHEDULES)
def test_as_many_are_hidden_as_the_schedule_says(name):
    """Four times of 20,000 positions each, to 5 standard deviations: false alarm 2e-6 a schedule, the seed is fixed."""
    n, t = 20_000, torch.tensor([0.05, 0.4, 0.8, 1.0], dtype=torch.float64)
    model = MD4(nn.Identity(), parse_schedule(name), 3)
    z = model.corrupt(torch.zeros(4, n, dtype=torch.int64), t, mask_uniforms(0, 0, torch.arange(4), n))
    expected = model.schedule.masked(t)
    error = ((z == 3).double().mean(1) - expected).abs() / (expected * (1 - expected) / n).sqrt()
    assert (error < 5).all()


# --- the loss ---


def test_loss_is_weight_times_cross_entropy_of_hidden_tokens():
    """Every number by hand, in Python's doubles."""
    logits = torch.tensor([[0.5, -1.0, 2.0], [0.0, 0.0, 0.0], [-3.0, 1.0, 0.25]])
    model = MD4(Table(logits), parse_schedule("cosine"), 3)
    tokens = torch.tensor([[2, 1, 0], [0, 0, 1]])
    uniforms = torch.tensor([[0.999, 0.0001, 0.95], [0.0, 0.0, 0.0]])
    t = torch.tensor([0.3, 0.9])
    nats = model(tokens, t, uniforms).optimised - model.reconstruction(3)

    shown, _, _ = model.network.shown
    assert shown.tolist() == [[3, 1, 3], [0, 0, 1]]
    log_p = [[x - math.log(sum(math.exp(y) for y in row)) for x in row] for row in logits.tolist()]
    t0 = 0.3
    alpha = (1 - 2e-4) * (1 - math.cos(math.pi / 2 * (1 - t0))) + 1e-4
    slope = -(1 - 2e-4) * math.pi / 2 * math.sin(math.pi / 2 * (1 - t0))
    assert nats[0].item() == pytest.approx(slope / (1 - alpha) * (log_p[0][2] + log_p[2][0]), rel=1e-5)
    assert nats[1].item() == pytest.approx(0, abs=1e-9)
    assert nats.dtype == torch.float32


def test_visible_positions_cost_nothing_and_teach_nothing():
    """Not even where the network's answer for them is not finite."""
    logits = torch.zeros(3, 4)
    logits[1, 2] = -math.inf
    model = MD4(Table(logits), parse_schedule("linear"), 4)
    tokens, uniforms = torch.tensor([[0, 2, 1]]), torch.tensor([[0.99, 0.0, 0.99]])
    nats = model(tokens, torch.tensor([0.5]), uniforms).optimised
    nats.sum().backward()
    assert nats.item() == pytest.approx((2 * 0.9998 / 0.5 + 3e-4) * math.log(4), rel=1e-4)
    assert (model.network.table.grad[1] == 0).all()
    assert (model.network.table.grad[[0, 2]] != 0).all()


@pytest.mark.parametrize("continuous", [True, False])
def test_time_0_is_harmless(continuous):
    """t = 0 can be drawn; a power below 1 has an infinite slope there."""
    model = MD4(Table(torch.zeros(2, 4)), parse_schedule("poly0.5"), 4, continuous=continuous)
    nats = model(torch.zeros(1, 2, dtype=torch.int64), torch.zeros(1), torch.full((1, 2), 0.5)).optimised
    nats.sum().backward()
    assert torch.isfinite(nats).all()
    assert torch.isfinite(model.network.table.grad).all()


def expected_diffusion(model: MD4, x: torch.Tensor, nodes: int) -> float:
    """The exact expectation of the loss of one sequence x [L] over masks (enumerated) and times, no reconstruction.

    Times by Gauss-Legendre quadrature in continuous time, all of them in discrete time.
    """
    length = len(x)
    hidden = torch.cartesian_prod(*[torch.tensor([0.0, 1.0])] * length).bool()  # [2^L, L]
    if model.continuous:
        points, weights = map(torch.from_numpy, np.polynomial.legendre.leggauss(nodes))
        times, weights = (points + 1) / 2, weights / 2
    else:
        times = (torch.arange(model.timesteps, dtype=torch.float64) + 0.5) / model.timesteps
        weights = torch.full_like(times, 1 / model.timesteps)
    total = 0.0
    for t, weight in zip(times, weights, strict=True):
        masked = model.schedule.masked(model.used_times(t[None]))
        chance = torch.where(hidden, masked, 1 - masked).prod(1)
        uniforms = hidden.double()  # 1 hides, 0 keeps
        nats = model(x.expand(len(hidden), -1), t.expand(len(hidden)), uniforms).bound
        total += (weight * (chance * nats.double()).sum()).item()
    return total - model.reconstruction(length)


@pytest.mark.parametrize("name", ["linear", "cosine", "poly2"])
def test_expected_loss_of_the_true_posterior_is_the_negative_log_likelihood(name):
    """The bound is tight for a network that knows the law: E[loss] = -ln p(x) for every x and every schedule.

    The only exact test of the weight, the masking and the cross-entropy together. eps -> 0, where it holds.
    """
    toy = Toy(vocabulary=2, length=3)
    model = toy.model(name, eps=1e-9)
    for i, x in enumerate(toy.sequences):
        assert expected_diffusion(model, x, nodes=24) == pytest.approx(-toy.law[i].log().item(), rel=2e-5)


def test_discrete_loss_bounds_and_approaches_the_likelihood():
    toy = Toy(vocabulary=2, length=3)
    for i, x in enumerate(toy.sequences):
        exact = -toy.law[i].log().item()
        gaps = [
            expected_diffusion(toy.model("cosine", eps=1e-9, continuous=False, timesteps=steps), x, 0) - exact
            for steps in (1, 8, 64)
        ]
        # One step predicts every token by itself: the sum of the marginals' surprises.
        one_step = toy.cross_entropy(x, 1.0, timed=False)[1][-1].item()
        assert gaps[0] == pytest.approx(one_step - exact, abs=1e-5)
        assert abs(gaps[2]) < max(0.25 * abs(gaps[1]), 1e-5)
        assert abs(gaps[1]) < max(0.5 * abs(gaps[0]), 1e-5)
    four_steps = toy.model("linear", eps=1e-9, continuous=False, timesteps=4)
    surprises = torch.tensor([expected_diffusion(four_steps, x, 0) for x in toy.sequences], dtype=torch.float64)
    assert (toy.law * (surprises + toy.law.log())).sum() > 1e-4  # a divergence: the price of four steps


def test_drawn_times_and_masks_estimate_the_likelihood():
    """Mean of 200 global batches of 64 draws against -ln p(x) + eps terms, within 5 standard errors.

    Batches are independent, the draws inside one are stratified, so the error comes from the batches. False alarm 1e-6,
    the seed is fixed.
    """
    toy = Toy(vocabulary=3, length=4)
    model = toy.model("linear")
    x = toy.sequences[int(toy.law.argmin())]
    slots = torch.arange(64)
    means = torch.stack(
        [model(x.expand(64, -1), **model.noise(1, step, slots, 64, 8, toy.length)).bound.mean() for step in range(200)]
    ).double()
    exact = -toy.law.min().log().item()
    slack = toy.length * 1e-4 * 12  # what eps = 1e-4 leaves out at both ends: at most eps max(C) a token
    assert abs(means.mean().item() - exact) < 5 * means.std().item() / 200**0.5 + slack


@pytest.mark.parametrize("name", SCHEDULES)
def test_discrete_weight_is_the_papers_form(name):
    """T expm1(lambda_t - lambda_s) alpha_s, as the paper has it, and it tends to the continuous weight."""
    schedule = parse_schedule(name)
    model = MD4(nn.Identity(), schedule, 27, continuous=False, timesteps=16)
    t = torch.arange(1, 17, dtype=torch.float64) / 16
    s = t - 1 / 16
    published = 16 * torch.expm1(schedule.log_snr(t) - schedule.log_snr(s)) * schedule.alpha(s)
    assert torch.allclose(model.loss_weight(t), published, rtol=1e-9)
    fine = MD4(nn.Identity(), schedule, 27, continuous=False, timesteps=10**6)
    inside = torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64)
    assert torch.allclose(fine.loss_weight(inside), schedule.weight(inside), rtol=1e-4)


def test_discrete_time_moves_to_the_end_of_its_step():
    model = MD4(Table(torch.zeros(1, 2)), parse_schedule("linear"), 2, continuous=False, timesteps=4)
    t = torch.tensor([0.0, 0.2499, 0.25, 0.74, 0.9999, 1.0])
    used = model.used_times(t)
    assert used.tolist() == [0.25, 0.25, 0.5, 0.75, 1.0, 1.0]
    model(torch.zeros(6, 1, dtype=torch.int64), t, torch.full((6, 1), 0.6))
    z, shown, _ = model.network.shown
    assert torch.equal(shown, used)  # the network sees what the mask saw
    assert z[:, 0].tolist() == [0, 0, 2, 2, 2, 2]


def test_the_loss_includes_the_reconstruction_term():
    for vocabulary, bits in ((27, 4.755e-4), (256, 8.0e-4), (50257, 1.562e-3)):
        model = MD4(Table(torch.zeros(8, vocabulary)), parse_schedule("linear"), vocabulary)
        nothing_hidden = model(torch.zeros(2, 8, dtype=torch.int64), torch.full((2,), 0.5), torch.zeros(2, 8))
        for nats in (nothing_hidden.optimised, nothing_hidden.bound):
            assert bits_per_token(nats, 8)[1].item() == pytest.approx(bits, rel=1e-3)
        assert bits_per_token(torch.tensor(256 * math.log(2.0)), 256).item() == pytest.approx(1)


def test_logits_are_read_without_gradient_and_without_dropout():
    class Noisy(nn.Module):
        def __init__(self):
            super().__init__()
            self.dropout = nn.Dropout(0.5)
            self.weight = nn.Parameter(torch.ones(2, 3, 4))

        def forward(self, z, t, labels=None):
            return self.dropout(self.weight) * 1

    model = MD4(Noisy(), parse_schedule("linear"), 4)
    logits = model.logits(torch.zeros(2, 3, dtype=torch.int64), 0.5)
    assert not logits.requires_grad
    assert (logits == 1).all()
    assert model.training
    assert model.network.dropout.training
