"""What `md4 grid --frontier` measures samples by: figures, one of which is the score that ranks them."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

import numpy as np

from md4.errors import UserError
from orchestration.measures import Texts
from orchestration.runs import Loaded
from pipelines.config import prepared_path
from pipelines.image_quality import FeatureNetwork
from pipelines.images import brightness
from pipelines.judges import JudgeFacts
from pipelines.ngram_model import NgramModel, symbols
from pipelines.pixel_moments import Moments, pixel_features
from pipelines.quality import histogram_entropy
from pipelines.sampler_frontier import Figure
from pipelines.shards import ShardSet

_CORPUS = 20_000  # rows of a split that are looked at, at most


class Yardstick(Protocol):
    """Measures samples; the score is the figure by which settings are ranked, lower is better."""

    score: str
    judge: JudgeFacts | None

    def __call__(self, tokens: np.ndarray) -> tuple[Figure, dict[str, Figure]]:
        """Score and other figures of samples `[N, L]`."""
        ...


def yardstick(
    loaded: Loaded,
    split: str,
    count: int,
    judge: str | None = None,
    features: Path | None = None,
    say: Callable[[str], None] = print,
) -> Yardstick:
    """What fits the run: trigrams of texts or a judge, pixels of images or a network's features.

    split: of the real rows, `count` of which are compared with by a judge. UserError for options that don't fit.
    """
    images = loaded.config.data.has_images
    if images and judge is not None:
        raise UserError(
            f"run {loaded.config.name} makes images: --judge is about text, images may have --features FILE"
        )
    if not images and features is not None:
        raise UserError(f"run {loaded.config.name} makes text: --features is about images, text may have --judge")
    corpus = ShardSet(prepared_path(loaded.config.data), "train")
    rows = corpus.read(np.arange(min(corpus.rows, _CORPUS)) * corpus.rows // min(corpus.rows, _CORPUS))
    if images:
        return _Pixels(loaded, rows, features)
    if judge is not None:
        return _Judged(loaded, real_rows(loaded, split, count)[0], judge)
    held_out = ShardSet(prepared_path(loaded.config.data), split)
    say(f"counting the trigrams of {len(rows):,} training rows")
    return _Trigrams(loaded, rows, held_out.read(np.arange(min(held_out.rows, _CORPUS))))


def real_rows(loaded: Loaded, split: str, count: int) -> tuple[np.ndarray, np.ndarray | None]:
    """`count` rows `[N, L]` of a split, as far as it has so many, and their classes `[N]`."""
    data = ShardSet(prepared_path(loaded.config.data), split)
    count = min(data.rows, count)
    return data.read_labelled(np.arange(count) * data.rows // count)


def _texts(rows: np.ndarray, end: int | None) -> list[np.ndarray]:
    """The tokens of each row up to its first `end`, which is included."""
    if end is None:
        return list(rows)
    stops = [np.flatnonzero(row == end)[:1] for row in rows]
    return [row if not len(stop) else row[: int(stop[0]) + 1] for row, stop in zip(rows, stops, strict=True)]


def _mean(values: np.ndarray) -> Figure:
    return Figure(value=float(values.mean()), standard_error=float(values.std(ddof=1)) / math.sqrt(len(values)))


class _Trigrams:
    """Texts by the trigrams of their corpus."""

    score = "trigram divergence from the corpus, bits"
    judge: JudgeFacts | None = None

    def __init__(self, loaded: Loaded, corpus: np.ndarray, held_out: np.ndarray):
        self.words, self.end = loaded.vocabulary, loaded.config.data.end_of_rows
        known, size = symbols(_texts(corpus, self.end), self.words)
        self.model = NgramModel.fit(known, symbols(_texts(held_out, self.end), self.words)[0], size)

    def __call__(self, tokens: np.ndarray) -> tuple[Figure, dict[str, Figure]]:
        texts = _texts(tokens, self.end)
        read = symbols(texts, self.words)[0]
        value, error = self.model.divergence(read)
        nats, count = self.model.nats(read)
        rate = float(nats.sum() / count.sum())
        spread = float(np.std(nats - rate * count, ddof=1)) * math.sqrt(len(nats)) / float(count.sum())
        perplexity = Figure(value=math.exp(rate), standard_error=math.exp(rate) * spread)
        entropy = _mean(histogram_entropy(texts))
        return Figure(value=value, standard_error=error), {"trigram perplexity": perplexity, "entropy, nats": entropy}


class _Judged:
    """Texts by a judge: how far their perplexity is above, and their entropy below, that of real text."""

    score = "nats worse than real text: log perplexity above its, plus entropy below its"

    def __init__(self, loaded: Loaded, real: np.ndarray, judge: str):
        self.texts = Texts(loaded.vocabulary, real, judge, False, loaded.config.data.end_of_rows)
        assert self.texts.judge is not None
        self.judge: JudgeFacts | None = self.texts.judge.facts

    def __call__(self, tokens: np.ndarray) -> tuple[Figure, dict[str, Figure]]:
        found, real = self.texts(tokens).parts["text"], self.texts.real
        assert real is not None
        above = math.log(found.perplexity / real.perplexity)
        below = real.entropy - found.entropy
        errors = [found.perplexity_error / found.perplexity] * (above > 0) + [found.entropy_error] * (below > 0)
        score = Figure(value=max(0.0, above) + max(0.0, below), standard_error=math.hypot(*errors))
        return score, {
            "perplexity": Figure(value=found.perplexity, standard_error=found.perplexity_error),
            "entropy, nats": Figure(value=found.entropy, standard_error=found.entropy_error),
        }


class _Pixels:
    """Images by the moments of their pixels, or of a network's features."""

    judge: JudgeFacts | None = None

    def __init__(self, loaded: Loaded, corpus: np.ndarray, network: Path | None):
        shape, levels = loaded.config.data.shape, loaded.config.data.levels
        assert shape is not None
        assert levels is not None
        self.shape, self.levels = shape, levels
        self.network = None if network is None else FeatureNetwork(network)
        self.score = "Fréchet distance of " + ("pixel moments" if network is None else f"features of {network.name}")
        self.real = Moments.of(self._features(corpus))

    def _features(self, tokens: np.ndarray) -> np.ndarray:
        images = brightness(tokens.reshape(-1, *self.shape), self.levels)
        return pixel_features(images) if self.network is None else self.network(images).numpy()

    def __call__(self, tokens: np.ndarray) -> tuple[Figure, dict[str, Figure]]:
        features = self._features(tokens)
        value, error = self.real.distance(features)
        figures = {} if self.network is not None else {"brightness": _mean(features.mean(1))}
        return Figure(value=value, standard_error=error), figures
