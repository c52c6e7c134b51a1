"""More networks that know the law they predict, beside `tests.md4.oracle.Toy`."""

from types import SimpleNamespace

import torch
from torch import Tensor, nn

from md4.objectives import MD4
from md4.schedules import parse_schedule
from tests.md4.oracle import Toy


class Chain(Toy):
    """A Markov chain that keeps its token with probability `stay`; tokens depend on each other, none is ruled out.

    At a visible position the network predicts from the others alone (leave-one-out), as corrections ask it to.
    """

    def __init__(self, vocabulary: int, length: int, stay: float = 0.75):
        super().__init__(vocabulary, length)
        x, move = self.sequences, (1 - stay) / (vocabulary - 1)
        steps = torch.where(x[:, 1:] == x[:, :-1], stay, move).double()
        self.law = steps.prod(dim=1) / vocabulary
        shown = self.states[:, None] != self.mask
        agrees = (self.states[:, None] == x) | ~shown  # [S, X, L]
        one_hot = nn.functional.one_hot(x, vocabulary).double()
        for position in range(length):
            others = [p for p in range(length) if p != position]
            joint = agrees[:, :, others].all(dim=2).double() * self.law @ one_hot[:, position]  # [S, V]
            self.posterior[:, position] = joint / joint.sum(dim=1, keepdim=True)


class Fixed(nn.Module):
    """Predicts the same at every position whatever it sees: logits `[V]`, or one line for each class and a last one
    for no class in particular, `[classes + 1, V]`."""

    def __init__(self, logits: Tensor):
        super().__init__()
        self.logits = logits
        if logits.ndim == 2:
            self.conditioning = SimpleNamespace(classes=len(logits) - 1)

    def forward(self, z: Tensor, t: Tensor, labels: Tensor | None = None) -> Tensor:
        own = self.logits[None] if labels is None else self.logits[labels]
        return own[:, None].expand(len(z), z.shape[1], -1)

    def model(self) -> MD4:
        return MD4(self, parse_schedule("linear"), self.logits.shape[-1])


class Blindfold(nn.Module):
    """Shows a network everything but one position."""

    def __init__(self, network: nn.Module, position: int, mask: int):
        super().__init__()
        self.network, self.position, self.mask = network, position, mask

    def forward(self, z: Tensor, t: Tensor, labels: Tensor | None = None) -> Tensor:
        z = z.clone()
        z[:, self.position] = self.mask
        return self.network(z, t, labels)
