"""What all three networks promise: their start, what they may depend on, the null class, precision, recomputation."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from md4 import noise
from md4.networks.conditioning import NULL_LABEL
from md4.networks.transformer import Transformer, TransformerConfig
from md4.networks.unet import UNet, UNetConfig
from md4.networks.uvit import UViT, UViTConfig

V, B, CLASSES = 5, 3, 4
SHAPE = (8, 4, 2)  # height, width and channels differ, so that none is taken for another
LENGTH = 12

SMALL = {
    # With 64 channels a group of a norm has two, and what conditioning adds to one of them is not lost in it.
    UNet: {"feature_dim": 64, "layers": 1},
    UViT: {
        "feature_dim": 32, "layers": 1, "multipliers": (1, 2), "dit_layers": 2, "dit_heads": 2, "dit_width": 32
    },
    Transformer: {"feature_dim": 8, "heads": 2, "layers": 2},
}  # fmt: skip
CONFIGS = {UNet: UNetConfig, UViT: UViTConfig, Transformer: TransformerConfig}
IMAGES = pytest.mark.parametrize("kind", [UNet, UViT])
ALL = pytest.mark.parametrize("kind", [UNet, UViT, Transformer])
INPUTS = pytest.mark.parametrize(
    ("time_input", "classes"),
    [(True, 0), (False, 0), (True, CLASSES), (False, CLASSES)],
    ids=["time", "neither", "time and classes", "classes"],
)


def network(kind, classes=0, compute=torch.float32, stir=0.1, **options):
    """A small network in eval mode, its weights stirred so that nothing is zero."""
    config = CONFIGS[kind](**SMALL[kind] | options)
    shape = () if kind is Transformer else (SHAPE,)
    net = kind(config, *shape, V, classes, compute)
    net.initialise(0)
    with torch.no_grad():
        for name, p in net.named_parameters():
            values = noise.uniform(noise.key(1, name), torch.arange(p.numel())).view(p.shape)
            p.add_((stir * (2 * values - 1)).float())
    return net.eval()


def inputs(kind, classes=0) -> tuple[Tensor, Tensor, Tensor | None]:
    shape = (LENGTH,) if kind is Transformer else SHAPE
    draw = noise.uniform(noise.key(0, "inputs"), torch.arange(B * torch.Size(shape).numel())).view(B, *shape)
    labels = torch.arange(B) % classes if classes else None
    return (draw * (V + 1)).long(), torch.linspace(0.1, 0.9, B), labels


# --- the start ---


@IMAGES
@INPUTS
def test_starts_with_equal_logits_and_a_gradient_in_the_head_alone(kind, time_input, classes):
    net = network(kind, classes, stir=0.0, time_input=time_input)
    z, t, labels = inputs(kind, classes)
    logits = net(z, t, labels)
    assert logits.shape == (B, *SHAPE, V)
    assert (logits == 0).all()
    logits[..., 0].sum().backward()
    moved = {name for name, p in net.named_parameters() if p.grad is not None and p.grad.abs().max() > 0}
    assert moved == {"head.weight", "head.bias"}


@IMAGES
def test_initial_weights_have_the_stated_distribution(kind):
    """Deviations to 4 % (5 sampling deviations of 9216 values), truncation at two deviations of the parent law."""
    net = network(kind, 600, stir=0.0)
    for name, p in net.named_parameters():
        values, (*_, role, what) = p.detach(), ("", *name.split("."))
        if what == "bias" or role in ("head", "conv_out", "condition", "modulation", "unpatch"):
            assert (values == 0).all(), name
        elif role.endswith("norm"):
            assert (values == 1).all(), name
        elif name != "dit.position" and values.numel() >= 9216:
            expected = (values.shape[1] if role.endswith("embed") else values[0].numel()) ** -0.5
            assert values.std().item() == pytest.approx(expected, rel=0.04), name
            cut = (values.abs().max() / expected).item()
            assert (cut > 3) if role.endswith("embed") else (2.2 < cut < 2 / 0.87962566 + 1e-3), name


@IMAGES
def test_initialisation_is_a_function_of_seed_and_name(kind):
    first, second, deeper = network(kind, stir=0.0), network(kind, stir=0.0), network(kind, stir=0.0, layers=2)
    for name, p in first.named_parameters():
        assert torch.equal(p, second.get_parameter(name))
        if ".0." not in name and not name.startswith(("up", "down")):  # whose widths may depend on the depth
            assert torch.equal(p, deeper.get_parameter(name)), name
    assert not torch.equal(first.down[0].conv_in.weight, deeper.down[1].conv_in.weight)
    second.initialise(1)
    assert not torch.equal(first.embed.weight, second.embed.weight)


# --- what they depend on ---


@IMAGES
@INPUTS
def test_rows_do_not_see_each_other(kind, time_input, classes):
    net = network(kind, classes, time_input=time_input)
    z, t, labels = inputs(kind, classes)
    order = torch.tensor([2, 0, 1])
    shuffled = net(z[order], t[order], None if labels is None else labels[order])
    assert torch.allclose(shuffled, net(z, t, labels)[order], atol=1e-5)


@IMAGES
def test_every_number_sees_every_number(kind):
    net = network(kind)
    z, t, _ = inputs(kind)
    logits = net(z, t)
    for place in ((0, 0, 0), (7, 3, 1)):
        changed = z.clone()
        changed[:, *place] = (z[:, *place] + 1) % (V + 1)
        assert ((net(changed, t) - logits).abs().amax(-1) > 1e-6).all()


@IMAGES
def test_a_token_goes_in_and_comes_out_at_its_own_place(kind):
    """The order of the reference's weights: the channels' embeddings, and their logits, one after another."""
    net = network(kind)
    z, t, _ = inputs(kind)
    width = net.config.feature_dim
    with torch.no_grad():
        logits = net(z, t)
        net.head.bias[1 * V + 3] += 1  # channel 1, token 3
        difference = net(z, t) - logits
        assert torch.allclose(difference[..., 1, 3], torch.ones(B, 8, 4), atol=1e-5)
        difference[..., 1, 3] = 0
        assert (difference == 0).all()
        net.conv_in.weight[:, width:] = 0  # nothing of channel 1 gets in
        other = z.clone()
        other[..., 1] = (z[..., 1] + 1) % (V + 1)
        assert torch.equal(net(z, t), net(other, t))
        assert not torch.equal(net(z, t), net(z.flip(1), t))


@ALL
@INPUTS
def test_time_and_class_matter_exactly_where_they_should(kind, time_input, classes):
    net = network(kind, classes, time_input=time_input)
    z, t, labels = inputs(kind, classes)
    logits = net(z, t, labels)
    moved = (net(z, t + 0.05, labels) - logits).flatten(1).abs().amax(1)
    assert (moved > 1e-4).all() if time_input else (moved == 0).all()
    assert torch.equal(net(z, 0.3, labels), net(z, torch.full((B,), 0.3), labels))
    if classes:
        moved = (net(z, t, (labels + 1) % classes) - logits).flatten(1).abs().amax(1)
        assert (moved > 1e-4).all()
        with pytest.raises(ValueError, match="4 classes: labels"):
            net(z, t)


# --- the null class ---


@ALL
@pytest.mark.parametrize("time_input", [True, False])
def test_the_null_class_is_the_zero_vector(kind, time_input):
    net = network(kind, CLASSES, time_input=time_input)
    z, t, labels = inputs(kind, CLASSES)
    null = torch.full_like(labels, NULL_LABEL)
    without = net(z, t, null)
    mixed = torch.where(torch.tensor([True, False, True]), NULL_LABEL, labels)
    together = net(z, t, mixed)
    assert torch.allclose(together[[0, 2]], without[[0, 2]], atol=1e-5)
    assert torch.allclose(together[1], net(z, t, labels)[1], atol=1e-5)
    without.sum().backward()
    assert (net.conditioning.class_embed.weight.grad == 0).all()
    assert without.ne(net(z, t, labels)).any()
    with torch.no_grad():
        net.conditioning.class_embed.weight.zero_()
    assert torch.equal(net(z, t, labels), without)


# --- precision and memory ---


@IMAGES
@INPUTS
def test_bfloat16_compute_is_close_to_float32(kind, time_input, classes):
    exact = network(kind, classes, time_input=time_input)
    rough = network(kind, classes, torch.bfloat16, time_input=time_input)
    z, t, labels = inputs(kind, classes)
    targets = z % V

    def run(net):
        logits = net(z, t, labels)
        F.cross_entropy(logits.flatten(0, -2), targets.flatten()).backward()
        return logits, {name: p.grad for name, p in net.named_parameters()}

    (logits, gradients), (rough_logits, rough_gradients) = run(exact), run(rough)
    assert rough_logits.dtype == torch.float32
    error = (rough_logits - logits).norm() / logits.norm()
    assert 1e-5 < error < 0.03  # not float32 in disguise
    total = torch.stack([g.norm() for g in gradients.values()]).norm()
    for name, gradient in gradients.items():
        assert rough_gradients[name].dtype == torch.float32
        if gradient.norm() > 1e-4 * total:  # not one that is zero but for rounding
            assert F.cosine_similarity(gradient.flatten(), rough_gradients[name].flatten(), dim=0) > 0.98, name


@IMAGES
def test_an_outer_autocast_does_not_reach_the_head(kind):
    net = network(kind)
    z, t, _ = inputs(kind)
    with torch.autocast("cpu", torch.bfloat16):
        inside = net(z, t)
    assert torch.equal(inside, net(z, t))


@ALL
def test_recomputing_activations_changes_memory_alone(kind):
    """Dropout included: what is computed again draws the same random numbers again."""
    z, t, _ = inputs(kind)

    def run(again: bool) -> tuple[int, dict[str, Tensor]]:
        net = network(kind, dropout=0.3, checkpoint_activations=again).train()
        torch.manual_seed(0)
        kept = []
        with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x.numel()) or x, lambda x: x):
            logits = net(z, t)
        logits.square().sum().backward()
        return sum(kept), {name: p.grad for name, p in net.named_parameters()}

    (memory, gradients), (less, same) = run(False), run(True)
    assert less < 0.6 * memory
    for name, gradient in gradients.items():
        assert torch.equal(gradient, same[name]), name


@IMAGES
def test_where_dropout_falls(kind):
    """In the residual blocks, number by number, before the last convolution; and only while training."""
    net = network(kind, dropout=0.5).train()
    z, t, _ = inputs(kind)
    seen = []

    def keep(module: nn.Module, args, out):
        seen.append((args[0].detach(), out.detach()))

    net.up[0].dropout.register_forward_hook(keep)
    torch.manual_seed(0)
    first = net(z, t)
    before, after = seen[0]
    ratio = (after / before)[before != 0].round(decimals=3)
    assert set(ratio.unique().tolist()) == {0.0, 2.0}
    assert 0.4 < (ratio == 0).float().mean() < 0.6
    assert not torch.equal(first, net(z, t))
    net.eval()
    assert torch.equal(net(z, t), net(z, t))
