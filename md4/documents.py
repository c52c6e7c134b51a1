"""Documents in rows of tokens, told by the end-of-text token that stands behind each.

A row that holds one document is filled up with end-of-text tokens: everything behind the first of them is padding. A
row that documents were joined for may hold several; each has the end-of-text token behind it as its own last token.

Shapes: B rows, L tokens of a row.
"""

import torch
from torch import Tensor


def no_padding(tokens: Tensor, end_of_text: int) -> Tensor:
    """Which of tokens [B, L], rows of one document each, are no padding: bool `[B, L]`, the first end included."""
    ends = tokens == end_of_text
    return ends.cumsum(1) - ends.long() == 0


def segments(tokens: Tensor, end_of_text: int) -> Tensor:
    """The number `[B, L]` of each position's document in its row, from 0. Padding is cut off from what precedes it."""
    ends = tokens == end_of_text
    return ends.cumsum(1) - ends.long()


def same_document(number: Tensor) -> Tensor:
    """Which positions see each other, for documents numbered [B, L]: bool `[B, 1, L, L]`, one for all heads."""
    return (number[:, :, None] == number[:, None, :])[:, None]


def per_row(nats: Tensor, real: Tensor | None) -> Tensor:
    """Terms of the single positions, `[B, L]`, summed over those of each row that are no padding: `[B]`."""
    return (nats if real is None else torch.where(real, nats, 0.0)).sum(1)
