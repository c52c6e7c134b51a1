"""From what an evaluation found to figures of the table: how each is called, in which unit, and which way is better."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from orchestration import evaluation, quality
from orchestration.results import Contributions, digest
from orchestration.suites.prompts import Filled
from pipelines.quality import NGRAMS

Better = Literal["lower", "higher", "neither"]


@dataclass(frozen=True)
class Figure:
    """One figure, before it is known which evaluation it belongs to. The fields are those of `results.Result`."""

    metric: str
    value: float
    error: float | None
    unit: str
    better: Better
    samples: int
    settings: str
    fingerprint: str | None = None
    report: str | None = None
    rows: Contributions | None = None


def bound(name: str, split: str) -> str:
    """What the bound on a set is called."""
    return f"likelihood/{name}/{split}"


def perplexity(name: str, protocol: str) -> str:
    """What the perplexity of a foreign set is called."""
    return f"zero_shot/{name}/{protocol}/perplexity"


def below(*parts: str | None) -> str:
    """A name made of those parts that there are."""
    return "/".join(part for part in parts if part)


def of_likelihood(name: str, found: evaluation.Measured) -> Figure:
    """The bound on a set called `name`, in the unit that is usual for what it is."""
    report = found.report
    assert report.zero_shot is None
    unit = "bits per token"
    if report.bits_per_dimension is not None:
        unit = "bits per dimension"
    elif report.characters_per_token == 1:
        unit = "bits per character"
    return Figure(
        metric=bound(name, report.split),
        value=report.bits_per_token,
        error=_known(report.standard_error),
        unit=unit,
        better="lower",
        samples=report.rows,
        settings=_estimate(found),
        fingerprint=report.data_fingerprint,
        report=str(found.file),
        rows=_bits(found),
    )


def of_zero_shot(name: str | None, found: evaluation.Measured) -> Figure:
    """The perplexity of a foreign set."""
    report = found.report
    facts = report.zero_shot
    assert facts is not None
    scale = math.log(2) * report.perplexity
    return Figure(
        metric=perplexity(name or facts.data_set, facts.protocol),
        value=report.perplexity,
        error=_known(report.perplexity_error),
        unit="perplexity per token",
        better="lower",
        samples=report.rows,
        settings=_estimate(found),
        fingerprint=report.data_fingerprint,
        report=str(found.file),
        rows=_bits(found).through(np.exp2, scale),
    )


def of_quality(name: str | None, found: quality.Sampled) -> Iterator[Figure]:
    """What samples measured: each figure with its error, where one is known."""
    report = found.report
    how: dict[str, Any] = {
        "settings": report.settings, "draws": report.draws, "samples": report.samples, "length": report.length,
        "labels": report.labels, "seed": report.seed, "vocabulary": report.vocabulary,
    }  # fmt: skip

    def figure(
        metric: str,
        value: float,
        error: float | None,
        unit: str,
        better: Better,
        by: dict[str, Any] | None = None,
        compared: bool = False,
    ) -> Figure:
        """by: what else the figure depends on; compared: with real rows."""
        return Figure(
            metric=below("quality", name, metric),
            value=value,
            error=_known(error),
            unit=unit,
            better=better,
            samples=report.samples,
            settings=digest({**how, **(by or {})}),
            fingerprint=report.data_fingerprint if compared else None,
            report=str(found.file),
            rows=found.samples.get(metric),
        )

    if (text := report.text) is not None:
        yield figure("entropy", text.entropy, text.entropy_error, "nats", "neither")
        for n in range(1, NGRAMS + 1):
            if (share := getattr(text, f"distinct_{n}")) is not None:
                yield figure(f"distinct_{n}", share, None, "share", "neither")
        if text.perplexity is not None and report.judge is not None:
            judge = {"judge": report.judge.judge_sha256}
            unit = f"perplexity under {report.judge.judge}"
            yield figure("perplexity", text.perplexity, text.perplexity_error, unit, "lower", judge)
            if report.mauve is not None:
                facts = judge | report.mauve.model_dump(exclude={"mauve"})
                yield figure("mauve", report.mauve.mauve, None, "MAUVE", "higher", facts, compared=True)
    if (images := report.images) is not None:
        network = images.model_dump(exclude={"fid", "kid", "kid_deviation"})
        yield figure("fid", images.fid, None, "FID", "lower", network, compared=True)
        yield figure("kid", images.kid, None, "KID", "lower", network, compared=True)


def of_prompts(name: str | None, found: Filled) -> Iterator[Figure]:
    """How varied the fillings of fixed texts are, and how many came out as they should."""
    how = [found.settings, found.prompts.model_dump(mode="json", exclude={"name", "settings"}), found.vocabulary]
    parts: dict[str, tuple[np.ndarray, np.ndarray, str, Better]] = {
        "entropy": (found.entropies, found.texts, "nats", "neither"),
        "exact_match": (found.matches, found.answered, "share", "higher"),
    }
    for metric, (values, texts, unit, better) in parts.items():
        if not len(values):
            continue
        # Fillings of one text are alike: texts are what is independent, if there are several.
        clusters = texts if len(np.unique(texts)) > 1 else np.arange(len(texts))
        rows = Contributions.of_ratio(values, np.ones(len(values)), clusters)
        yield Figure(
            metric=below("prompts", name, metric),
            value=float(values.mean()),
            error=rows.standard_error or (share_error(values) if metric == "exact_match" else None),
            unit=unit,
            better=better,
            samples=len(values),
            settings=digest(how),
            rows=rows,
        )


def share_error(values: np.ndarray) -> float:
    """Standard error of the share of ones among zeros and ones `[N]` that show no spread: all alike, or equally many in
    each text.

    Their spread says 0, as if a share of 1 could never have been another; then the step from all right to all wrong
    could not be judged. This is the standard deviation of what the share may be in Jeffreys' view (a Beta distribution
    with half a one and half a zero more than were seen), which is about 0.7 / N for all ones: large enough that luck is
    called worse no more often than promised. As no text differs from another, each value counts as independent.
    """
    count = len(values)
    share = (float(values.sum()) + 0.5) / (count + 1)
    return math.sqrt(share * (1 - share) / (count + 2))


def _estimate(found: evaluation.Measured) -> str:
    """Digest of how a bound was estimated: where it is the same, so are the noise and the rows of the set."""
    report = found.report
    facts = None if report.zero_shot is None else report.zero_shot.model_dump()
    return digest([report.estimator, report.draws, report.rows, report.window, report.split, report.seed, facts])


def _bits(found: evaluation.Measured) -> Contributions:
    rows = found.rows
    return Contributions.of_ratio(rows.nats / math.log(2), rows.tokens, rows.clusters)


def _known(error: float | None) -> float | None:
    """None for the NaN of a single row."""
    return None if error is None or math.isnan(error) else error
