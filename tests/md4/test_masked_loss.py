"""The loss at hidden positions alone: equal to the plain loss, values and gradients, and never larger than a chunk."""

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from md4 import masked_loss
from md4.masked_loss import IGNORED, Head, Hidden, plain_scores, spread
from md4.model import ModelConfig, build
from md4.networks.transformer import TransformerConfig

V = 1500  # above PLAIN_UP_TO
CONFIG = ModelConfig(vocab_size=V, length=40, network=TransformerConfig(feature_dim=8, heads=2, layers=2))


@pytest.fixture
def small_chunks(monkeypatch):
    """Chunks of 64 rows, so that a few hundred positions take several, the last one not full."""
    monkeypatch.setattr(masked_loss, "CHUNK", 64 * V)


def problem(hidden_share: float, dtype=torch.float64, seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """x [7, 40, D], weight [V, D], targets [7, 40], powers [V], and a gradient [2, 7, 40] for the two scores."""
    draw = torch.Generator().manual_seed(seed)
    x = torch.randn(7, 40, 16, generator=draw, dtype=dtype)
    weight = torch.randn(V, 16, generator=draw, dtype=dtype)
    targets = torch.randint(0, V, (7, 40), generator=draw)
    targets = torch.where(torch.rand(7, 40, generator=draw) < hidden_share, targets, IGNORED)
    powers = torch.rand(V, generator=draw, dtype=dtype) + 0.5
    return x, weight, targets, powers, torch.randn(2, 7, 40, generator=draw, dtype=dtype)


def both(x: Tensor, weight: Tensor, targets: Tensor, powers: Tensor | None, slope: Tensor, chunked: bool):
    """(scores, their gradients by x, weight and powers) of one of the two forms."""
    x, weight = x.detach().requires_grad_(), weight.detach().requires_grad_()
    powers = None if powers is None else powers.detach().requires_grad_()
    if chunked:
        head = Head(16, V).to(weight.dtype)
        head.weight = torch.nn.Parameter(weight.detach())
        weight = head.weight
        rows = Hidden(targets).rows()
        scores = spread(head(x.flatten(0, 1)[rows], targets.flatten()[rows], powers), rows, targets)
    else:
        scores = plain_scores(x @ weight.T, targets, powers)
    total = (slope[0] * scores.log_likelihood).sum()
    wanted = [x, weight]
    if scores.power is not None:
        total = total + (slope[1] * scores.power).sum()
        wanted.append(powers)
    return scores, torch.autograd.grad(total, wanted)


@pytest.mark.parametrize("hidden_share", [0.0, 0.02, 0.5, 1.0])
@pytest.mark.parametrize("with_powers", [False, True])
def test_scores_and_gradients_equal_the_plain_ones(small_chunks, hidden_share, with_powers):
    x, weight, targets, powers, slope = problem(hidden_share)
    powers = powers if with_powers else None
    expected, wanted = both(x, weight, targets, powers, slope, chunked=False)
    found, got = both(x, weight, targets, powers, slope, chunked=True)
    for a, b in zip(expected, found, strict=True):
        assert (a is None) == (b is None)
        if a is not None and b is not None:
            torch.testing.assert_close(b, a, rtol=1e-12, atol=1e-12)
    for a, b in zip(wanted, got, strict=True):
        torch.testing.assert_close(b, a, rtol=1e-10, atol=1e-12)
    assert (found.log_likelihood[targets == IGNORED] == 0).all()


def test_scores_are_what_a_softmax_says():
    """By hand, for one position: logits (0, ln 2, ln 5) are probabilities 1/8, 2/8, 5/8."""
    logits = torch.tensor([[[1.0, 2.0, 5.0]]]).log()
    scores = plain_scores(logits, torch.tensor([[2]]), torch.tensor([8.0, 4.0, 1.6]))
    assert scores.log_likelihood.item() == pytest.approx(-0.4700036)
    assert scores.power is not None
    assert scores.power.item() == pytest.approx(1 + 1 + 1)


@pytest.mark.parametrize("scale", [1e-4, 1.0, 1e3])
def test_large_and_small_logits_are_safe_in_float32(small_chunks, scale):
    """The errors against float64 are those of the plain form, up to a factor."""
    x, weight, targets, powers, slope = (p.float().double() if p.is_floating_point() else p for p in problem(0.5))
    scores, wanted = both(x * scale, weight, targets, powers, slope, chunked=False)
    exact = [*scores, *wanted]
    errors = []
    for chunked in (False, True):
        found, got = both(x.float() * scale, weight.float(), targets, powers.float(), slope.float(), chunked)
        errors.append([float((a - b).abs().max() / b.abs().max()) for a, b in zip([*found, *got], exact, strict=True)])
    for plain, chunked in zip(*errors, strict=True):
        assert chunked <= 3 * plain + 1e-6, errors


def test_an_impossible_other_token_does_no_harm():
    x, weight, targets, powers, slope = problem(0.5)
    x[..., 0] = 1.0
    weight[0, 0] = -torch.inf
    found, got = both(x, weight, targets.clamp(max=V - 1).where(targets != 0, 1), powers, slope, chunked=True)
    assert torch.isfinite(found.log_likelihood).all()
    assert torch.isfinite(got[1]).all()


def test_half_precision_inputs_give_float32_scores_and_their_own_gradients(small_chunks):
    x, weight, targets, powers, slope = problem(0.5, torch.float32)
    x, weight = x.bfloat16(), weight.bfloat16()
    expected, wanted = both(x.float(), weight.float(), targets, powers, slope, chunked=False)
    with torch.autocast("cpu", torch.bfloat16):
        found, got = both(x, weight, targets, powers, slope, chunked=True)
    assert found.log_likelihood.dtype == torch.float32
    torch.testing.assert_close(found.log_likelihood, expected.log_likelihood, rtol=1e-5, atol=1e-5)
    for a, b, given in zip(wanted, got, (x, weight, powers), strict=True):
        assert b.dtype == given.dtype
        torch.testing.assert_close(b.float(), a, rtol=2e-2, atol=1e-2)


def test_hidden_positions_come_first_and_the_rest_fills_up():
    targets = torch.full((3, 100), IGNORED)
    targets[1, ::10] = 5
    rows = Hidden(targets).rows()
    assert rows.tolist()[:10] == [100 + 10 * i for i in range(10)]
    assert len(rows) == masked_loss.GRAIN
    assert len(set(rows.tolist())) == len(rows)
    assert len(Hidden(torch.full((2, 5), IGNORED)).rows()) == 10  # never empty, never more than there are


# --- in the network ---


def disturbed(config: ModelConfig, compute=torch.float32):
    model = build(config, compute=compute, seed=1)
    draw = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for p in model.parameters():
            p += 0.2 * torch.randn(p.shape, generator=draw)
    return model


def batch(rows: int = 4) -> tuple[Tensor, Tensor, Tensor]:
    draw = torch.Generator().manual_seed(3)
    tokens = torch.randint(0, V, (rows, 40), generator=draw)
    return tokens, (torch.arange(rows) + 0.4) / rows, torch.rand(rows, 40, generator=draw, dtype=torch.float64)


def gradients(model, tokens: Tensor, t: Tensor, uniforms: Tensor):
    model.zero_grad()
    loss = model(tokens, t, uniforms)
    loss.optimised.mean().backward()
    return loss.bound, {name: p.grad.clone() for name, p in model.named_parameters()}


@pytest.mark.parametrize("compute", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("objective", ["md4", "genmd4"])
def test_the_training_loss_of_a_model_is_the_plain_one(monkeypatch, small_chunks, compute, objective):
    model = disturbed(CONFIG.model_copy(update={"objective": objective}), compute)
    tokens, t, uniforms = batch()
    if model.masks_per_example > 1:
        uniforms = torch.stack([uniforms, uniforms.flip(1)], dim=1)
    chunked, got = gradients(model, tokens, t, uniforms)
    monkeypatch.setattr("md4.networks.transformer.PLAIN_UP_TO", V)
    plain, wanted = gradients(model, tokens, t, uniforms)
    torch.testing.assert_close(chunked, plain, rtol=1e-5, atol=0)
    # In bfloat16 the last bits of what enters the blocks' backward pass may round to a neighbour.
    tolerance = 1e-4 if compute == torch.float32 else 2e-2
    for name, gradient in wanted.items():
        assert (got[name] - gradient).norm() <= tolerance * gradient.norm(), name


class Largest(TorchDispatchMode):
    """Notes the number of elements of the largest tensor, of the vocabulary's width, that any operation returns."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor) and leaf.shape[-1:] == (V,):
                self.elements = max(self.elements, leaf.numel())
        return result


def test_training_makes_no_tensor_of_all_logits(monkeypatch, small_chunks):
    model = disturbed(CONFIG)
    tokens, t, uniforms = batch(8)
    with Largest() as chunked:
        gradients(model, tokens, t, uniforms)
    monkeypatch.setattr("md4.networks.transformer.PLAIN_UP_TO", V)
    with Largest() as plain:
        gradients(model, tokens, t, uniforms)
    assert plain.elements == tokens.numel() * V
    assert chunked.elements == 64 * V  # a chunk


def test_recomputed_blocks_change_nothing(small_chunks):
    tokens, t, uniforms = batch()
    network = CONFIG.network.model_copy(update={"checkpoint_activations": True})
    once, first = gradients(disturbed(CONFIG), tokens, t, uniforms)
    again, second = gradients(disturbed(CONFIG.model_copy(update={"network": network})), tokens, t, uniforms)
    assert torch.equal(once, again)
    assert all(torch.equal(first[name], second[name]) for name in first)
