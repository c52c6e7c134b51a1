"""The diffusion transformer in the middle of the U-ViT: patches of a feature map, and attention between them.

Shape letters as in `images`, and: P patches, D width, E size of the conditioning vector.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from md4.networks.images import NORM_EPS, product
from md4.networks.recompute import run_block
from md4.networks.transformer import ChannelDropout, attend

PATCH = 2  # side of a patch, in pixels of the feature map


def position_table(rows: int, columns: int, dim: int) -> Tensor:
    """Where each patch lies, row by row: float32 `[rows * columns, dim]`; `dim` must be a multiple of 4.

    [sin, cos] of the column at dim/4 frequencies 10000^(-4i / dim), then [sin, cos] of the row.
    """
    frequency = 10000.0 ** (-torch.arange(dim // 4, dtype=torch.float64, device="cpu") / (dim // 4))
    place = torch.arange(rows * columns, dtype=torch.float64, device="cpu")
    angles = [axis[:, None] * frequency for axis in (place % columns, place // columns)]
    return torch.cat([f(angle) for angle in angles for f in (torch.sin, torch.cos)], dim=1).float()


def modulated_norm(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """LayerNorm without weights of x [B, P, D], then times (1 + scale) plus shift, both [B, 1, D]."""
    return torch.addcmul(shift, F.layer_norm(x, x.shape[-1:], eps=NORM_EPS), 1 + scale)


class Attention(nn.Module):
    """Multi-head self-attention between patches."""

    def __init__(self, width: int, heads: int, dropout: float):
        super().__init__()
        self.heads = heads
        self.rate = dropout
        self.wq = nn.Linear(width, width)
        self.wk = nn.Linear(width, width)
        self.wv = nn.Linear(width, width)
        self.wo = nn.Linear(width, width, bias=False)
        self.dropout = ChannelDropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        """[B, P, D] -> [B, P, D]."""
        q, k, v = (w(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for w in (self.wq, self.wk, self.wv))
        mixed = attend(q, k, v, self.rate if self.training else 0.0)
        return self.dropout(self.wo(mixed.transpose(1, 2).flatten(2)))


class MLP(nn.Module):
    """fc2(GELU(fc1 x)), four times as wide inside."""

    def __init__(self, width: int, dropout: float):
        super().__init__()
        self.fc1 = nn.Linear(width, 4 * width)
        self.fc2 = nn.Linear(4 * width, width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        """[B, P, D] -> [B, P, D]."""
        return self.dropout(self.fc2(self.dropout(F.gelu(self.fc1(x), approximate="tanh"))))


class Block(nn.Module):
    """Attention and MLP, each behind a norm and added to the residual stream.

    With a conditioning vector the norms and the gates of both branches are functions of it, else plain RMSNorms.
    """

    def __init__(self, width: int, heads: int, dim: int | None, dropout: float, compute: torch.dtype):
        super().__init__()
        self.compute = compute
        self.modulation = nn.Linear(dim, 6 * width) if dim else None
        if not dim:
            self.attention_norm = nn.RMSNorm(width, eps=NORM_EPS)
            self.mlp_norm = nn.RMSNorm(width, eps=NORM_EPS)
        self.attention = Attention(width, heads, dropout)
        self.mlp = MLP(width, dropout)

    def forward(self, x: Tensor, condition: Tensor | None) -> Tensor:
        """x [B, P, D] float32, condition [B, E] (already activated) or None -> [B, P, D] float32."""
        if self.modulation is None or condition is None:
            h = x + product(self.attention, self.attention_norm(x), self.compute)
            return h + product(self.mlp, self.mlp_norm(h), self.compute)
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = self.modulation(condition)[:, None].chunk(6, dim=-1)
        mixed = product(self.attention, modulated_norm(x, shift_a, scale_a), self.compute)
        h = torch.addcmul(x, gate_a, mixed)
        return torch.addcmul(h, gate_m, product(self.mlp, modulated_norm(h, shift_m, scale_m), self.compute))


class DiT(nn.Module):
    """The transformer over the patches of feature maps.

    Args:
        channels: N of the feature maps, in and out.
        height, width_pixels: their size, each a multiple of the patch.
        width: D, a multiple of 4 and of `heads`.
        layers, heads, dropout: of the blocks.
        dim: E of the conditioning vector; None = no conditioning.
        recompute: whether the backward pass computes the blocks' activations again.
    """

    def __init__(
        self,
        channels: int,
        height: int,
        width_pixels: int,
        width: int,
        layers: int,
        heads: int,
        dim: int | None,
        dropout: float,
        recompute: bool,
        compute: torch.dtype,
    ):
        super().__init__()
        self.grid = (height // PATCH, width_pixels // PATCH)
        self.recompute = recompute
        self.compute = compute
        self.patches = nn.Conv2d(channels, width, PATCH, stride=PATCH)
        self.position = nn.Parameter(torch.empty(math.prod(self.grid), width))
        self.blocks = nn.ModuleList(Block(width, heads, dim, dropout, compute) for _ in range(layers))
        self.modulation = nn.Linear(dim, 2 * width) if dim else None
        if not dim:
            self.norm = nn.RMSNorm(width, eps=NORM_EPS)
        self.unpatch = nn.Linear(width, PATCH * PATCH * channels)

    def forward(self, x: Tensor, condition: Tensor | None) -> Tensor:
        """x [B, N, H, W] float32, condition [B, E] or None -> [B, N, H, W] float32."""
        if condition is not None:
            condition = F.silu(condition)
        h = product(self.patches, x, self.compute).float().flatten(2).transpose(1, 2) + self.position
        for block in self.blocks:
            h = run_block(block, self.recompute, h, condition)
        if self.modulation is None or condition is None:
            h = self.norm(h)
        else:
            shift, scale = self.modulation(condition)[:, None].chunk(2, dim=-1)
            h = modulated_norm(h, shift, scale)
        rows, columns = self.grid
        h = product(self.unpatch, h, self.compute).float()
        h = h.view(len(h), rows, columns, PATCH, PATCH, -1).permute(0, 5, 1, 3, 2, 4)  # B, N, row, in it, column, in it
        return h.flatten(4, 5).flatten(2, 3)

    @torch.no_grad()
    def initialise_positions(self) -> None:
        """Start the (trained) positions as sines and cosines."""
        self.position.copy_(position_table(*self.grid, self.position.shape[1]))
