"""Schedules against calculus, against float64, and against their own inverses."""

import math

import pytest
import torch

from md4.errors import UserError
from md4.schedules import EPS, Cosine, Linear, Polynomial, parse_schedule

NAMES = ["linear", "cosine", "poly0.5", "poly1", "poly2", "poly3.7"]
INSIDE = torch.linspace(0.001, 0.999, 997, dtype=torch.float64)


def exact_hidden(name: str, t: float) -> float:
    """1 - the unsqueezed curve in Python's double arithmetic, from the definitions."""
    if name == "linear":
        return t
    if name == "cosine":
        return math.sin(math.pi / 2 * t)  # = cos(pi/2 (1 - t)), without its cancellation
    return t ** float(name.removeprefix("poly"))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("eps", [EPS, 0.01])
def test_runs_from_almost_visible_to_almost_hidden(name, eps):
    schedule = parse_schedule(name, eps)
    t = torch.linspace(0, 1, 1001, dtype=torch.float64)
    alpha = schedule.alpha(t)
    assert alpha[0].item() == pytest.approx(1 - eps, rel=1e-12)
    assert alpha[-1].item() == pytest.approx(eps, rel=1e-12)
    assert (alpha.diff() < 0).all()
    assert (alpha + schedule.masked(t) - 1).abs().max() < 1e-15


@pytest.mark.parametrize("name", NAMES)
def test_slope_is_the_derivative(name):
    schedule = parse_schedule(name)
    t = INSIDE.clone().requires_grad_()
    (by_autograd,) = torch.autograd.grad(schedule.alpha(t).sum(), t)
    assert torch.allclose(schedule.dalpha(INSIDE), by_autograd, rtol=1e-9, atol=1e-12)
    h = 1e-6
    by_difference = (schedule.masked(INSIDE - h) - schedule.masked(INSIDE + h)) / (2 * h)
    assert torch.allclose(schedule.dalpha(INSIDE), by_difference, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize(
    ("name", "closed"),
    [
        ("linear", lambda t: -1 / t),
        ("poly0.5", lambda t: -0.5 / t),
        ("poly3", lambda t: -3 / t),
        ("cosine", lambda t: -math.pi / 2 * torch.tan(math.pi / 2 * (1 - t))),
    ],
)
def test_weight_without_squeeze_has_the_published_form(name, closed):
    """Section 4.1 of the paper gives alpha' / (1 - alpha) for eps = 0."""
    assert torch.allclose(parse_schedule(name, eps=0.0).weight(INSIDE), closed(INSIDE), rtol=1e-9)


@pytest.mark.parametrize("name", NAMES)
def test_float32_keeps_its_precision_at_both_ends(name):
    """1 - alpha near t = 0, and alpha near t = 1, to a few roundings; formed by subtraction they lose three digits."""
    schedule = parse_schedule(name)
    near_0 = torch.tensor([0.0, 1e-7, 1e-6, 1e-5, 1e-4, 1e-3, 1e-2])
    masked = schedule.masked(near_0)
    assert masked.dtype == torch.float32
    exact = torch.tensor([(1 - 2 * EPS) * exact_hidden(name, t) + EPS for t in near_0.tolist()], dtype=torch.float64)
    assert ((masked.double() - exact) / exact).abs().max() < 4e-7
    by_subtraction = 1 - schedule.alpha(near_0)
    assert ((by_subtraction.double() - exact) / exact).abs().max() > 1e-4

    near_1 = 1 - torch.tensor([0.0, 2.0**-22, 2.0**-18, 2.0**-14, 2.0**-10])
    exact = torch.tensor(
        [(1 - 2 * EPS) * (1 - exact_hidden(name, t)) + EPS for t in near_1.tolist()], dtype=torch.float64
    )
    assert ((schedule.alpha(near_1).double() - exact) / exact).abs().max() < 1e-6
    assert (schedule.log_snr(near_1).double() - (exact / (1 - exact)).log()).abs().max() < 1e-5


@pytest.mark.parametrize("name", NAMES)
def test_inverses_return_the_time(name):
    schedule = parse_schedule(name)
    late = INSIDE[INSIDE > 0.05]  # a steep power leaves no trace of an early t in a float64 alpha
    assert torch.allclose(schedule.inverse(schedule.alpha(late)), late, rtol=0, atol=1e-9)
    assert torch.allclose(schedule.inverse_masked(schedule.masked(INSIDE)), INSIDE, rtol=0, atol=1e-9)
    tiny = torch.tensor([1e-5, 1e-4], dtype=torch.float64)
    assert torch.allclose(schedule.inverse(schedule.alpha(1 - tiny)), 1 - tiny, rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", NAMES)
def test_inverses_stay_inside_the_unit_interval(name):
    schedule = parse_schedule(name)
    beyond = torch.tensor([-0.5, 0.0, EPS / 2, 1 - EPS / 2, 1.0, 1.5], dtype=torch.float64)
    ends = torch.tensor([0.0, 0, 0, 1, 1, 1], dtype=torch.float64)
    assert torch.equal(schedule.inverse_masked(beyond), ends)
    assert torch.equal(schedule.inverse(beyond), 1 - ends)


def test_precision_follows_the_argument_but_not_below_float32():
    schedule = Cosine()
    t = torch.tensor([0.25, 0.5])
    for method in (schedule.alpha, schedule.masked, schedule.weight, schedule.log_snr, schedule.inverse):
        assert method(t.double()).dtype == torch.float64
        assert method(t).dtype == torch.float32
        assert method(t.bfloat16()).dtype == torch.float32
    assert schedule.alpha(0.25).dtype == torch.float64
    assert schedule.alpha(0.25).item() == schedule.alpha(t.double())[0].item()


@pytest.mark.parametrize("name", [*NAMES, "poly1e-05"])
def test_names_round_trip(name):
    schedule = parse_schedule(name)
    assert str(schedule) == schedule.name == name
    assert parse_schedule(schedule.name) == schedule


def test_schedules_are_equal_by_value():
    assert parse_schedule("poly2") == Polynomial(2.0) != Polynomial(2.0, eps=0.01)
    assert parse_schedule("poly2.0").name == "poly2"
    assert Linear() != Cosine()


@pytest.mark.parametrize("name", ["", "sine", "poly", "polyx", "poly-1", "poly0", "polynan", "poly1e999", "poly 2"])
def test_unknown_names_are_refused(name):
    with pytest.raises(UserError, match="allowed are 'linear', 'cosine' and 'poly'"):
        parse_schedule(name)


def test_a_power_must_be_positive():
    with pytest.raises(UserError, match=r"-1\.0: it must be a number above 0"):
        Polynomial(-1.0)
