"""Asking the network in such a way that a row's answer doesn't depend on the rows beside it."""

from typing import Any

import torch
from torch import Tensor

from md4.networks.transformer import Transformer
from md4.objectives import MaskedDiffusion, evaluating

# Two facts of CPU kernels make the last bits of a row depend on the size of its batch: matrix products of one to three
# rows take other kernels than larger ones, and elementwise functions compute what is left over after the last whole
# vector registers (32 numbers) by other code. With a multiple of four rows and a feature dimension that is a multiple
# of 16, neither happens: a row's answer then has the same bits in any company. (On Intel's processors up to twelve rows
# do take other kernels, unless MKL is told to keep to one, as `md4/__init__.py` does.)
ROW_MULTIPLE = 4


def filled(rows: int, device: torch.device | None = None) -> Tensor:
    """The numbers 0..rows-1, and then 0 until there is a multiple of `ROW_MULTIPLE` of them."""
    numbers = torch.zeros(rows + -rows % ROW_MULTIPLE, dtype=torch.int64, device=device)
    numbers[:rows] = torch.arange(rows, device=device)
    return numbers


def _rows_enough(length: int, width: int) -> bool:
    """May a lone text of that length go through blocks of that width? Whole registers and products of many rows."""
    return length % ROW_MULTIPLE == 0 and length * width % 32 == 0


class Prediction:
    """The network's answer to one call, made into logits position by position.

    Bits are equal in any company for rows of one length in float32 on a CPU, elsewhere nearly.

    Args:
        model: what is asked.
        z: masked tokens `[B, L]`. The batch is filled up to a multiple of `ROW_MULTIPLE` with copies of its first row;
            of the text network only what depends on the time alone, since its positions are rows enough.
        t: times `[B]`.
        labels: classes `[B]`, for class-conditional networks.
    """

    @torch.no_grad()
    def __init__(self, model: MaskedDiffusion, z: Tensor, t: Tensor, labels: Tensor | None = None) -> None:
        fill = filled(len(z), z.device)
        t = t.to(torch.float32)[fill]
        labels = None if labels is None else labels[fill]
        network: Any = model.network
        if not (isinstance(network, Transformer) and _rows_enough(z.shape[1], network.config.width)):
            z = z[fill]
        # Networks that end in a projection of single positions are asked for what it projects.
        self._head = getattr(network, "head", None) if hasattr(network, "body") else None
        with evaluating(network):
            self._answer: Tensor = model.logits(z, t, labels) if self._head is None else network.body(z, t, labels)

    @torch.no_grad()
    def logits(self, row: Tensor, position: Tensor) -> Tensor:
        """Logits `[N, V]` float32 at positions [N] of rows [N]."""
        fill = filled(len(row), row.device)
        chosen = self._answer[row[fill], position[fill]]
        if self._head is not None:
            with torch.autocast(chosen.device.type, enabled=False):
                chosen = self._head(chosen)
        return chosen[: len(row)]
