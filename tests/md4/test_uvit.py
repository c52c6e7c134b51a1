"""The U-ViT and its diffusion transformer: positions, patches, sizes, and what conditioning does where."""

import math

import pytest
import torch
import torch.nn.functional as F
from pydantic import ValidationError

from md4.networks.dit import Block, DiT, position_table
from md4.networks.uvit import BlockPlan, ConditionalNorm, ResBlock, UViT, UViTConfig, double, halve, uvit_plan


def stirred(module, seed=0):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in module.parameters():
            p.copy_(torch.randn(p.shape, generator=generator) * 0.2)
    return module.eval()


def small_dit(**options) -> DiT:
    settings = {
        "channels": 3, "height": 4, "width_pixels": 6, "width": 8, "layers": 1, "heads": 2, "dim": 5, "dropout": 0.0,
        "recompute": False, "compute": torch.float32,
    }  # fmt: skip
    return DiT(**settings | options)


# --- the diffusion transformer ---


def test_positions_are_sines_and_cosines_of_column_then_row():
    """Against the definition in plain Python."""
    table = position_table(2, 3, 8)
    for row in range(2):
        for column in range(3):
            angles = [[place * 10000.0 ** (-i / 2) for i in range(2)] for place in (column, row)]
            expected = [f(angle) for half in angles for f in (math.sin, math.cos) for angle in half]
            assert table[row * 3 + column].tolist() == pytest.approx(expected, abs=1e-6)


def test_patches_are_read_row_by_row_and_put_back_where_they_were():
    """With no blocks and an inverse pair of projections, every pixel comes back to its place."""
    dit = stirred(small_dit(channels=1, width=4, layers=0, dim=None))
    with torch.no_grad():
        dit.patches.weight.copy_(torch.eye(4).view(4, 1, 2, 2))  # a patch's pixels, row by row
        dit.patches.bias.zero_()
        dit.position.zero_()
        dit.norm.weight.fill_(1)
        dit.unpatch.weight.copy_(torch.eye(4))
        dit.unpatch.bias.zero_()
        x = torch.rand(2, 1, 4, 6) + 0.1
        seen = []
        dit.norm.register_forward_hook(lambda m, args, out: seen.append((args[0], out)))
        back = dit(x, None)
        before, after = seen[0]
        assert torch.equal(before[0, 4], x[0, 0, 2:, 2:4].flatten())  # patch 4 of 2 x 3
        scale = (after / before).mean(2).view(2, 1, 2, 3).repeat_interleave(2, 2).repeat_interleave(2, 3)
        assert torch.allclose(back, x * scale, atol=1e-5)


def test_a_patch_lists_its_channels_fastest():
    dit = stirred(small_dit(layers=0, dim=None))
    with torch.no_grad():
        dit.unpatch.weight.zero_()
        dit.unpatch.bias.copy_(torch.arange(12.0))
        out = dit(torch.zeros(1, 3, 4, 6), None)
    for channel in range(3):
        for row in range(4):
            for column in range(6):
                assert out[0, channel, row, column] == (row % 2 * 2 + column % 2) * 3 + channel


def test_a_conditioned_block_is_its_formula():
    """Shift, scale and gate of the attention, then of the MLP; layer norms without weights, eps 1e-6."""
    block = stirred(Block(8, 2, 5, 0.0, torch.float32))
    x, condition = torch.randn(2, 6, 8), torch.randn(2, 5)
    with torch.no_grad():
        modulation = block.modulation(condition).view(2, 6, 1, 8).unbind(1)

        def norm(x, shift, scale):
            x = x - x.mean(-1, keepdim=True)
            return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * (1 + scale) + shift

        h = norm(x, *modulation[:2])
        q, k, v = (
            w(h).view(2, 6, 2, 4).transpose(1, 2) for w in (block.attention.wq, block.attention.wk, block.attention.wv)
        )
        mixed = ((q @ k.mT / 2).softmax(-1) @ v).transpose(1, 2).flatten(2) @ block.attention.wo.weight.T
        y = x + modulation[2] * mixed
        inside = F.gelu(block.mlp.fc1(norm(y, *modulation[3:5])), approximate="tanh")
        assert torch.allclose(block(x, condition), y + modulation[5] * block.mlp.fc2(inside), atol=1e-5)


# --- the U-Net around it ---


def test_sizes_change_by_means_and_repetition():
    x = torch.arange(16.0).view(1, 1, 4, 4)
    assert halve(x).flatten().tolist() == [2.5, 4.5, 10.5, 12.5]
    assert torch.equal(halve(double(x)), x)
    assert torch.equal(double(x)[0, 0, :2, :2], torch.zeros(2, 2))


def test_scale_comes_before_shift_in_a_conditional_norm():
    norm = ConditionalNorm(64, 3)
    with torch.no_grad():
        norm.condition.weight.zero_()
        norm.condition.bias.copy_(torch.cat((torch.full((64,), 1.0), torch.full((64,), 5.0))))
    x = torch.randn(2, 64, 3, 3)
    assert torch.allclose(norm(x, torch.randn(2, 3)), 2 * F.group_norm(x, 32, eps=1e-6) + 5, atol=1e-5)


@pytest.mark.parametrize("resize", ["halve", "double"])
def test_a_resizing_block_resizes_both_branches(resize):
    block = stirred(ResBlock(BlockPlan(32, 32, resize), None, 0.0, torch.float32))
    resized = halve if resize == "halve" else double
    x = torch.randn(2, 32, 4, 4)
    with torch.no_grad():
        h = F.silu(F.group_norm(x, 32, block.in_norm.norm.weight, block.in_norm.norm.bias, eps=1e-6))
        h = block.conv_in(resized(h))
        h = F.silu(F.group_norm(h, 32, block.out_norm.norm.weight, block.out_norm.norm.bias, eps=1e-6))
        assert torch.allclose(block(x, None), resized(x) + block.conv_out(h), atol=1e-5)


def test_the_plan_of_two_levels():
    down, up = uvit_plan(UViTConfig(feature_dim=32, layers=1, multipliers=(1, 3)))
    assert down == [(32, 32, None), (32, 32, "halve"), (32, 96, None)]
    assert up == [
        (96 + 96, 96, None), (96 + 32, 96, None), (96, 96, "double"), (96 + 32, 32, None), (32 + 32, 32, None)
    ]  # fmt: skip


@pytest.mark.parametrize("multipliers", [(1,), (2,), (2, 1, 4)])
def test_any_levels_fit_together(multipliers):
    config = UViTConfig(
        feature_dim=32, layers=1, multipliers=multipliers, dit_layers=1, dit_heads=2, dit_width=16, time_input=False
    )
    net = stirred(UViT(config, (16, 8, 1), 3))
    assert config.divisor == 2 ** len(multipliers)
    with torch.no_grad():
        assert net(torch.zeros(2, 16, 8, 1, dtype=torch.int64), 0.5).shape == (2, 16, 8, 1, 3)


def test_the_transformer_replaces_what_it_reads():
    """It has no way around it, and starts at zero."""
    net = UViT(UViTConfig(feature_dim=32, layers=1, dit_layers=1, dit_heads=2, dit_width=16), (4, 4, 1), 3)
    net.initialise(0)
    seen = []
    net.dit.register_forward_hook(lambda m, args, out: seen.append(out))
    net.up[0].register_forward_hook(lambda m, args, out: seen.append(args[0]))
    with torch.no_grad():
        net(torch.zeros(1, 4, 4, 1, dtype=torch.int64), 0.5)
    assert (seen[0] == 0).all()
    assert (seen[1][:, :32] == 0).all()
    assert (seen[1][:, 32:] != 0).any()
    assert torch.equal(net.dit.position, position_table(2, 2, 16))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"feature_dim": 48}, "multiple of 32"),
        ({"multipliers": []}, "at least 1 item"),
        ({"multipliers": [1, 0]}, r"multipliers are \[1, 0\]"),
        ({"dit_width": 20, "dit_heads": 3}, "dit_width=20 must be a multiple of dit_heads=3"),
        ({"dit_width": 18}, "multiple of 4"),
        ({"dit_layers": 0}, "greater than or equal to 1"),
    ],
)
def test_bad_shapes_are_refused(options, message):
    with pytest.raises(ValidationError, match=message):
        UViTConfig(**options)
