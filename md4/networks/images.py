"""What the image networks share: pixels in, logits out, and the habits of their convolutions.

Each number of a pixel (its red, its green...) is a token. Shape letters: B examples, H rows, W columns, C numbers of
a pixel, E feature_dim, N channels of a feature map, V real tokens. Tokens are [B, H, W, C], feature maps [B, N, H, W].

Precision: weights are float32. With `compute` = bfloat16 the convolutions, matrix products and attention of the blocks
run in bfloat16; the residual stream, the norms, the conditioning, the convolutions at both ends and the logits stay
float32.
"""

from abc import abstractmethod
from collections.abc import Callable

import torch
from torch import Tensor, nn

from md4.networks.conditioning import Conditioning
from md4.networks.starting import initialise

GROUPS = 32  # of channels, in every group norm
NORM_EPS = 1e-6


def product(module: Callable[[Tensor], Tensor], x: Tensor, compute: torch.dtype) -> Tensor:
    """`module(x)` with its products in `compute`; float32 where that is float32."""
    if compute == torch.float32:
        return module(x)
    with torch.autocast(x.device.type, compute):
        return module(x.to(compute))


def group_norm(channels: int, affine: bool = True) -> nn.GroupNorm:
    """Norm over groups of neighbouring channels, in float32."""
    return nn.GroupNorm(GROUPS, channels, eps=NORM_EPS, affine=affine)


def convolution(channels: int, out: int) -> nn.Conv2d:
    """3 x 3, the size of the image kept."""
    return nn.Conv2d(channels, out, 3, padding=1)


class ImageNetwork(nn.Module):
    """Embedding and logits around a trunk of feature maps, which subclasses add.

    Args:
        shape: (H, W, C) of an image.
        vocab_size: V real tokens; the input has one more, the mask, and the output has not.
        classes: number of classes, 0 for none.
        feature_dim: E, the width of an embedded token, of the conditioning vector and of the first feature maps.
        time_input: whether the time is an input.
        compute: torch.bfloat16 to run the blocks in it, else torch.float32.
        last_dim: channels of what the last convolution reads; None = E.

    The weights are what PyTorch makes them until `initialise` is called (`md4.model.build` does).
    """

    # Layers that start at zero: logits, the last of each residual branch and of the DiT, and what conditioning does.
    zeros = frozenset({"head", "conv_out", "unpatch", "condition", "modulation"})

    def __init__(
        self,
        shape: tuple[int, int, int],
        vocab_size: int,
        classes: int,
        feature_dim: int,
        time_input: bool,
        compute: torch.dtype,
        last_dim: int | None = None,
    ):
        super().__init__()
        self.shape = shape
        self.compute = compute
        conditioned = time_input or classes > 0
        self.conditioning = Conditioning(feature_dim, classes, time_input) if conditioned else None
        self.embed = nn.Embedding(vocab_size + 1, feature_dim)
        self.conv_in = convolution(shape[2] * feature_dim, feature_dim)
        self.head = convolution(last_dim or feature_dim, shape[2] * vocab_size)

    @abstractmethod
    def trunk(self, x: Tensor, condition: Tensor | None) -> Tensor:
        """From the first convolution's [B, E, H, W] to what the last one reads, [B, last_dim, H, W], normed."""

    def forward(self, z: Tensor, t: Tensor | float, labels: Tensor | None = None) -> Tensor:
        """Logits over the real tokens: float32 `[B, H, W, C, V]`.

        Args:
            z: tokens `[B, H, W, C]`, int64, with the mask id V where hidden.
            t: times `[B]`, or one time for all.
            labels: classes `[B]`, -1 for none in particular; needed iff the network has classes.
        """
        with torch.autocast(z.device.type, enabled=False):  # the blocks turn it on for themselves
            condition = None
            if self.conditioning is not None:
                t = torch.as_tensor(t, device=z.device).expand(z.shape[0])
                condition = self.conditioning(t, labels)
            x = self.embed(z).flatten(3).permute(0, 3, 1, 2)
            x = self.trunk(self.conv_in(x), condition)
            x = x.contiguous(memory_format=torch.channels_last)  # so that logits need no copy to become one long row
            return self.head(x).permute(0, 2, 3, 1).unflatten(3, (self.shape[2], -1))

    def initialise(self, seed: int) -> None:
        """Set every parameter to its starting value, a function of `seed` and the parameter's name alone.

        Convolutions and matrices: truncated normal of variance 1/fan_in (LeCun). Embeddings: normal of variance
        1/width. Biases 0, norms 1. What is named in `zeros` is 0: the first logits are all equal.
        """
        initialise(self, seed, self.zeros)
