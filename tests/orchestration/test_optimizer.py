"""The learning-rate rule and the optimizer with its average, against plain formulas."""

import math

import pytest
import torch

from md4.model import ModelConfig, build
from md4.networks.transformer import TransformerConfig
from orchestration.optimizer import AdamWithEma, OptimizerConfig, learning_rate, parameter_groups


def test_rate_starts_at_zero_peaks_after_warmup_and_ends_at_zero():
    rates = [learning_rate(n, 2.0, 10, 110) for n in range(111)]
    assert rates[0] == 0
    assert rates[5] == pytest.approx(1.0)
    assert rates[10] == pytest.approx(2.0)
    assert rates[60] == pytest.approx(1.0)  # half way down the cosine
    assert rates[110] == pytest.approx(0, abs=1e-12)
    assert rates[10:] == sorted(rates[10:], reverse=True)


def test_constant_rate_stays_and_no_warmup_starts_at_the_peak():
    assert [learning_rate(n, 3.0, 2, 10, "constant") for n in (0, 1, 2, 9)] == [0, 1.5, 3.0, 3.0]
    assert learning_rate(0, 3.0, 0, 10) == 3.0


@pytest.mark.parametrize("fused", [False, True])
def test_adamw_with_average_follows_the_formulas(fused):
    torch.manual_seed(0)
    p = torch.nn.Parameter(torch.randn(3, dtype=torch.float32))
    lr, b1, b2, eps, decay, ema = 0.1, 0.8, 0.9, 1e-8, 0.2, 0.7
    optimizer = AdamWithEma([p], lr=lr, betas=(b1, b2), eps=eps, weight_decay=decay, ema=ema, fused=fused)
    x = p.detach().double().clone()
    m, v, average = torch.zeros(3).double(), torch.zeros(3).double(), x.clone()
    for n in range(1, 6):
        g = torch.randn(3)
        p.grad = g
        optimizer.step()
        x = x * (1 - lr * decay)
        m, v = b1 * m + (1 - b1) * g.double(), b2 * v + (1 - b2) * g.double() ** 2
        x = x - lr * (m / (1 - b1**n)) / ((v / (1 - b2**n)).sqrt() + eps)
        average = average + (1 - ema) * (x - average)
    torch.testing.assert_close(p.detach().double(), x, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(optimizer.state[p]["ema"].double(), average, rtol=1e-5, atol=1e-6)
    assert not math.isclose(float(average[0]), float(x[0]), rel_tol=1e-3)


def test_materialized_state_is_the_state_before_the_first_update():
    p, q = (torch.nn.Parameter(torch.tensor([1.0, -2.0])) for _ in range(2))
    early, late = AdamWithEma([p], lr=0.1, ema=0.5), AdamWithEma([q], lr=0.1, ema=0.5)
    early.materialize(early.param_groups[0], [p])
    assert early.state[p]["ema"].tolist() == [1.0, -2.0]
    assert set(early.state_names) < set(early.state[p])
    for parameter, optimizer in ((p, early), (q, late)):
        parameter.grad = torch.tensor([0.3, 0.4])
        optimizer.step()
    assert torch.equal(p, q)


def test_no_average_when_the_decay_is_zero():
    p = torch.nn.Parameter(torch.ones(2))
    optimizer = AdamWithEma([p], lr=0.1)
    p.grad = torch.ones(2)
    optimizer.step()
    assert optimizer.state_names == ("exp_avg", "exp_avg_sq")
    assert "ema" not in optimizer.state[p]


@pytest.mark.parametrize(("schedule_decay", "expected"), [(0.0, 1.0), (0.5, 1 - 0.1 * 0.5)])
def test_weight_decay_of_a_learned_schedule_is_a_setting_of_its_own(schedule_decay, expected):
    network = TransformerConfig(feature_dim=8, heads=1, layers=1)
    options = OptimizerConfig(weight_decay=0.25, schedule_weight_decay=schedule_decay)
    model = build(ModelConfig(objective="genmd4", vocab_size=5, length=4, network=network))
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = AdamWithEma(parameter_groups(model, options), lr=0.1)
    for p in model.parameters():
        p.grad = torch.zeros_like(p)  # what is left is the decay
    optimizer.step()
    for name, p in model.named_parameters():
        factor = expected if name == "schedule.w" else 1 - 0.1 * 0.25
        assert torch.allclose(p, factor * before[name], rtol=1e-6), name


def test_a_model_without_a_learned_schedule_has_one_group():
    model = build(ModelConfig(vocab_size=5, length=4, network=TransformerConfig(feature_dim=8, heads=1, layers=1)))
    (group,) = parameter_groups(model, OptimizerConfig(weight_decay=0.25))
    assert group["weight_decay"] == 0.25
    assert len(group["params"]) == len(list(model.parameters()))
