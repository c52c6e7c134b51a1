import math
from collections import Counter

import numpy as np
import pytest

from pipelines import ngrams


def by_definition(rows: list[list[int]], order: int) -> float:
    """H(last | the `order - 1` before it) over the trigrams of the rows, from counted tuples."""
    grams = Counter(tuple(row[i : i + 3][3 - order :]) for row in rows for i in range(len(row) - 2))
    contexts = Counter()
    for gram, count in grams.items():
        contexts[gram[:-1]] += count
    total = sum(grams.values())
    return -sum(count / total * math.log2(count / contexts[gram[:-1]]) for gram, count in grams.items())


def test_entropies_equal_their_definition():
    rows = np.random.default_rng(0).integers(0, 5, (40, 30)) ** 2 % 7
    entropies = ngrams.entropies(ngrams.count_trigrams([rows[:15], rows[15:]], 7))
    for order, name in enumerate(("unigram", "bigram", "trigram"), start=1):
        assert entropies[name] == pytest.approx(by_definition(rows.tolist(), order), abs=1e-12)


def test_trigrams_do_not_cross_rows():
    counts = ngrams.count_trigrams([np.array([[0, 0, 0, 1], [1, 1, 1, 0]], np.uint8)], 2)
    assert counts.sum() == 4
    assert counts[0, 0, 0] == counts[0, 0, 1] == counts[1, 1, 1] == counts[1, 1, 0] == 1


def test_a_cycle_is_predictable_from_one_token():
    rows = np.tile(np.arange(16, dtype=np.uint8), (3, 16))
    entropies = ngrams.entropies(ngrams.count_trigrams([rows], 16))
    assert entropies["unigram"] == pytest.approx(4, abs=1e-3)
    assert entropies["bigram"] == pytest.approx(0, abs=1e-9)
    assert entropies["trigram"] == pytest.approx(0, abs=1e-9)


def test_large_tokens_do_not_overflow():
    rows = np.full((2, 5), 255, np.uint8)
    counts = ngrams.count_trigrams([rows], 256)
    assert counts[255, 255, 255] == counts.sum() == 6
