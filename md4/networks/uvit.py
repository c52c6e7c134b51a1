"""The image network of the ImageNet 64 models: a U-Net whose middle is a diffusion transformer.

`multipliers` gives the levels: feature maps of `feature_dim` times the level's multiplier, at half the size of the
level above. With one level (all published models) nothing is resized. Shape letters as in `images`.
"""

from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor, nn

from md4.networks.dit import PATCH, DiT
from md4.networks.images import GROUPS, ImageNetwork, convolution, group_norm, product
from md4.networks.recompute import run_block


class UViTConfig(BaseModel):
    """Shape and habits of the U-ViT. The defaults are the published unconditional ImageNet 64 model."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    kind: Literal["uvit"] = "uvit"
    feature_dim: int = Field(default=256, ge=GROUPS, multiple_of=GROUPS, description="channels of the first level")
    layers: int = Field(default=8, ge=1, description="residual blocks of a level down; one more on the way up")
    multipliers: tuple[int, ...] = Field(
        default=(1,), min_length=1, description="channels of each level over feature_dim; each level halves the image"
    )
    dit_layers: int = Field(default=20, ge=1, description="transformer blocks in the middle")
    dit_heads: int = Field(default=12, ge=1, description="their attention heads")
    dit_width: int = Field(default=768, ge=4, multiple_of=4, description="their width")
    time_input: bool = Field(default=True, description="tell the network the time")
    dropout: float = Field(default=0.0, ge=0, lt=1, description="dropout rate while training")
    checkpoint_activations: bool = Field(
        default=False, description="compute the blocks' activations again in the backward pass instead of keeping them"
    )

    @model_validator(mode="after")
    def _fits(self):
        if min(self.multipliers) < 1:
            raise ValueError(f"multipliers are {list(self.multipliers)}: each must be at least 1")
        if self.dit_width % self.dit_heads:
            raise ValueError(f"dit_width={self.dit_width} must be a multiple of dit_heads={self.dit_heads}")
        return self

    @property
    def divisor(self) -> int:
        """What height and width of an image must be multiples of."""
        return PATCH * 2 ** (len(self.multipliers) - 1)


class BlockPlan(NamedTuple):
    """Channels in and out of a residual block, and what it does to the size."""

    channels: int
    out: int
    resize: Literal["halve", "double"] | None = None


def uvit_plan(config: UViTConfig) -> tuple[list[BlockPlan], list[BlockPlan]]:
    """The residual blocks on the way down and on the way up.

    Every block that keeps the size on the way up also reads, from the last to the first, what the first convolution and
    each block on the way down have put out.
    """
    widths = [config.feature_dim * multiplier for multiplier in config.multipliers]
    x, passed, down, up = config.feature_dim, [config.feature_dim], [], []
    for level, width in enumerate(widths):
        for _ in range(config.layers):
            down.append(BlockPlan(x, width))
            x = width
            passed.append(x)
        if level < len(widths) - 1:
            down.append(BlockPlan(x, x, "halve"))
            passed.append(x)
    for level, width in reversed(list(enumerate(widths))):
        for _ in range(config.layers + 1):
            up.append(BlockPlan(x + passed.pop(), width))
            x = width
        if level:
            up.append(BlockPlan(x, x, "double"))
    return down, up


class ConditionalNorm(nn.Module):
    """A group norm whose scale and shift are functions of the conditioning vector; without one, a plain group norm."""

    def __init__(self, channels: int, dim: int | None):
        super().__init__()
        self.condition = nn.Linear(dim, 2 * channels) if dim else None
        self.norm = group_norm(channels, affine=not dim)

    def forward(self, x: Tensor, condition: Tensor | None) -> Tensor:
        """x [B, N, H, W] float32, condition [B, E] or None -> [B, N, H, W] float32."""
        x = self.norm(x)
        if self.condition is None or condition is None:
            return x
        scale, shift = self.condition(condition)[:, :, None, None].chunk(2, dim=1)
        return torch.addcmul(shift, x, 1 + scale)


def halve(x: Tensor) -> Tensor:
    """[B, N, H, W] -> [B, N, H/2, W/2]: means of 2 x 2 pixels."""
    return F.avg_pool2d(x, 2)


def double(x: Tensor) -> Tensor:
    """[B, N, H, W] -> [B, N, 2H, 2W]: each pixel four times."""
    return F.interpolate(x, scale_factor=2, mode="nearest")


class ResBlock(nn.Module):
    """Two convolutions, each behind a conditional norm and SiLU, added to the input; `resize` acts on both branches."""

    def __init__(self, plan: BlockPlan, dim: int | None, dropout: float, compute: torch.dtype):
        super().__init__()
        channels, out, self.resize = plan
        self.compute = compute
        self.in_norm = ConditionalNorm(channels, dim)
        self.conv_in = convolution(channels, out)
        self.out_norm = ConditionalNorm(out, dim)
        self.dropout = nn.Dropout(dropout)
        self.conv_out = convolution(out, out)
        self.skip = nn.Conv2d(channels, out, 1) if channels != out else None

    def forward(self, x: Tensor, condition: Tensor | None) -> Tensor:
        """x [B, N, H, W] float32, condition [B, E] or None -> [B, out, H', W'] float32."""
        h = F.silu(self.in_norm(x, condition))
        if self.resize:
            resize = halve if self.resize == "halve" else double
            h, x = resize(h), resize(x)
        h = product(self.conv_in, h, self.compute).float()
        h = self.dropout(F.silu(self.out_norm(h, condition)))
        h = product(self.conv_out, h, self.compute)
        return h + (x if self.skip is None else product(self.skip, x, self.compute).float())


class UViT(ImageNetwork):
    """The U-Net with a transformer in its middle; arguments as of `ImageNetwork`."""

    def __init__(
        self,
        config: UViTConfig,
        shape: tuple[int, int, int],
        vocab_size: int,
        classes: int = 0,
        compute: torch.dtype = torch.float32,
    ):
        down, up = uvit_plan(config)
        super().__init__(shape, vocab_size, classes, config.feature_dim, config.time_input, compute, up[-1].out)
        self.config = config
        dim = None if self.conditioning is None else config.feature_dim
        levels = len(config.multipliers)
        self.down = nn.ModuleList(ResBlock(plan, dim, config.dropout, compute) for plan in down)
        self.dit = DiT(
            channels=down[-1].out,
            height=shape[0] >> (levels - 1),
            width_pixels=shape[1] >> (levels - 1),
            width=config.dit_width,
            layers=config.dit_layers,
            heads=config.dit_heads,
            dim=dim,
            dropout=config.dropout,
            recompute=config.checkpoint_activations,
            compute=compute,
        )
        self.up = nn.ModuleList(ResBlock(plan, dim, config.dropout, compute) for plan in up)
        self.norm = ConditionalNorm(up[-1].out, dim)

    def trunk(self, x: Tensor, condition: Tensor | None) -> Tensor:
        """[B, E, H, W] float32 -> [B, E', H, W] float32, E' channels of the first level."""
        again = self.config.checkpoint_activations
        passed = [x]
        for block in self.down:
            passed.append(run_block(block, again, passed[-1], condition))
        x = self.dit(passed[-1], condition)
        for block in self.up:
            if block.resize is None:
                x = torch.cat((x, passed.pop()), dim=1)
            x = run_block(block, again, x, condition)
        return F.silu(self.norm(x, condition))

    def initialise(self, seed: int) -> None:
        super().initialise(seed)
        self.dit.initialise_positions()
