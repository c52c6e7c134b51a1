"""What `md4 quality` measures: texts with or without a judge, images in the features of a network.

A measure has seen the references when it is made, and is called with the samples of one setting `[N, L]`; it answers
with the parts of a `QualityReport`, and what single samples contributed to them.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from md4.errors import UserError
from orchestration.results import Contributions
from pipelines.image_quality import FeatureNetwork, compare
from pipelines.images import brightness
from pipelines.judges import Judge, Scores
from pipelines.quality import TextQuality, histogram_entropy, mauve, measure
from pipelines.vocabularies import Vocabulary


@dataclass(frozen=True)
class Measured:
    """What a measure found."""

    parts: dict[str, Any]  # of a `QualityReport`
    samples: dict[str, Contributions] = field(default_factory=dict)  # to the figures that are made of single samples


class Measure(Protocol):
    """Samples `[N, L]` to what is said of them."""

    def __call__(self, tokens: np.ndarray) -> Measured: ...


class Texts:
    """Entropy and distinct n-grams; with a judge (a folder or a name on the hub) the perplexity; MAUVE if wanted.

    references: real rows `[M, L]`, measured in the same way, or None. end: the token behind whose first occurrence a
    row is padding, which is not measured. UserError if MAUVE is wanted without references.
    """

    def __init__(
        self,
        vocabulary: Vocabulary,
        references: np.ndarray | None,
        judge: str | None,
        with_mauve: bool,
        end: int | None = None,
    ):
        self.vocabulary, self.with_mauve, self.end = vocabulary, with_mauve, end
        self.judge = None if judge is None else Judge.load(judge)
        self.scores = None if references is None else self._scored(references, "judging real texts")
        self.real = None if references is None else self._measured(references, self.scores)
        self.features = None if self.scores is None else self.scores.features
        if with_mauve and self.features is None:
            raise UserError("MAUVE needs a judge, and real texts to compare with")

    def __call__(self, tokens: np.ndarray) -> Measured:
        scores = self._scored(tokens, "judging samples")
        text = self._measured(tokens, scores)
        found: dict[str, Any] = {"text": text, "data": self.real}
        texts = [row[:count] for row, count in zip(tokens, self._counts(tokens), strict=True)]
        samples = {"entropy": Contributions.of_mean(histogram_entropy(texts))}
        if scores is not None and text.perplexity is not None:
            kept = Contributions.of_ratio(scores.nats, scores.tokens, np.arange(len(tokens)))
            samples["perplexity"] = kept.through(np.exp, text.perplexity)
        if self.judge is not None:
            found["judge"] = self.judge.facts
        if self.features is not None and scores is not None and scores.features is not None:
            found["mauve"] = mauve(scores.features, self.features)
        return Measured(found, samples)

    def _counts(self, rows: np.ndarray) -> np.ndarray:
        """How many tokens of each row `[N, L]` are text, the end included."""
        return np.array([min(_first(row, self.end) + 1, len(row)) for row in rows])

    def _measured(self, rows: np.ndarray, scores: Scores | None) -> TextQuality:
        return measure(rows, self.vocabulary.size, scores, None if self.end is None else self._counts(rows))

    def _scored(self, rows: np.ndarray, what: str) -> Scores | None:
        if self.judge is None:
            return None
        texts = [self.vocabulary.decode(row[: _first(row, self.end)]) for row in rows]
        with progress(what, "windows") as bar:
            task = bar.add_task("", total=None)
            return self.judge.score(texts, features=self.with_mauve, advance=lambda done: bar.advance(task, done))


def _first(row: np.ndarray, end: int | None) -> int:
    """The place of the first `end` in a row [L]; L if there is none."""
    places = [] if end is None else np.flatnonzero(row == end).tolist()
    return places[0] if places else len(row)


class Images:
    """FID and KID of images of `shape` (H, W, C) and that many `levels`, against real rows `[M, L]`.

    subset, seed: of KID, see `pipelines.image_quality.compare`.
    """

    def __init__(
        self,
        shape: tuple[int, int, int],
        levels: int,
        references: np.ndarray,
        network: Path,
        subset: int | None,
        seed: int,
        say: Callable[[str], None],
    ):
        self.shape, self.levels, self.subset, self.seed = shape, levels, subset, seed
        self.network = FeatureNetwork(network)
        say(f"features of {len(references)} real images")
        self.real = self.network(self._pixels(references))

    def __call__(self, tokens: np.ndarray) -> Measured:
        features = self.network(self._pixels(tokens))
        return Measured({"images": compare(features, self.real, self.network, subset=self.subset, seed=self.seed)})

    def _pixels(self, tokens: np.ndarray) -> np.ndarray:
        """Tokens `[N, L]` as images `[N, H, W, C]` uint8."""
        return brightness(tokens.reshape(-1, *self.shape), self.levels)


def progress(what: str, unit: str) -> Progress:
    """A progress bar on a terminal, nothing elsewhere."""
    console = Console(stderr=True)
    columns = (TextColumn(what), BarColumn(), MofNCompleteColumn(), TextColumn(unit), TimeRemainingColumn())
    return Progress(*columns, console=console, disable=not console.is_terminal, transient=True)
