"""A yardstick for samples that needs no other model: how they read to the trigrams of the corpus.

    perplexity   under a trigram model of the training rows, smoothed by interpolation with bigrams, single symbols and
                 chance; the four weights are fitted on held-out rows (Jelinek and Mercer 1980), by EM
    divergence   Jensen-Shannon, in bits, between the trigrams of samples and of the training rows: 0 for the same
                 law, 1 for none in common. Unlike the perplexity it doesn't reward repetition. A finite number of
                 texts lies above 0 even if it is real: compare equal numbers, and with real texts of that number

Symbols are a model's own tokens if these are few, else the bytes of its text. Shapes: N texts, V symbols.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from md4.errors import UserError
from pipelines.ngrams import LARGEST_VOCABULARY
from pipelines.vocabularies import Vocabulary

GROUPS = 20  # of texts, left out in turn for a standard error


def symbols(texts: Sequence[np.ndarray], words: Vocabulary) -> tuple[list[np.ndarray], int]:
    """Tokens of texts (each `[n]`) as symbols, and V: as they are if few are different, else the bytes of the text."""
    if words.size <= LARGEST_VOCABULARY:
        return [np.asarray(text, np.int64) for text in texts], words.size
    return [np.frombuffer(words.decode(text).encode(), np.uint8).astype(np.int64) for text in texts], 256


def trigrams(texts: Sequence[np.ndarray], size: int) -> tuple[np.ndarray, np.ndarray]:
    """All trigrams of texts as numbers below V^3 `[M]` int64, and the text of each `[M]`."""
    parts = [(text[:-2] * size + text[1:-1]) * size + text[2:] for text in texts]
    return np.concatenate(parts), np.repeat(np.arange(len(parts)), [len(part) for part in parts])


@dataclass(frozen=True)
class NgramModel:
    """The trigrams of a corpus."""

    counts: np.ndarray  # [V, V, V] int64
    weights: np.ndarray  # [4]: of chance, single symbols, bigrams, trigrams

    @classmethod
    def fit(
        cls, corpus: Sequence[np.ndarray], held_out: Sequence[np.ndarray], size: int, rounds: int = 100
    ) -> "NgramModel":
        """Counts of `corpus`, weights of `held_out`. UserError if either has no trigram."""
        codes, others = trigrams(corpus, size)[0], trigrams(held_out, size)[0]
        if not len(codes) or not len(others):
            raise UserError("the rows are shorter than three symbols: there are no trigrams to compare samples with")
        counts = np.bincount(codes, minlength=size**3).reshape(size, size, size)
        parts = _parts(counts, others)
        weights = np.full(4, 0.25)
        for _ in range(rounds):
            shares = weights * parts
            weights = (shares / shares.sum(1, keepdims=True)).mean(0)
        return cls(counts, weights)

    def nats(self, texts: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
        """-ln P of each text from its third symbol on `[N]`, and how many symbols these are `[N]`."""
        codes, owner = trigrams(texts, len(self.counts))
        each = -np.log(_parts(self.counts, codes) @ self.weights)
        return np.bincount(owner, each, len(texts)), np.bincount(owner, minlength=len(texts))

    def divergence(self, texts: Sequence[np.ndarray]) -> tuple[float, float]:
        """Jensen-Shannon divergence of all trigrams of texts from the corpus', in bits, and its standard error.

        The error is a jackknife's: groups of texts are left out in turn. UserError for fewer than two texts.
        """
        if len(texts) < 2:
            raise UserError(f"at least 2 texts are needed for a standard error, there is {len(texts)}")
        codes, owner = trigrams(texts, len(self.counts))
        seen, place = np.unique(codes, return_inverse=True)
        groups = min(GROUPS, len(texts))
        table = np.zeros((groups, len(seen)))
        np.add.at(table, (owner % groups, place), 1)
        corpus = self.counts.ravel()[seen] / self.counts.sum()
        whole = table.sum(0)
        without = [_divergence(whole - part, corpus) for part in table]
        return _divergence(whole, corpus), jackknife_error(without)


def jackknife_error(without: Sequence[float]) -> float:
    """Standard error of an estimate of G groups, from the estimates with one of them left out `[G]`."""
    values = np.asarray(without)
    return math.sqrt((len(values) - 1) / len(values) * float(((values - values.mean()) ** 2).sum()))


def _parts(counts: np.ndarray, codes: np.ndarray) -> np.ndarray:
    """Probabilities `[M, 4]` of the last symbols of trigrams by chance, alone, and after one and two symbols."""
    size = len(counts)
    a, b, c = codes // size**2, codes // size % size, codes % size
    singles, pairs, firsts = counts.sum((0, 1)), counts.sum(0), counts.sum(2)
    alone = singles[c] / singles.sum()
    after_one = _share(pairs[b, c], pairs.sum(1)[b], alone)
    after_two = _share(counts[a, b, c], firsts[a, b], after_one)
    return np.stack([np.full(len(codes), 1 / size), alone, after_one, after_two], axis=1)


def _share(count: np.ndarray, total: np.ndarray, otherwise: np.ndarray) -> np.ndarray:
    """count / total, where anything was counted."""
    return np.where(total > 0, count / np.maximum(total, 1), otherwise)


def _divergence(counts: np.ndarray, other: np.ndarray) -> float:
    """Of the law of `counts` [K] from one whose probabilities at these K places are `other` [K], in bits."""
    own = counts / counts.sum()
    middle = (own + other) / 2
    relative = sum(float((law[law > 0] * np.log2(law[law > 0] / middle[law > 0])).sum()) for law in (own, other))
    return (relative + 1 - float(other.sum())) / 2  # what only the other has counts one bit
