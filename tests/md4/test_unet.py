"""The constant-resolution U-Net: its residual block against the formula, and the order of its skip connections."""

import pytest
import torch
import torch.nn.functional as F
from pydantic import ValidationError

from md4.networks.unet import PixelAttention, ResBlock, UNet, UNetConfig


def stirred(module, seed=0):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in module.parameters():
            p.copy_(torch.randn(p.shape, generator=generator) * 0.2)
    return module.eval()


def uniform_norm(x, groups):
    """Group norm written out, without weights: groups of neighbouring channels, eps 1e-6."""
    parts = x.unflatten(1, (groups, -1)).flatten(2)
    mean = parts.mean(2, keepdim=True)
    variance = (parts - mean).square().mean(2, keepdim=True)
    return ((parts - mean) / (variance + 1e-6).sqrt()).view_as(x)


@pytest.mark.parametrize("out", [64, 128])
def test_a_residual_block_is_its_formula(out):
    """The conditioning, unactivated, is added between the convolutions; a change of width has a matrix on the way."""
    block = stirred(ResBlock(128, out, 16, 0.0, torch.float32))
    x, condition = torch.randn(2, 128, 5, 3), torch.randn(2, 16)
    # A scale so small that eps counts.
    x = x * 1e-3
    with torch.no_grad():
        h = uniform_norm(x, 32) * block.in_norm.weight[:, None, None] + block.in_norm.bias[:, None, None]
        h = F.conv2d(h * h.sigmoid(), block.conv_in.weight, block.conv_in.bias, padding=1)
        h = h + (condition @ block.condition.weight.T)[:, :, None, None]
        h = uniform_norm(h, 32) * block.out_norm.weight[:, None, None] + block.out_norm.bias[:, None, None]
        h = F.conv2d(h * h.sigmoid(), block.conv_out.weight, block.conv_out.bias, padding=1)
        if out == 128:
            assert block.skip is None
            expected = x + h
        else:
            expected = torch.einsum("oi,bihw->bohw", block.skip.weight[:, :, 0, 0], x) + h
            expected = expected + block.skip.bias[:, None, None]
        assert torch.allclose(block(x, condition), expected, atol=1e-5)


def test_attention_mixes_all_pixels_with_one_head():
    attention = stirred(PixelAttention(32, torch.float32))
    x = torch.randn(2, 32, 3, 5)
    with torch.no_grad():
        h = uniform_norm(x, 32) * attention.in_norm.weight[:, None, None] + attention.in_norm.bias[:, None, None]
        h = h.flatten(2).mT
        q, k, v = attention.wq(h), attention.wk(h), attention.wv(h)
        mixed = attention.wo((q @ k.mT / 32**0.5).softmax(-1) @ v)
        assert torch.allclose(attention(x), x + mixed.mT.view_as(x), atol=1e-5)


def test_the_way_up_reads_the_way_down_from_its_end():
    net = stirred(UNet(UNetConfig(feature_dim=32, layers=2), (4, 4, 1), 3))
    outputs = {}
    for name in ("conv_in", "down.0", "down.1"):
        net.get_submodule(name).register_forward_hook(lambda m, args, out, name=name: outputs.update({name: out}))
    reads = []
    for block in net.up:
        block.register_forward_hook(lambda m, args, out: reads.append((args[0], out)))
    middle = []
    net.middle_out.register_forward_hook(lambda m, args, out: middle.append(out))
    with torch.no_grad():
        net(torch.zeros(1, 4, 4, 1, dtype=torch.int64), 0.5)
    below = [middle[0], reads[0][1], reads[1][1]]
    for (read, _), first, name in zip(reads, below, ("down.1", "down.0", "conv_in"), strict=True):
        assert torch.equal(read, torch.cat((first, outputs[name]), dim=1)), name


def test_with_one_channel_a_group_the_norms_undo_the_conditioning():
    """The published width has four channels a group. At 32 channels, time and class are invisible: worth knowing."""
    z = torch.zeros(1, 4, 4, 1, dtype=torch.int64)
    moved = {}
    for width in (32, 64):
        net = stirred(UNet(UNetConfig(feature_dim=width, layers=1), (4, 4, 1), 3))
        moved[width] = (net(z, 0.1) - net(z, 0.9)).abs().max().item()
    assert moved[32] < 1e-4 < 1e-2 < moved[64]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"feature_dim": 48}, "multiple of 32"),
        ({"layers": 0}, "greater than or equal to 1"),
        ({"heads": 3}, "Extra inputs are not permitted"),
        ({"dropout": 1.0}, "less than 1"),
    ],
)
def test_bad_shapes_are_refused(options, message):
    with pytest.raises(ValidationError, match=message):
        UNetConfig(**options)
