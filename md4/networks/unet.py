"""The image network of the CIFAR-10 model: a U-Net that keeps the image's size throughout.

`layers` residual blocks down, three in the middle (a block, attention over all pixels, a block), `layers` + 1 up, each
of which also reads what the corresponding layer on the way down has put out. Shape letters as in `images`.
"""

from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn

from md4.networks.images import GROUPS, ImageNetwork, convolution, group_norm, product
from md4.networks.recompute import run_block
from md4.networks.transformer import attend


class UNetConfig(BaseModel):
    """Shape and habits of the U-Net. The defaults are the published CIFAR-10 model."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    kind: Literal["unet"] = "unet"
    feature_dim: int = Field(
        default=128,
        ge=GROUPS,
        multiple_of=GROUPS,
        description="channels of every feature map; with only 32 the norms take away time and class again",
    )
    layers: int = Field(default=32, ge=1, description="residual blocks on the way down; one more on the way up")
    time_input: bool = Field(default=True, description="tell the network the time")
    dropout: float = Field(default=0.0, ge=0, lt=1, description="dropout rate while training")
    checkpoint_activations: bool = Field(
        default=False, description="compute the blocks' activations again in the backward pass instead of keeping them"
    )


class ResBlock(nn.Module):
    """Two convolutions, each behind a norm and SiLU, added to the input; the conditioning is added between them."""

    def __init__(self, channels: int, out: int, dim: int | None, dropout: float, compute: torch.dtype):
        super().__init__()
        self.compute = compute
        self.in_norm = group_norm(channels)
        self.conv_in = convolution(channels, out)
        self.condition = nn.Linear(dim, out, bias=False) if dim else None
        self.out_norm = group_norm(out)
        self.dropout = nn.Dropout(dropout)
        self.conv_out = convolution(out, out)
        self.skip = nn.Conv2d(channels, out, 1) if channels != out else None

    def forward(self, x: Tensor, condition: Tensor | None) -> Tensor:
        """x [B, N, H, W] float32, condition [B, E] or None -> [B, out, H, W] float32."""
        h = product(self.conv_in, F.silu(self.in_norm(x)), self.compute).float()
        if self.condition is not None and condition is not None:
            h = h + self.condition(condition)[:, :, None, None]
        h = product(self.conv_out, self.dropout(F.silu(self.out_norm(h))), self.compute)
        return h + (x if self.skip is None else product(self.skip, x, self.compute).float())


class PixelAttention(nn.Module):
    """Self-attention of one head over all pixels, behind a norm and added to the input."""

    def __init__(self, channels: int, compute: torch.dtype):
        super().__init__()
        self.compute = compute
        self.in_norm = group_norm(channels)
        self.wq = nn.Linear(channels, channels)
        self.wk = nn.Linear(channels, channels)
        self.wv = nn.Linear(channels, channels)
        self.wo = nn.Linear(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        """[B, N, H, W] float32 -> the same."""
        pixels = self.in_norm(x).flatten(2).transpose(1, 2)
        return x + product(self._mix, pixels, self.compute).transpose(1, 2).unflatten(2, x.shape[2:])

    def _mix(self, x: Tensor) -> Tensor:
        q, k, v = (w(x)[:, None] for w in (self.wq, self.wk, self.wv))
        return self.wo(attend(q, k, v, 0.0)[:, 0])


class UNet(ImageNetwork):
    """The constant-resolution U-Net; arguments as of `ImageNetwork`."""

    def __init__(
        self,
        config: UNetConfig,
        shape: tuple[int, int, int],
        vocab_size: int,
        classes: int = 0,
        compute: torch.dtype = torch.float32,
    ):
        super().__init__(shape, vocab_size, classes, config.feature_dim, config.time_input, compute)
        self.config = config
        width = config.feature_dim
        dim = None if self.conditioning is None else width

        def block(channels: int) -> ResBlock:
            return ResBlock(channels, width, dim, config.dropout, compute)

        self.down = nn.ModuleList(block(width) for _ in range(config.layers))
        self.middle_in = block(width)
        self.attention = PixelAttention(width, compute)
        self.middle_out = block(width)
        self.up = nn.ModuleList(block(2 * width) for _ in range(config.layers + 1))
        self.norm = group_norm(width)

    def trunk(self, x: Tensor, condition: Tensor | None) -> Tensor:
        """[B, E, H, W] float32 -> the same."""
        again = self.config.checkpoint_activations
        passed = [x]
        for block in self.down:
            passed.append(run_block(block, again, passed[-1], condition))
        x = run_block(self.middle_in, again, passed[-1], condition)
        x = run_block(self.attention, again, x)
        x = run_block(self.middle_out, again, x, condition)
        for block in self.up:
            x = run_block(block, again, torch.cat((x, passed.pop()), dim=1), condition)
        return F.silu(self.norm(x))
