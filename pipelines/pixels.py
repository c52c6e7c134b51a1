"""How predictable are images for one who looks at no neighbours? Plug-in entropies: yardsticks for a model's bits."""

from collections.abc import Iterable

import numpy as np


def count_positions(blocks: Iterable[np.ndarray], length: int, levels: int) -> np.ndarray:
    """Counts `[L, V]` int64 of every token at every position, over blocks of rows `[n, L]` with tokens `0..V-1`."""
    counts = np.zeros(length * levels, np.int64)
    places = np.arange(length) * levels
    for rows in blocks:
        counts += np.bincount((rows + places).ravel(), minlength=counts.size)
    return counts.reshape(length, levels)


def entropies(counts: np.ndarray) -> dict[str, float]:
    """Bits per dimension of two predictors that know nothing of an image's other pixels, from counts `[L, V]`.

    independent: the best that treats each position by itself, the mean over positions of the entropy of the tokens
    there. histogram: the best that doesn't know the position either. Plug-in estimates: from n images they lie below
    the truth by about (V' - 1) / (2 n ln 2) bits, V' tokens being in use, so a model on unseen images that gets below
    one of them does beat the predictor.
    """
    return {
        "independent_bits": float(np.mean([_bits(position) for position in counts])),
        "histogram_bits": _bits(counts.sum(0)),
    }


def _bits(counts: np.ndarray) -> float:
    probabilities = counts[counts > 0] / counts.sum()
    return max(0.0, float(-(probabilities * np.log2(probabilities)).sum()))
