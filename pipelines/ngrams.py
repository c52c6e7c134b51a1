"""How predictable is a text from its last characters? Plug-in entropies of n-grams: yardsticks for a model's bits."""

from collections.abc import Iterable

import numpy as np

LARGEST_VOCABULARY = 256  # V^3 counts of int64 take 134 MB


def count_trigrams(blocks: Iterable[np.ndarray], size: int) -> np.ndarray:
    """Counts `[V, V, V]` int64 of three tokens in a row, over blocks of rows `[n, L]` with tokens in `0..size-1`.

    Trigrams do not reach over the end of a row.
    """
    counts = np.zeros(size**3, np.int64)
    for rows in blocks:
        rows = rows.astype(np.int32)
        trigrams = (rows[:, :-2] * size + rows[:, 1:-1]) * size + rows[:, 2:]
        counts += np.bincount(trigrams.ravel(), minlength=size**3)
    return counts.reshape(size, size, size)


def entropies(trigrams: np.ndarray) -> dict[str, float]:
    """Bits per token of the best predictor that knows the last zero, one and two tokens, from counts `[V, V, V]`.

    Plug-in estimates: H(X), H(X2 | X1) and H(X3 | X1, X2) of the empirical distribution. They lie slightly below the
    truth where contexts are rare, so a model on unseen text that reaches one of them does at least as well.
    """
    return {
        "unigram": _conditional_bits(trigrams.sum((0, 1))[None]),
        "bigram": _conditional_bits(trigrams.sum(0)),
        "trigram": _conditional_bits(trigrams.reshape(-1, trigrams.shape[-1])),
    }


def _conditional_bits(counts: np.ndarray) -> float:
    """H(next | context) in bits of counts `[contexts, V]`: H(context, next) - H(context)."""
    return max(0.0, _bits(counts.ravel()) - _bits(counts.sum(1)))


def _bits(counts: np.ndarray) -> float:
    probabilities = counts[counts > 0] / counts.sum()
    return float(-(probabilities * np.log2(probabilities)).sum())
