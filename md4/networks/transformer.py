"""The text network of MD4: a bidirectional transformer with rotary positions, gated MLPs and adaptive norms.

Shape letters: B examples, L positions, D = heads * E width, H heads, E feature_dim (at once the size of a head, of the
conditioning vector and of the outside embedding), V real tokens.

Precision: weights are float32. With `compute` = bfloat16 the matrix products and attention of the blocks run in
bfloat16; the residual stream, the norms, the conditioning, the head and the logits stay float32.
"""

import math
from functools import lru_cache
from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor, nn

from md4 import documents
from md4.masked_loss import PLAIN_UP_TO, Head, Hidden, Scores, plain_scores, spread
from md4.networks.conditioning import Conditioning
from md4.networks.recompute import run_block
from md4.networks.starting import initialise

NORM_EPS = 1e-5
PRODUCTS_UP_TO = 512  # positions up to which bfloat16 attention on a CPU is written out
GATES = {"glu": torch.sigmoid, "swiglu": F.silu, "geglu": lambda x: F.gelu(x, approximate="tanh")}


class TransformerConfig(BaseModel):
    """Shape and habits of the text network. The defaults are the published text8 model."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    kind: Literal["transformer"] = "transformer"
    feature_dim: int = Field(default=64, ge=4, description="size of a head, of the conditioning and outside embedding")
    heads: int = Field(default=12, ge=1, description="attention heads; the width is feature_dim * heads")
    layers: int = Field(default=12, ge=1, description="transformer blocks")
    mlp: Literal["glu", "swiglu", "geglu"] = Field(
        default="glu",
        description="gate of the MLP: sigmoid, SiLU or GELU; also the activation before the adaptive norms",
    )
    conditioning: Literal["adaln_zero", "adaln"] = Field(
        default="adaln_zero", description="adaptive norms start at zero (every block starts as the identity), or random"
    )
    depth_scaled_init: bool = Field(default=True, description="MLP weights start with variance 2/layers instead of 1")
    outside_embed: bool = Field(default=True, description="embed tokens in feature_dim and project, or in full width")
    time_input: bool = Field(default=True, description="tell the network the time")
    dropout: float = Field(default=0.0, ge=0, lt=1, description="dropout rate while training")
    checkpoint_activations: bool = Field(
        default=False, description="compute the blocks' activations again in the backward pass instead of keeping them"
    )

    @model_validator(mode="after")
    def _even(self):
        if self.feature_dim % 2:
            raise ValueError(f"feature_dim is {self.feature_dim}: rotary positions need an even number")
        return self

    @property
    def width(self) -> int:
        """D, the width of the residual stream."""
        return self.feature_dim * self.heads

    @property
    def hidden(self) -> int:
        """Width inside the MLP: two thirds of 4 D, rounded up to a multiple of 32."""
        return 32 * math.ceil(8 * self.width // 3 / 32)


@lru_cache(maxsize=16)
def rotations(length: int, dim: int, device: torch.device) -> Tensor:
    """Rotary angles as unit complex numbers exp(i pos 10000^(-2j/dim)): complex64 `[length, 1, dim / 2]`."""
    with torch.inference_mode(False):  # else a table first made while sampling could not be used for training
        frequency = 10000.0 ** (-torch.arange(0, dim, 2, dtype=torch.float64, device="cpu") / dim)
        angle = torch.arange(length, dtype=torch.float64, device="cpu")[:, None] * frequency
        return torch.polar(torch.ones_like(angle), angle).to(device, torch.complex64)[:, None]


def rotate(x: Tensor, by: Tensor) -> Tensor:
    """Turn each pair (2j, 2j+1) of the last axis of x [B, L, H, E] by its angle; in float32, back in x's dtype."""
    pairs = torch.view_as_complex(x.float().unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs * by).flatten(-2).to(x.dtype)


def attend(q: Tensor, k: Tensor, v: Tensor, dropout: float, allowed: Tensor | None = None) -> Tensor:
    """softmax(q k' / sqrt(E)) v for q, k, v [B, H, L, E], with dropout of the attention probabilities.

    allowed: bool `[B, 1, L, L]`, which keys (last axis) a query sees; None: all of them.

    In bfloat16 on a CPU the products are written out: PyTorch's fused kernel is slower there than in float32, and takes
    three times as long, forward and backward, as this (L = 256; E = 32 or 64), whose rounding errors are up to twice
    as large. Its memory grows with L^2, hence the limit. The choice must not depend on the number of rows, or a row's
    result would.
    """
    if q.device.type == "cpu" and q.dtype == torch.bfloat16 and q.shape[2] <= PRODUCTS_UP_TO:
        scores = (q.contiguous() * q.shape[-1] ** -0.5) @ k.contiguous().transpose(-2, -1)
        if allowed is not None:
            scores = scores.masked_fill(~allowed, -torch.inf)
        weights = torch.softmax(scores, dim=-1)
        return (F.dropout(weights, dropout) if dropout else weights) @ v.contiguous()
    return F.scaled_dot_product_attention(q, k, v, attn_mask=allowed, dropout_p=dropout)


class ChannelDropout(nn.Module):
    """Dropout of whole channels: x [B, L, D] with one draw per (example, channel), shared by all positions."""

    def __init__(self, rate: float):
        super().__init__()
        self.rate = rate

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or not self.rate:
            return x
        return x * F.dropout(x.new_ones(x.shape[0], 1, x.shape[2]), self.rate)


class Attention(nn.Module):
    """Multi-head self-attention with rotary positions, not causal: over the row, or what of it is allowed."""

    def __init__(self, config: TransformerConfig):
        super().__init__()
        width = config.width
        self.heads = config.heads
        self.rate = config.dropout
        self.wq = nn.Linear(width, width, bias=False)
        self.wk = nn.Linear(width, width, bias=False)
        self.wv = nn.Linear(width, width, bias=False)
        self.wo = nn.Linear(width, width, bias=False)
        self.dropout = ChannelDropout(config.dropout)

    def forward(self, x: Tensor, allowed: Tensor | None = None) -> Tensor:
        """[B, L, D] -> [B, L, D]; `allowed` as of `attend`."""
        q, k, v = (w(x).unflatten(-1, (self.heads, -1)) for w in (self.wq, self.wk, self.wv))
        turn = rotations(q.shape[1], q.shape[3], q.device)
        q, k = rotate(q, turn), rotate(k, turn)
        rate = self.rate if self.training else 0.0
        mixed = attend(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), rate, allowed)
        return self.dropout(self.wo(mixed.transpose(1, 2).flatten(2)))


class MLP(nn.Module):
    """w2(gate(w1 x) * w3 x)."""

    def __init__(self, config: TransformerConfig):
        super().__init__()
        self.gate = GATES[config.mlp]
        self.w1 = nn.Linear(config.width, config.hidden, bias=False)
        self.w3 = nn.Linear(config.width, config.hidden, bias=False)
        self.w2 = nn.Linear(config.hidden, config.width, bias=False)
        self.dropout = ChannelDropout(config.dropout)

    def forward(self, x: Tensor) -> Tensor:
        """[B, L, D] -> [B, L, D]."""
        return self.dropout(self.w2(self.gate(self.w1(x)) * self.w3(x)))


def modulated_norm(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """LayerNorm without weights of x [B, L, D], then times (1 + scale) plus shift, both [B, 1, D]."""
    return torch.addcmul(shift, F.layer_norm(x, x.shape[-1:], eps=NORM_EPS), 1 + scale)


class Block(nn.Module):
    """Attention and MLP, each behind a norm and added to the residual stream.

    With a conditioning vector the norms and the gates of both branches are functions of it, else plain RMSNorms.
    """

    def __init__(self, config: TransformerConfig, conditioned: bool, compute: torch.dtype):
        super().__init__()
        self.compute = compute
        width = config.width
        self.modulation = nn.Linear(config.feature_dim, 6 * width) if conditioned else None
        if not conditioned:
            self.attention_norm = nn.RMSNorm(width, eps=NORM_EPS)
            self.mlp_norm = nn.RMSNorm(width, eps=NORM_EPS)
        self.attention = Attention(config)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, condition: Tensor | None, allowed: Tensor | None = None) -> Tensor:
        """x [B, L, D] float32, condition [B or more, E] (already activated) or None -> [B, L, D] float32.

        allowed: which positions see which, as of `attend`.
        """
        if self.modulation is None or condition is None:
            h = x + self._branch(self.attention, self.attention_norm(x), allowed)
            return h + self._branch(self.mlp, self.mlp_norm(h))
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = self.modulation(condition)[: len(x), None].chunk(6, dim=-1)
        h = torch.addcmul(x, gate_a, self._branch(self.attention, modulated_norm(x, shift_a, scale_a), allowed))
        return torch.addcmul(h, gate_m, self._branch(self.mlp, modulated_norm(h, shift_m, scale_m)))

    def _branch(self, module: nn.Module, x: Tensor, *rest: Tensor | None) -> Tensor:
        if self.compute == torch.float32:
            return module(x, *rest)
        with torch.autocast(x.device.type, self.compute):
            return module(x.to(self.compute), *rest)  # one cast for all the products that read it


class Transformer(nn.Module):
    """The text network.

    Rows of a batch meet nowhere; positions are enough rows for any matrix product, but not so the conditioning vectors.

    Args:
        config: its shape.
        vocab_size: V real tokens; the input has one more, the mask, and the output has not.
        classes: number of classes, 0 for none.
        compute: torch.bfloat16 to run the blocks in it, else torch.float32.
        end_of_text: the token that ends a document, if a position is to see its own document alone; None: it sees the
            whole row. An end-of-text token belongs to the document before it.

    The weights are what PyTorch makes them until `initialise` is called (`md4.model.build` does).
    """

    def __init__(
        self,
        config: TransformerConfig,
        vocab_size: int,
        classes: int = 0,
        compute: torch.dtype = torch.float32,
        end_of_text: int | None = None,
    ):
        super().__init__()
        self.config = config
        self.end_of_text = end_of_text
        self.compute = compute
        conditioned = config.time_input or classes > 0
        embedding = config.feature_dim if config.outside_embed else config.width
        self.conditioning = Conditioning(config.feature_dim, classes, config.time_input) if conditioned else None
        self.embed = nn.Embedding(vocab_size + 1, embedding)
        self.lift = nn.Linear(embedding, config.width) if config.outside_embed else nn.Dropout(config.dropout)
        self.blocks = nn.ModuleList(Block(config, conditioned, compute) for _ in range(config.layers))
        self.modulation = nn.Linear(config.feature_dim, 2 * config.width) if conditioned else None
        if not conditioned:
            self.norm = nn.RMSNorm(config.width, eps=NORM_EPS)
        self.head = Head(config.width, vocab_size)

    def forward(self, z: Tensor, t: Tensor | float, labels: Tensor | None = None) -> Tensor:
        """Logits over the real tokens: float32 `[B, L, V]`.

        Args:
            z: tokens `[B, L]`, int64, with the mask id V where hidden.
            t: times `[B]`, or one time for all.
            labels: classes `[B]`, needed iff the network has classes; -1 is no class in particular.
        """
        with torch.autocast(z.device.type, enabled=False):
            return self.head(self.body(z, t, labels))

    def scores(
        self,
        z: Tensor,
        t: Tensor | float,
        labels: Tensor | None,
        targets: Tensor,
        powers: Tensor | None = None,
        segments: Tensor | None = None,
    ) -> Scores:
        """What a loss needs of the logits of z [B, L], without making them: see `md4.masked_loss`.

        targets: true tokens `[B, L]`, `IGNORED` where they cost nothing; powers: `[V]`, of learned schedules;
        segments: as of `body`.
        """
        if self.head.out_features <= PLAIN_UP_TO:
            with torch.autocast(z.device.type, enabled=False):
                return plain_scores(self.head(self.body(z, t, labels, segments)), targets, powers)
        hidden = Hidden(targets)  # before the body
        with torch.autocast(z.device.type, enabled=False):
            x = self.body(z, t, labels, segments)
            rows = hidden.rows()  # after it
            pair = self.head(x.flatten(0, 1).index_select(0, rows), targets.flatten()[rows], powers)
            return spread(pair, rows, targets)

    def body(
        self, z: Tensor, t: Tensor | float, labels: Tensor | None = None, segments: Tensor | None = None
    ) -> Tensor:
        """What the head projects: float32 `[B, L, D]`. Arguments as of `forward`.

        segments: the document `[B, L]` that each position belongs to, where a position sees its own document alone;
        None: as the end-of-text tokens say that are visible in z.

        There may be more times and labels than rows; what is beyond them changes nothing (see md4.inference).
        """
        with torch.autocast(z.device.type, enabled=False):  # the blocks turn it on for themselves
            condition = None
            if self.conditioning is not None:
                t = torch.as_tensor(t, device=z.device)
                t = t.expand(z.shape[0]) if t.ndim == 0 else t
                condition = GATES[self.config.mlp](self.conditioning(t, labels))
            allowed = None
            if self.end_of_text is not None:
                segments = documents.segments(z, self.end_of_text) if segments is None else segments
                allowed = documents.same_document(segments)
            x = self.lift(self.embed(z))
            for block in self.blocks:
                x = run_block(block, self.config.checkpoint_activations, x, condition, allowed)
            if self.modulation is None or condition is None:
                return self.norm(x)
            shift, scale = self.modulation(condition)[: len(x), None].chunk(2, dim=-1)
            return modulated_norm(x, shift, scale)

    def initialise(self, seed: int) -> None:
        """Set every parameter to its starting value, a function of `seed` and the parameter's name alone.

        Matrices: truncated normal of variance 1/fan_in (LeCun), times 2/layers in depth-scaled MLPs. Embeddings: normal
        of variance 1/width. Biases 0, norms 1. The head and, with adaLN-Zero, all modulations are 0.
        """
        zeros = {"head", "modulation"} if self.config.conditioning == "adaln_zero" else {"head"}
        scaled = {"w1", "w2", "w3"} if self.config.depth_scaled_init else set()
        initialise(self, seed, zeros, lambda role: 2 / self.config.layers if role in scaled else 1.0)
