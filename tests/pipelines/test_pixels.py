"""The yardsticks of images, against their definition."""

import numpy as np
import pytest

from pipelines.pixels import count_positions, entropies


def test_counts_of_positions_over_blocks():
    rows = np.random.default_rng(0).integers(0, 5, (50, 7)).astype(np.uint8)
    counts = count_positions([rows[:20], rows[20:20], rows[20:]], 7, 5)
    assert counts.tolist() == [[int((rows[:, place] == token).sum()) for token in range(5)] for place in range(7)]


def test_entropies_of_known_distributions():
    """Position 0 is always 3, position 1 a fair coin between 0 and 1: half a bit on average; together 1.5 bits."""
    rows = np.array([[3, 0], [3, 1]] * 10, np.uint8)
    bits = entropies(count_positions([rows], 2, 4))
    assert bits == {"independent_bits": pytest.approx(0.5), "histogram_bits": pytest.approx(1.5)}


def test_bounds():
    """Knowing the position never costs bits, and no more than log2 V are needed."""
    rows = np.random.default_rng(1).integers(0, 16, (1000, 10)) // np.arange(1, 11)
    bits = entropies(count_positions([rows], 10, 16))
    assert 0 < bits["independent_bits"] < bits["histogram_bits"] < 4
    assert entropies(count_positions([np.zeros((3, 2), np.uint8)], 2, 16))["independent_bits"] == 0
