"""What a network is told besides its tokens: the time, and a class if there are classes."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

NULL_LABEL = -1  # the label of an example that is not told its class


def timestep_embedding(x: Tensor, dim: int) -> Tensor:
    """Sines, then cosines, of `x` [B] at dim/2 frequencies from 1 down to 1/10000: float32 `[B, dim]`.

    `x` is the scaled time 1000 t. An odd `dim` ends in a column of zeros. Angles reach 1000, where float32 is coarse
    (6e-5): each step is rounded to float32 as in the reference, so that its weights are shown what they learned.
    """
    half = dim // 2
    step = torch.tensor(10000.0, device=x.device).log() / (half - 1)
    frequency = torch.exp(torch.arange(half, device=x.device, dtype=torch.float32) * -step)
    angle = x.float()[:, None] * frequency
    return F.pad(torch.cat((angle.sin(), angle.cos()), dim=1), (0, dim % 2))


class Conditioning(nn.Module):
    """A vector of `dim` numbers for each example, from its time and its class; for the adaptive norms.

    With time: an MLP of [time features; class embedding]. Without: the class embedding itself. A network with neither
    has no conditioning at all, and no such module.
    """

    def __init__(self, dim: int, classes: int, time_input: bool):
        super().__init__()
        self.dim = dim
        self.classes = classes
        self.time_input = time_input
        if classes:
            self.class_embed = nn.Embedding(classes, dim)
        if time_input:
            self.dense_in = nn.Linear(2 * dim if classes else dim, 4 * dim)
            self.dense_out = nn.Linear(4 * dim, dim)

    def forward(self, t: Tensor, labels: Tensor | None) -> Tensor:
        """`t` [B] in [0, 1] and `labels` [B] (needed iff there are classes) -> float32 `[B, dim]`.

        A label of -1 is the null class, no class in particular: its embedding is the zero vector.
        """
        parts = []
        if self.time_input:
            parts.append(timestep_embedding(1000 * t.float(), self.dim))
        if self.classes:
            if labels is None:
                raise ValueError(f"the network has {self.classes} classes: labels [B] are needed")
            parts.append(self.class_embed(labels.clamp(min=0)) * (labels >= 0)[:, None])
        condition = torch.cat(parts, dim=1)
        return self.dense_out(F.silu(self.dense_in(condition))) if self.time_input else condition
