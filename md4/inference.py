"""Asking the network in such a way that a row's answer doesn't depend on the rows beside it."""

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from md4.objectives import MD4

# Matrix products of one to three rows take other kernels than larger ones, with other rounding. From four rows on a
# row's result has the same bits whatever the batch, so a seeded sample or an evaluated row doesn't depend on company.
FEWEST_ROWS = 4


def logits(model: "MD4", z: Tensor, t: Tensor, labels: Tensor | None = None) -> Tensor:
    """Logits `[B, L, V]` float32 for masked tokens z `[B, L]` at times t `[B]`: each row as it would be alone.

    labels: classes `[B]`, for class-conditional models. Small batches are filled up to `FEWEST_ROWS` with copies of
    the first row. Bits are equal in any company for rows of one length, in float32 on a CPU; elsewhere nearly so.
    """
    rows = z.shape[0]
    t = t.to(torch.float32)
    if rows < FEWEST_ROWS:
        fill = [*range(rows)] + [0] * (FEWEST_ROWS - rows)
        z, t = z[fill], t[fill]
        labels = None if labels is None else labels[fill]
    return model.logits(z, t, labels)[:rows]
