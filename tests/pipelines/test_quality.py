"""Measures of samples of text against hand-computed values and plain loops."""

import math

import numpy as np
import pytest
from pydantic import ValidationError

from md4.errors import UserError
from pipelines.judges import Scores
from pipelines.quality import TextQuality, distinct_ngrams, histogram_entropy, mauve, measure, perplexity


def test_entropy_of_rows_by_hand():
    rows = np.array([[3, 3, 3, 3], [0, 0, 7, 7], [0, 1, 2, 3], [5, 5, 5, 9]])
    expected = [0, math.log(2), math.log(4), -0.75 * math.log(0.75) - 0.25 * math.log(0.25)]
    assert histogram_entropy(rows) == pytest.approx(expected, abs=1e-12)
    found = measure(rows, 10)
    assert found.entropy == pytest.approx(np.mean(expected))
    assert found.entropy_error == pytest.approx(np.std(expected, ddof=1) / 2)
    assert (found.perplexity, found.perplexity_error, found.judge_tokens) == (None, None, None)


@pytest.mark.parametrize(("size", "shape"), [(3, (20, 12)), (50258, (4, 40)), (65536, (3, 4))])
def test_distinct_ngrams_are_counted(size, shape):
    rows = np.random.default_rng(0).integers(0, size, shape).astype(np.uint16)
    rows[-1] = size - 1  # the largest codes
    found = distinct_ngrams(rows, size)
    for n in range(1, 5):
        grams = [tuple(row[start : start + n]) for row in rows.tolist() for start in range(len(row) - n + 1)]
        assert found[n] == len(set(grams)) / len(grams)


def test_short_texts_have_no_long_ngrams():
    found = measure(np.array([[0, 1], [0, 1]]), 2)
    assert (found.distinct_1, found.distinct_2, found.distinct_3, found.distinct_4) == (0.5, 0.5, None, None)


def test_perplexity_and_its_error():
    """The ratio of sums, and the delta method beside the jackknife, which knows nothing of it."""
    random = np.random.default_rng(1)
    tokens = random.integers(20, 60, 400)
    scores = Scores(nats=tokens * 2 + 5 * random.standard_normal(400), tokens=tokens)
    value, error = perplexity(scores)
    assert value == pytest.approx(math.exp(scores.nats.sum() / tokens.sum()))
    without = np.exp((scores.nats.sum() - scores.nats) / (tokens.sum() - tokens))
    assert error == pytest.approx(np.sqrt(399 / 400 * np.sum((without - without.mean()) ** 2)), rel=0.02)
    with pytest.raises(UserError, match="no token to score"):
        perplexity(Scores(np.zeros(2), np.zeros(2, np.int64)))


def test_no_perplexity_without_entropy():
    whole = measure(np.array([[0, 1], [1, 1]]), 2, Scores(np.array([2.0, 4.0]), np.array([2, 2])))
    assert whole.perplexity == pytest.approx(math.exp(1.5))
    tree = whole.model_dump()
    for missing in ("entropy", "entropy_error", "perplexity_error", "judge_tokens"):
        with pytest.raises(ValidationError):
            TextQuality.model_validate({**tree, missing: None})
    for value in (math.nan, math.inf, -0.1):
        with pytest.raises(ValidationError):
            TextQuality.model_validate({**tree, "entropy": value})
    assert TextQuality.model_validate_json(whole.model_dump_json()) == whole
    with pytest.raises(UserError, match="at least 2 texts"):
        measure(np.array([[0, 1]]), 2)


def test_mauve_knows_the_same_from_the_different():
    random = np.random.default_rng(2)
    one = random.standard_normal((120, 8)) + 4 * np.eye(8)[0]
    other = random.standard_normal((120, 8)) - 4 * np.eye(8)[0]
    same, different = mauve(one, one), mauve(one, other)
    assert same.mauve > 0.99
    assert different.mauve < 0.05
    assert different.mauve < mauve(np.concatenate([one[:60], other[:60]]), other).mauve < same.mauve
    assert (same.mauve_clusters, same.mauve_references, same.mauve_scaling) == (12, 120, 5)
    assert mauve(one, other) == different
    assert mauve(one, other, clusters=4).mauve_clusters == 4
    with pytest.raises(UserError, match="there are 1, 120"):
        mauve(one[:1], other)
    with pytest.raises(UserError, match="allowed are 2 to 240"):
        mauve(one, other, clusters=241)
