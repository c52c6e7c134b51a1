"""Asking the network in such a way that a row's answer doesn't depend on the rows beside it."""

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from md4.objectives import MD4

# Two facts of CPU kernels make the last bits of a row depend on the size of its batch: matrix products of one to three
# rows take other kernels than larger ones, and elementwise functions compute what is left over after the last whole
# vector registers (32 numbers) by other code. With a multiple of four rows and a feature dimension that is a multiple
# of 16, neither happens: a row's answer then has the same bits in any company.
ROW_MULTIPLE = 4


def logits(model: "MD4", z: Tensor, t: Tensor, labels: Tensor | None = None) -> Tensor:
    """Logits `[B, L, V]` float32 for masked tokens z `[B, L]` at times t `[B]`: each row as it would be alone.

    labels: classes `[B]`, for class-conditional models. The batch is filled up to a multiple of `ROW_MULTIPLE` with
    copies of its first row. Bits are equal in any company for rows of one length in float32 on a CPU, elsewhere nearly.
    """
    rows = z.shape[0]
    t = t.to(torch.float32)
    if missing := -rows % ROW_MULTIPLE:
        fill = [*range(rows)] + [0] * missing
        z, t = z[fill], t[fill]
        labels = None if labels is None else labels[fill]
    return model.logits(z, t, labels)[:rows]
