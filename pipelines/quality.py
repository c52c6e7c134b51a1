"""How good are samples of text? Measures that need no likelihood of the model that wrote them.

    entropy      of the histogram of tokens within a sample, in nats, averaged over samples: 5.6 to 5.7 for real web
                 text of 1024 GPT-2 tokens. Samples that repeat themselves have less (arXiv 2409.02908, section 5)
    distinct-n   different n-grams as a share of all n-grams of all samples (Li et al., arXiv 1510.03055)
    perplexity   exp(nats / tokens) under a judge (`pipelines.judges`), in the judge's tokens
    MAUVE        how alike samples and real texts are in the judge's features (Pillutla et al., arXiv 2102.01454)

A perplexity never stands without its entropy: low temperature buys the one with the other, and `TextQuality` can't be
made without both. Shapes: N samples, L tokens of a sample, D features.
"""

import math
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, model_validator

from md4.errors import UserError
from md4.likelihood import ratio_and_error
from pipelines.extras import extra
from pipelines.judges import Scores

NGRAMS = 4  # the longest


class TextQuality(BaseModel):
    """The measures of some texts, without those that compare them with others."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    entropy: FiniteFloat = Field(
        ge=0, description="nats, of the histogram of tokens within a text; the mean over texts"
    )
    entropy_error: FiniteFloat = Field(description="standard error of that mean")
    distinct_1: float | None = Field(description="different tokens as a share of all; None where texts are shorter")
    distinct_2: float | None = Field(description="the same of pairs of tokens")
    distinct_3: float | None
    distinct_4: float | None
    perplexity: float | None = Field(default=None, gt=0, description="exp(nats / token) under the judge")
    perplexity_error: float | None = Field(default=None, description="standard error, from the spread between texts")
    judge_tokens: int | None = Field(default=None, description="tokens that the judge scored")

    @model_validator(mode="after")
    def _perplexity_is_complete(self) -> "TextQuality":
        """Entropy is always there; what belongs to a perplexity must be there or not as a whole."""
        parts = (self.perplexity, self.perplexity_error, self.judge_tokens)
        if any(part is None for part in parts) and any(part is not None for part in parts):
            raise ValueError("a perplexity stands with its standard error and the number of tokens, or not at all")
        return self


def measure(rows: np.ndarray, size: int, scores: Scores | None = None, counts: np.ndarray | None = None) -> TextQuality:
    """The measures of texts with tokens `[N, L]` in `0..size-1`, and their perplexity if a judge has scored them.

    counts: `[N]`, how many tokens of each row, the first ones, are the text; all if None.

    UserError for fewer than two texts: there would be no standard error.
    """
    if len(rows) < 2:
        raise UserError(f"at least 2 texts are needed for a standard error, there is {len(rows)}")
    texts = rows if counts is None else [row[:count] for row, count in zip(rows, counts, strict=True)]
    entropies = histogram_entropy(texts)
    distinct = distinct_ngrams(rows, size, counts=counts)
    found: dict[str, Any] = {f"distinct_{n}": distinct.get(n) for n in range(1, NGRAMS + 1)}
    if scores is not None:
        value, error = perplexity(scores)
        found |= {"perplexity": value, "perplexity_error": error, "judge_tokens": int(scores.tokens.sum())}
    error = float(entropies.std(ddof=1)) / math.sqrt(len(rows))
    return TextQuality(entropy=float(entropies.mean()), entropy_error=error, **found)


def histogram_entropy(rows: Iterable[np.ndarray]) -> np.ndarray:
    """Entropy `[N]` in nats of the histogram of tokens within each row `[L]`; at most ln(min(L, V))."""
    shares = (np.unique(row, return_counts=True)[1] / len(row) for row in rows)
    return np.array([max(0.0, -float(np.sum(share * np.log(share)))) for share in shares])


def distinct_ngrams(
    rows: np.ndarray, size: int, longest: int = NGRAMS, counts: np.ndarray | None = None
) -> dict[int, float]:
    """n -> different n-grams as a share of all, of rows `[N, L]` with tokens in `0..size-1`, for n up to `longest`.

    n-grams don't reach from row to row; those longer than a row are left out. More samples give smaller shares.
    counts: as of `measure`.
    """
    rows = np.asarray(rows, np.int64)
    shares, codes = {}, rows  # codes [N, L-n+1]: a number for each different n-gram
    for n in range(1, min(longest, rows.shape[1]) + 1):
        if n > 1:
            codes = codes[:, :-1] * size + rows[:, n - 1 :]
        different, codes = np.unique(codes, return_inverse=True)
        codes = codes.reshape(len(rows), -1)
        if counts is None:
            shares[n] = len(different) / codes.size
        elif (inside := np.arange(n, rows.shape[1] + 1) <= counts[:, None]).any():
            shares[n] = len(np.unique(codes[inside])) / int(inside.sum())
    return shares


def perplexity(scores: Scores) -> tuple[float, float]:
    """exp(all nats / all tokens), and its standard error from the spread between texts (delta method; NaN for one)."""
    if not scores.tokens.sum():
        raise UserError("the judge found no token to score in the texts")
    texts = torch.arange(len(scores.nats))
    nats, error = ratio_and_error(torch.from_numpy(scores.nats), torch.from_numpy(scores.tokens), texts)
    return math.exp(nats), math.exp(nats) * error


class MauveFacts(BaseModel):
    """MAUVE with the settings that it depends on."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    mauve: float = Field(ge=0, le=1, description="1 = texts and references can't be told apart")
    mauve_references: int = Field(description="real texts compared with")
    mauve_clusters: int = Field(description="of k-means; changes the value")
    mauve_scaling: float = Field(description="the constant c of the paper")
    mauve_seed: int = Field(description="of k-means")
    mauve_features: str = "last hidden state of the judge at the last token of its first window"


def mauve(samples: np.ndarray, references: np.ndarray, clusters: int | None = None, seed: int = 25) -> MauveFacts:
    """MAUVE between features of samples `[N, D]` and of real texts `[M, D]`.

    clusters: a tenth of the smaller number of texts if None, at least 2, as the paper advises; the paper uses
    thousands of texts, and a few dozen tell only gross differences apart. UserError for fewer than 2 texts of either.
    """
    least = min(len(samples), len(references))
    if least < 2:
        raise UserError(f"MAUVE needs at least 2 samples and 2 references, there are {len(samples)}, {len(references)}")
    clusters = max(2, round(least / 10)) if clusters is None else clusters
    if not 2 <= clusters <= len(samples) + len(references):
        raise UserError(f"MAUVE's clusters are {clusters}; allowed are 2 to {len(samples) + len(references)}")
    scaling = 5
    found = extra("mauve", "MAUVE").compute_mauve(
        p_features=samples,
        q_features=references,
        num_buckets=clusters,
        mauve_scaling_factor=scaling,
        seed=seed,
        verbose=False,
    )
    return MauveFacts(
        mauve=min(1.0, max(0.0, float(found.mauve))),  # the area under a polygon may round to a hair above 1
        mauve_references=len(references),
        mauve_clusters=clusters,
        mauve_scaling=scaling,
        mauve_seed=seed,
    )
