"""From the tokens of documents to rows of L tokens. Pure functions; see `SetConfig.packing` for what they are for."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

Long = Literal["cut", "split", "drop"]


@dataclass(frozen=True)
class Packed:
    """Rows, and where all tokens went: tokens + padding = rows.size + dropped, unless windows are to be cut of them."""

    rows: np.ndarray  # [R, L], as they are stored
    tokens: int  # of documents, with what separates them
    dropped: int = 0  # of these tokens, those in no row
    padding: int = 0  # tokens of rows that belong to no document
    stream: int | None = None  # tokens that windows are cut of: those of `rows` but for what fills the last one up
    too_long: list[int] = field(default_factory=list)  # documents that were left out


def concatenated(documents: Sequence[np.ndarray], length: int, dtype: np.dtype, closed: bool = True) -> Packed:
    """Documents one behind the other, cut into rows; what does not fill the last row is dropped.

    closed: the separator behind the last document is kept.
    """
    tokens = _joined(documents, dtype, closed)
    rows = tokens[: len(tokens) // length * length].reshape(-1, length)
    return Packed(rows, len(tokens), dropped=len(tokens) - rows.size)


def streamed(
    documents: Sequence[np.ndarray], length: int, stride: int, fill: int, dtype: np.dtype, closed: bool = True
) -> Packed:
    """As `concatenated`, but windows of L tokens begin at every `stride`-th (at most L) token of what is stored.

    What lacks in the last row is filled with the token `fill`, which is in no window.
    """
    tokens = _joined(documents, dtype, closed)
    if len(tokens) < length:
        return Packed(np.empty((0, length), dtype), len(tokens), dropped=len(tokens))
    filled = np.full(-(-len(tokens) // length) * length, fill, dtype)
    filled[: len(tokens)] = tokens
    behind = (len(tokens) - length) % stride  # the last window
    return Packed(filled.reshape(-1, length), len(tokens), dropped=behind, stream=len(tokens))


def one_a_row(documents: Sequence[np.ndarray], length: int, end: int, long: Long, dtype: np.dtype) -> Packed:
    """Each document in a row of its own: its tokens, one end-of-text `end`, and more of them up to L.

    Documents come without an end-of-text. One that fills its row exactly has none. Of longer ones `long` keeps the
    first L tokens (cut), all in several rows (split), or nothing (drop).
    """
    rows, dropped, padding, tokens, too_long = [], 0, 0, 0, []
    for number, document in enumerate(documents):
        if len(document) > length and long == "drop":
            too_long.append(number)
            continue
        tokens += len(document)
        kept = document[:length] if long == "cut" else document
        dropped += len(document) - len(kept)
        for start in range(0, max(1, len(kept)), length):
            piece = kept[start : start + length]
            row = np.full(length, end, dtype)
            row[: len(piece)] = piece
            tokens += len(piece) < length
            padding += max(0, length - len(piece) - 1)
            rows.append(row)
    stacked = np.stack(rows) if rows else np.empty((0, length), dtype)
    return Packed(stacked, tokens, dropped=dropped, padding=padding, too_long=too_long)


def _joined(documents: Sequence[np.ndarray], dtype: np.dtype, closed: bool) -> np.ndarray:
    if not documents:
        return np.empty(0, dtype)
    tokens = np.concatenate(documents)
    return tokens if closed else tokens[:-1]
