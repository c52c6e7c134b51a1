"""Rows of one document each, filled up: what is measured of them is the documents."""

import itertools
from typing import cast

import numpy as np
import pytest
import torch

from md4.likelihood import nelbo, ratio_and_error
from md4.model import ModelConfig, build
from md4.objectives import MD4
from pipelines.evaluate import evaluate
from pipelines.quality import distinct_ngrams, histogram_entropy, measure
from pipelines.shards import ShardSet
from pipelines.vocabularies import keep, vocabulary
from tests.orchestration.small_run import disturbed
from tests.pipelines.small import write_set
from tests.pipelines.small_tokenizer import write_tokenizer

ROWS, LENGTH = 24, 16


def padded_rows(size: int, end: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows `[ROWS, LENGTH]` of documents of 1 to 16 tokens, and how many each has."""
    draw = np.random.default_rng(0)
    counts = draw.integers(1, LENGTH + 1, ROWS)
    rows = draw.integers(1, size, (ROWS, LENGTH)).astype(np.uint16)
    rows[np.arange(LENGTH) >= counts[:, None] - 1] = end
    return rows, counts


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return write_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.mark.parametrize(("objective", "estimator"), [("md4", "mask_count"), ("genmd4", "continuous")])
def test_an_evaluation_counts_real_tokens_alone(tmp_path, tokenizer, objective, estimator):
    """A ratio of sums, with the error of a ratio; the vocabulary comes with the set."""
    words = vocabulary(str(tokenizer))
    rows, counts = padded_rows(words.size, 0)
    facts = {"vocabulary": words.name, "vocabulary_size": words.size}
    for packing in ("document", "concat"):
        write_set(tmp_path / packing, [rows], 8, "validation", **facts, packing=packing)
        keep(words, tmp_path / packing)
    network = {"feature_dim": 16, "heads": 2, "layers": 1}
    config = ModelConfig.model_validate(
        {"vocab_size": words.size, "length": LENGTH, "network": network, "objective": objective}
    )
    model = disturbed(cast(MD4, build(config)), 0).eval()
    asked = {"draws": 2, "seed": 3, "estimator": estimator, "progress": False}
    report = evaluate(model, ShardSet(tmp_path / "document", "validation"), **asked)
    assert report.tokens == counts.sum()
    assert report.vocabulary == words.name
    tokens = torch.from_numpy(rows.astype(np.int64))
    real = torch.arange(LENGTH) < torch.from_numpy(counts)[:, None]
    nats = nelbo(model, tokens, draws=2, seed=3, ids=torch.arange(ROWS), estimator=estimator, real=real).mean(1)
    bits, error = ratio_and_error(nats / np.log(2), torch.from_numpy(counts), torch.arange(ROWS))
    assert report.bits_per_token == pytest.approx(bits, rel=1e-6)
    assert report.standard_error == pytest.approx(error, rel=1e-6)
    whole = evaluate(model, ShardSet(tmp_path / "concat", "validation"), **asked)
    assert whole.tokens == rows.size
    assert whole.bits_per_token != pytest.approx(bits, rel=1e-3)


def test_the_quality_of_texts_is_that_of_their_real_tokens():
    """What stands in the padding changes nothing; and the measures are those of the texts by themselves."""
    rows, counts = padded_rows(50, 0)
    other = np.where(np.arange(LENGTH) < counts[:, None], rows, 7)
    assert measure(rows, 50, counts=counts) == measure(other, 50, counts=counts) != measure(rows, 50)
    texts = [row[:count] for row, count in zip(rows, counts, strict=True)]
    assert measure(rows, 50, counts=counts).entropy == pytest.approx(histogram_entropy(texts).mean())
    pairs = [pair for text in texts for pair in itertools.pairwise(text)]
    assert distinct_ngrams(rows, 50, counts=counts)[2] == len(set(pairs)) / len(pairs)
    everything = np.full(ROWS, LENGTH)
    assert measure(rows, 50, counts=everything) == measure(rows, 50)
