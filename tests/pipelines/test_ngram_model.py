"""The trigram yardstick: probabilities and divergence against their definitions, errors against repeated draws."""

import math
from itertools import product

import numpy as np
import pytest

from md4.errors import UserError
from pipelines.ngram_model import NgramModel, symbols
from pipelines.vocabularies import vocabulary

SIZE = 3


def texts_of(law: np.ndarray, count: int, length: int, seed: int) -> list[np.ndarray]:
    """Texts of a Markov chain with transition probabilities `law` [V, V]."""
    draw = np.random.default_rng(seed)
    found = []
    for _ in range(count):
        text = [int(draw.integers(len(law)))]
        while len(text) < length:
            text.append(int(draw.choice(len(law), p=law[text[-1]])))
        found.append(np.array(text))
    return found


LAW = np.array([[0.1, 0.8, 0.1], [0.2, 0.1, 0.7], [0.9, 0.05, 0.05]])


@pytest.fixture(scope="module")
def model():
    return NgramModel.fit(texts_of(LAW, 300, 12, 0), texts_of(LAW, 100, 12, 1), SIZE)


def test_the_law_of_the_next_symbol_is_one(model):
    """In every context, also one that never came; and it is the chain's, within what 3,000 trigrams tell."""
    for a, b in product(range(SIZE), repeat=2):
        each = np.array([model.nats([np.array([a, b, c])])[0][0] for c in range(SIZE)])
        assert np.exp(-each).sum() == pytest.approx(1)
        assert np.exp(-each) == pytest.approx(LAW[b], abs=0.08)
    sparse = NgramModel.fit([np.array([0, 1, 2, 0])], [np.array([0, 1, 2, 1])], SIZE)
    unseen = [sparse.nats([np.array([2, 2, c])])[0][0] for c in range(SIZE)]
    assert np.exp(-np.array(unseen)).sum() == pytest.approx(1)
    assert np.isfinite(unseen).all()


def test_the_weights_are_the_best_for_the_held_out_texts(model):
    """No small change of them makes the held-out texts more probable, by more than 0.05 of 625 nats."""
    held_out = texts_of(LAW, 100, 12, 1)
    best = model.nats(held_out)[0].sum()
    for place, step in product(range(4), (0.02, -0.01)):
        other = model.weights.copy()
        other[place] = max(0, other[place] + step)
        other /= other.sum()
        assert NgramModel(model.counts, other).nats(held_out)[0].sum() >= best - 0.05


def test_what_is_scored_is_counted(model):
    nats, count = model.nats([np.array([0, 1, 2, 0]), np.array([0, 1]), np.array([1, 2, 0])])
    assert count.tolist() == [2, 0, 1]
    assert nats[1] == 0
    assert nats[0] == pytest.approx(sum(model.nats([np.array(part)])[0][0] for part in ([0, 1, 2], [1, 2, 0])))


def test_the_divergence_is_its_definition(model):
    texts = texts_of(LAW, 40, 8, 3)
    counts = np.zeros((SIZE, SIZE, SIZE))
    for text in texts:
        for a, b, c in zip(text, text[1:], text[2:], strict=False):
            counts[a, b, c] += 1
    p, q = counts / counts.sum(), model.counts / model.counts.sum()
    m = (p + q) / 2

    def relative(one):
        return sum(x * math.log2(x / y) for x, y in zip(one.ravel(), m.ravel(), strict=True) if x > 0)

    assert model.divergence(texts)[0] == pytest.approx((relative(p) + relative(q)) / 2)
    never = NgramModel.fit([np.array([0, 1, 2, 0, 1, 2])], [np.array([0, 1, 2])], SIZE)
    assert never.divergence([np.array([2, 1, 0, 2]), np.array([2, 1, 0])])[0] == pytest.approx(1)


def test_repetition_is_probable_but_diverges(model):
    """What a perplexity alone would praise."""
    real, dull = texts_of(LAW, 60, 12, 4), [np.array([0, 1, 2] * 4)] * 60
    assert model.nats(dull)[0].sum() < model.nats(real)[0].sum()
    assert model.divergence(dull)[0] > 10 * model.divergence(real)[0]


def test_the_jackknifes_error_is_the_spread_of_repeated_draws(model):
    """Within a factor of 1.6 for 60 draws of 80 texts."""
    found = np.array([model.divergence(texts_of(LAW, 80, 12, 100 + draw)) for draw in range(60)])
    assert found[:, 1].mean() == pytest.approx(found[:, 0].std(ddof=1), rel=0.6)


def test_large_vocabularies_are_read_as_bytes():
    few = symbols([np.array([0, 1])], vocabulary("text8"))
    assert few[1] == 27
    assert few[0][0].tolist() == [0, 1]

    class Words:
        size = 50_000

        def decode(self, ids):
            return "é" * len(ids)

    read, size = symbols([np.array([7, 8])], Words())  # type: ignore[arg-type]
    assert size == 256
    assert read[0].tolist() == [0xC3, 0xA9, 0xC3, 0xA9]


def test_too_little_is_refused(model):
    with pytest.raises(UserError, match="shorter than three symbols"):
        NgramModel.fit([np.array([0, 1])], [np.array([0, 1, 2])], SIZE)
    with pytest.raises(UserError, match="at least 2 texts"):
        model.divergence([np.array([0, 1, 2])])
