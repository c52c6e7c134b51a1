"""The text network: what it starts as, what it may and may not depend on, and where its dropout falls."""

import math

import pytest
import torch
import torch.nn.functional as F
from pydantic import ValidationError

from md4 import noise
from md4.networks.conditioning import Conditioning, timestep_embedding
from md4.networks.transformer import ChannelDropout, Transformer, TransformerConfig, attend, rotate, rotations

SMALL = {"feature_dim": 8, "heads": 3, "layers": 2}
V, B, L = 11, 5, 16

VARIANTS = [
    pytest.param({}, 0, id="adaln_zero"),
    pytest.param({"mlp": "geglu", "conditioning": "adaln"}, 0, id="adaln geglu"),
    pytest.param({"time_input": False}, 0, id="no time"),
    pytest.param({"outside_embed": False, "mlp": "swiglu"}, 0, id="wide embedding"),
    pytest.param({}, 4, id="time and classes"),
    pytest.param({"time_input": False}, 4, id="classes alone"),
]


def network(options=None, classes: int = 0, compute=torch.float32, stir: float = 0.3, **more) -> Transformer:
    """A small network in eval mode, its weights stirred so that nothing is zero."""
    net = Transformer(TransformerConfig(**SMALL | (options or {}) | more), V, classes, compute)
    net.initialise(0)
    with torch.no_grad():
        for name, p in net.named_parameters():
            values = noise.uniform(noise.key(1, name), torch.arange(p.numel())).view(p.shape)
            p.add_((stir * (2 * values - 1)).float())
    return net.eval()


def inputs(classes: int = 0):
    draw = noise.uniform(noise.key(0, "inputs"), torch.arange(B * L)).view(B, L)
    z = (draw * (V + 1)).long()
    t = torch.linspace(0.1, 0.9, B)
    return z, t, torch.arange(B) % classes if classes else None


# --- the start ---


@pytest.mark.parametrize(("options", "classes"), VARIANTS)
def test_starts_with_equal_logits_and_a_gradient_in_the_head_alone(options, classes):
    net = network(options, classes, stir=0.0)
    z, t, labels = inputs(classes)
    logits = net(z, t, labels)
    assert logits.shape == (B, L, V)
    assert (logits == 0).all()
    logits[..., 0].sum().backward()
    moved = {name for name, p in net.named_parameters() if p.grad is not None and p.grad.abs().max() > 0}
    assert moved == {"head.weight"}


def test_blocks_start_as_the_identity_with_adaln_zero_only():
    for conditioning, identity in (("adaln_zero", True), ("adaln", False)):
        net = network(conditioning=conditioning, stir=0.0)
        seen = []
        net.blocks[1].register_forward_hook(lambda module, args, out, seen=seen: seen.append((args[0], out)))
        net(*inputs())
        before, after = seen[0]
        assert torch.equal(before, after) == identity


def test_initial_weights_have_the_stated_distribution():
    """Deviations to 2.5 % (4 sampling deviations of 16k values); truncation at two deviations of the parent law."""
    config = TransformerConfig(feature_dim=32, heads=4, layers=8, conditioning="adaln", outside_embed=False)
    net = Transformer(config, 500, 600)
    net.initialise(3)
    expected = {
        "embed.weight": 128**-0.5,
        "conditioning.class_embed.weight": 32**-0.5,
        "blocks.2.attention.wq.weight": 128**-0.5,
        "blocks.2.modulation.weight": 32**-0.5,
        "blocks.2.mlp.w1.weight": (2 / 8 / 128) ** 0.5,
        "blocks.2.mlp.w3.weight": (2 / 8 / 128) ** 0.5,
        "blocks.2.mlp.w2.weight": (2 / 8 / 352) ** 0.5,
    }
    parameters = dict(net.named_parameters())
    for name, std in expected.items():
        values = parameters[name].detach()
        assert values.std().item() == pytest.approx(std, rel=0.025), name
        assert abs(values.mean().item()) < 5 * std / values.numel() ** 0.5, name
        ratio = (values.abs().max() / std).item()
        if "embed" in name:
            assert ratio > 3  # a plain normal
        else:
            assert 2.2 < ratio < 2 / 0.87962566 + 1e-3
    for name, values in parameters.items():
        if name.endswith("bias") or name.startswith("head"):
            assert (values == 0).all(), name
    plain = Transformer(config.model_copy(update={"depth_scaled_init": False}), 500, 600)
    plain.initialise(3)
    assert plain.blocks[0].mlp.w2.weight.std().item() == pytest.approx(352**-0.5, rel=0.025)


def test_initialisation_is_a_function_of_seed_and_name():
    first, second = network(stir=0.0), network(stir=0.0)
    deeper = network(stir=0.0, layers=3, depth_scaled_init=False)
    for name, p in first.named_parameters():
        assert torch.equal(p, second.get_parameter(name))
        if ".mlp." not in name:  # whose variance depends on the depth
            assert torch.equal(p, deeper.get_parameter(name))
    assert not torch.equal(first.blocks[0].attention.wq.weight, first.blocks[1].attention.wq.weight)
    second.initialise(1)
    assert not torch.equal(first.embed.weight, second.embed.weight)


# --- what it depends on ---


@pytest.mark.parametrize(("options", "classes"), VARIANTS)
def test_rows_do_not_see_each_other(options, classes):
    """Permuted rows give permuted answers; other times and tokens in other rows change nothing."""
    net = network(options, classes)
    z, t, labels = inputs(classes)
    logits = net(z, t, labels)
    order = torch.tensor([3, 1, 4, 0, 2])
    shuffled = net(z[order], t[order], None if labels is None else labels[order])
    assert torch.allclose(shuffled, logits[order], atol=1e-5)
    other_z, other_t = z.flip(1).clone(), 1 - t
    other_z[2], other_t[2] = z[2], t[2]
    assert torch.allclose(net(other_z, other_t, labels)[2], logits[2], atol=1e-5)


@pytest.mark.parametrize(("options", "classes"), VARIANTS)
def test_every_position_sees_every_position_and_its_place(options, classes):
    net = network(options, classes)
    z, t, labels = inputs(classes)
    logits = net(z, t, labels)
    for place in (0, L - 1):
        changed = z.clone()
        changed[:, place] = (z[:, place] + 1) % (V + 1)
        difference = (net(changed, t, labels) - logits).abs().amax(-1)
        assert (difference > 1e-6).all()
    assert not torch.allclose(net(z.flip(1), t, labels).flip(1), logits, atol=1e-3)


@pytest.mark.parametrize(("options", "classes"), VARIANTS)
def test_time_and_class_matter_exactly_where_they_should(options, classes):
    net = network(options, classes)
    z, t, labels = inputs(classes)
    logits = net(z, t, labels)
    moved = (net(z, t + 0.05, labels) - logits).abs().amax((1, 2))
    assert (moved > 1e-4).all() if net.config.time_input else (moved == 0).all()
    assert torch.equal(net(z, 0.3, labels), net(z, torch.full((B,), 0.3), labels))
    assert torch.equal(net(z, torch.tensor(0.3), labels), net(z, torch.full((B,), 0.3), labels))
    if classes:
        moved = (net(z, t, (labels + 1) % classes) - logits).abs().amax((1, 2))
        assert (moved > 1e-4).all()
        with pytest.raises(ValueError, match="4 classes: labels"):
            net(z, t)


def test_time_features():
    """Sines then cosines; the first frequency is 1, the last 1/10000; an odd width ends in zeros."""
    x = torch.tensor([0.0, 1.0, 250.0])
    features = timestep_embedding(x, 7)
    assert features.shape == (3, 7)
    assert torch.allclose(features[:, 0], x.sin(), atol=1e-6)
    assert torch.allclose(features[:, 2], (x / 10000).sin(), atol=1e-6)
    assert torch.allclose(features[:, 3], x.cos(), atol=1e-6)
    assert torch.allclose(features[:, 1] ** 2 + features[:, 4] ** 2, torch.ones(3))
    assert torch.allclose(features[:, 1], (x / 100).sin(), atol=1e-6)
    assert (features[:, 6] == 0).all()


def test_the_time_comes_before_the_class_in_the_conditioning():
    """The order that the columns of the reference's weights stand in."""
    conditioning = Conditioning(8, classes=3, time_input=True)
    t, labels = torch.tensor([0.1, 0.9]), torch.tensor([2, 2])
    with torch.no_grad():
        assert not torch.allclose(*conditioning(t, labels))
        conditioning.dense_in.weight[:, :8] = 0
        assert torch.equal(*conditioning(t, labels))
        assert not torch.allclose(*conditioning(t, torch.tensor([2, 0])))


def test_rotation_turns_interleaved_pairs():
    """Against the definition in plain Python."""
    x = torch.arange(2 * 3 * 1 * 4, dtype=torch.float32).view(2, 3, 1, 4)
    turned = rotate(x, rotations(3, 4, x.device))
    for b in range(2):
        for position in range(3):
            for j in range(2):
                angle = position * 10000.0 ** (-2 * j / 4)
                a, c = x[b, position, 0, 2 * j].item(), x[b, position, 0, 2 * j + 1].item()
                expected = [a * math.cos(angle) - c * math.sin(angle), a * math.sin(angle) + c * math.cos(angle)]
                assert turned[b, position, 0, 2 * j : 2 * j + 2].tolist() == pytest.approx(expected, abs=1e-5)


def test_rotated_products_depend_on_distance_alone():
    q = torch.linspace(-1, 1, 16).expand(1, 40, 1, 16)
    k = torch.linspace(2, -1, 16).expand(1, 40, 1, 16)
    turn = rotations(40, 16, q.device)
    scores = torch.einsum("blhe,bmhe->lm", rotate(q, turn), rotate(k, turn))
    for distance in (-7, 0, 3):
        diagonal = scores.diagonal(distance)
        assert torch.allclose(diagonal, diagonal[:1].expand_as(diagonal), atol=1e-4)
    assert (scores[0, 1] - scores[1, 0]).abs() > 1e-2


def test_attention_is_the_scaled_softmax():
    """Value and gradients against the formula in float64 and the fused kernel; in bfloat16 the CPU path is our own."""
    shape = (3, 2, 20, 8)
    index = torch.arange(math.prod(shape))
    *exact, probe = (4 * noise.uniform(noise.key(i), index).view(shape) - 2 for i in range(4))

    def run(attention, dtype):
        q, k, v = (x.to(dtype).requires_grad_() for x in exact)
        out = attention(q, k, v)
        return [out, *torch.autograd.grad(out, (q, k, v), probe.to(out.dtype))]

    expected = run(lambda q, k, v: (q @ k.mT / 8**0.5).softmax(-1) @ v, torch.float64)
    for dtype, tolerance in ((torch.float32, 1e-6), (torch.bfloat16, 2e-2)):
        ours = run(lambda q, k, v: attend(q, k, v, 0.0), dtype)
        fused = run(F.scaled_dot_product_attention, dtype)
        for mine, kernel, true in zip(ours, fused, expected, strict=True):
            assert mine.dtype == dtype
            scale = true.detach().norm()
            assert (mine.double() - true).norm() < tolerance * scale
            assert (mine.double() - kernel.double()).norm() < tolerance * scale


def test_tables_made_while_sampling_serve_training():
    """Tensors born in inference mode cannot be differentiated; cached ones must not be."""
    net = network()
    z = torch.zeros(2, 23, dtype=torch.int64)  # a length that no other test uses
    with torch.inference_mode():
        net(z, 0.5)
    net(z, 0.5).sum().backward()
    assert net.embed.weight.grad is not None


# --- precision ---


@pytest.mark.parametrize(("options", "classes"), VARIANTS)
def test_bfloat16_compute_is_close_to_float32(options, classes):
    exact, rough = network(options, classes), network(options, classes, torch.bfloat16)
    z, t, labels = inputs(classes)
    targets = z % V

    def run(net):
        logits = net(z, t, labels)
        F.cross_entropy(logits.flatten(0, 1), targets.flatten()).backward()
        return logits, {name: p.grad for name, p in net.named_parameters()}

    (logits, gradients), (rough_logits, rough_gradients) = run(exact), run(rough)
    assert rough_logits.dtype == torch.float32
    error = (rough_logits - logits).norm() / logits.norm()
    assert 1e-5 < error < 0.02  # not float32 in disguise
    for name, gradient in gradients.items():
        assert rough.get_parameter(name).dtype == rough_gradients[name].dtype == torch.float32
        assert F.cosine_similarity(gradient.flatten(), rough_gradients[name].flatten(), dim=0) > 0.99, name


def test_an_outer_autocast_does_not_reach_the_head():
    net = network()
    z, t, _ = inputs()
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(net(z, t), net(z, t).float())
        assert net(z, t).dtype == torch.float32
        inside = net(z, t)
    assert torch.equal(inside, net(z, t))


# --- dropout ---


def test_channel_dropout_shares_its_draw_over_positions():
    """200 x 300 channels at rate 0.25: the dropped share to 5 standard deviations, false alarm 6e-7, fixed seed."""
    torch.manual_seed(0)
    dropout = ChannelDropout(0.25).train()
    x = torch.rand(200, 7, 300) + 1
    ratio = dropout(x) / x
    assert torch.allclose(ratio, ratio[:, :1].expand_as(ratio))
    values = ratio[:, 0]
    assert torch.allclose(values[values > 0], torch.tensor(1 / 0.75))
    dropped = (values == 0).double()
    assert abs(dropped.mean().item() - 0.25) < 5 * (0.25 * 0.75 / dropped.numel()) ** 0.5
    assert dropped.mean(0).std() < 0.05  # channels and examples are drawn apart
    assert dropped.mean(1).std() < 0.05
    assert torch.equal(dropout.eval()(x), x)


def test_attention_probabilities_are_dropped_one_by_one():
    """With v = identity the output is the probabilities: 65,536 of them, to 5 standard deviations, fixed seed."""
    torch.manual_seed(0)
    for dtype in (torch.float32, torch.bfloat16):
        q = torch.zeros(16, 4, 32, 32, dtype=dtype)
        probabilities = attend(q, q, torch.eye(32, dtype=dtype).expand_as(q), 0.4)
        dropped = (probabilities == 0).double()
        assert abs(dropped.mean().item() - 0.4) < 5 * (0.24 / dropped.numel()) ** 0.5
        assert probabilities.max().item() == pytest.approx(1 / 32 / 0.6, rel=1e-2)


@pytest.mark.parametrize("outside", [True, False])
def test_where_dropout_falls(outside):
    """After the attention and the MLP by channel; on the embedding one by one, and only on the wide one."""
    net = network(outside_embed=outside, dropout=0.5).train()
    seen = {}

    def keep(name):
        def hook(module, args, out):
            seen[name] = (args[0].detach(), out.detach())

        return hook

    net.lift.register_forward_hook(keep("lift"))
    net.blocks[0].attention.dropout.register_forward_hook(keep("attention"))
    net.blocks[0].mlp.dropout.register_forward_hook(keep("mlp"))
    torch.manual_seed(0)
    net(*inputs()[:2])
    for branch in ("attention", "mlp"):
        before, after = seen[branch]
        ratio = after / before
        assert torch.allclose(ratio, ratio[:, :1].expand_as(ratio))
        assert set(ratio.round(decimals=3).unique().tolist()) == {0.0, 2.0}
    before, after = seen["lift"]
    if outside:
        assert (after != 0).all()
    else:
        dropped = after == 0
        assert 0.4 < dropped.float().mean() < 0.6
        assert (dropped != dropped[:, :1]).any()
    assert not torch.equal(net(*inputs()[:2]), net(*inputs()[:2]))
    net.eval()
    assert torch.equal(net(*inputs()[:2]), net(*inputs()[:2]))


# --- the configuration ---


@pytest.mark.parametrize(("width", "hidden"), [(768, 2048), (1024, 2752), (256, 704), (64, 192)])
def test_hidden_width(width, hidden):
    assert TransformerConfig(feature_dim=64, heads=width // 64).hidden == hidden


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"feature_dim": 9}, "feature_dim is 9: rotary positions need an even number"),
        ({"feature_dim": 2}, "greater than or equal to 4"),
        ({"heads": 0}, "greater than or equal to 1"),
        ({"dropout": 1.0}, "less than 1"),
        ({"mlp": "relu"}, "'glu', 'swiglu' or 'geglu'"),
        ({"hidden": 3}, "Extra inputs are not permitted"),
    ],
)
def test_bad_shapes_are_refused(options, message):
    with pytest.raises(ValidationError, match=message):
        TransformerConfig(**options)
