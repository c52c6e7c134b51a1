"""Measuring the samples of a run: from the choices of the command line to reports, a table and a picture.

All settings begin with the same seed, so that what differs between two reports is the setting and not the luck.
"""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
import torch
from pydantic import BaseModel
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor

from md4 import samplers
from md4.errors import UserError
from md4.samplers import SamplingConfig
from orchestration.config import read_yaml
from orchestration.runs import Loaded, load_model
from orchestration.sampling import Request, override
from orchestration.sampling import prepare as canvas_of
from pipelines.frontier import FrontierReport, draw, frontier
from pipelines.image_quality import FeatureNetwork, compare, subset_size
from pipelines.images import brightness
from pipelines.judges import Judge, Scores
from pipelines.prepare import prepared_path
from pipelines.quality import mauve, measure
from pipelines.quality_reports import QualityReport
from pipelines.reports import Provenance, write
from pipelines.shards import ShardSet


@dataclass(frozen=True)
class Wanted:
    """What to sample and what to measure. None: as the run's configuration says, or the natural choice."""

    settings: Mapping[str, Any] = field(default_factory=dict)  # changes to the run's sampling settings
    temperatures: Sequence[float] = ()
    steps: Sequence[int] = ()
    count: int = 64  # samples of each setting
    references: int | None = None  # rows of the split, evenly spaced; as many as samples if None
    length: int | None = None
    seed: int = 0
    batch_size: int = 64
    judge: str | None = None  # folder or name on the hub
    mauve: bool = False
    features: Path | None = None  # network for images
    kid_subset: int | None = None
    data: Path | None = None  # another prepared set
    split: str = "validation"
    ema: bool = True


class Findings(BaseModel):
    """All reports of one call."""

    reports: list[QualityReport]
    frontier: FrontierReport | None = None


def settings_of(assignments: Sequence[str]) -> dict[str, Any]:
    """`key=value` arguments as changes to a SamplingConfig; UserError for one that isn't of this form."""
    changes: dict[str, Any] = {}
    for assignment in assignments:
        key, equals, text = assignment.partition("=")
        if not equals or not key:
            raise UserError(f"{assignment!r} is not of the form key=value, for instance top_p=0.9")
        changes[key] = read_yaml(text, f"value of {key}")
    return changes


def numbers(text: str | None, kind: type, option: str) -> tuple:
    """Numbers with commas between, of an option; UserError names the one that is none, or stands twice."""
    found = []
    for part in text.split(",") if text is not None else ():
        try:
            found.append(kind(part))
        except ValueError:
            what = "a whole number" if kind is int else "a number"
            raise UserError(f"{option}: {part.strip()!r} is not {what}; write them with commas between") from None
    if len(set(found)) < len(found):
        raise UserError(f"{option}={text} names a value twice")
    return tuple(found)


def run(path: Path, wanted: Wanted, say: Callable[[str], None] = print) -> Findings:
    """Sample at every combination of temperature and steps and measure; reports are written as soon as they are ready.

    With a judge and more than one combination the frontier follows, as JSON, Markdown and PNG. Everything that can be
    refused is refused before the first sample. Raises `UserError`.
    """
    began = perf_counter()
    loaded = load_model(path, ema=wanted.ema, report=say)
    plan = _grid(loaded.config.sampling, wanted)
    _check(loaded, wanted)
    request = Request(count=wanted.count, length=wanted.length, seed=wanted.seed, label=_first_label(loaded))
    canvas_of(loaded, request)  # refuses a length, count or seed that can't be sampled
    data = _open_data(loaded, wanted, say)
    if torch.cuda.is_available():
        loaded.model.to("cuda")
    measures = (_Images if loaded.config.data.has_images else _Texts)(loaded, wanted, data, say)
    reports = []
    for place, settings in enumerate(plan):
        say(f"setting {place + 1} of {len(plan)}: {wanted.count} samples{_named(settings, wanted)}")
        report = _measured(loaded, wanted, replace(request, settings=settings), data, measures)
        say(f"written: {write(report, path / 'reports')[1]}")
        reports.append(report)
    whole = None
    if wanted.judge is not None and len(reports) > 1:
        digest = _digest([report.digest for report in reports])
        whole = frontier(reports, digest, perf_counter() - began)
        files = write(whole, path / "reports")
        picture = draw(whole, files[0].with_suffix(".png"))
        say(f"written: {files[1]}, {picture}")
    return Findings(reports=reports, frontier=whole)


def _grid(base: SamplingConfig, wanted: Wanted) -> list[SamplingConfig]:
    """Every combination, checked."""
    for name, values in (("temperature", wanted.temperatures), ("steps", wanted.steps)):
        if values and name in wanted.settings:
            raise UserError(f"{name} is given twice: as {name}={wanted.settings[name]} and by its option")
    return [
        override(base, {"steps": steps, "temperature": temperature, **wanted.settings})
        for steps in wanted.steps or (None,)
        for temperature in wanted.temperatures or (None,)
    ]


def _check(loaded: Loaded, wanted: Wanted) -> None:
    """UserError for measures that don't fit the run or each other."""
    images = loaded.config.data.has_images
    if wanted.count < 2:
        raise UserError(f"count is {wanted.count}; at least 2 samples are needed for a standard error")
    if wanted.references is not None and wanted.references < 2:
        raise UserError(f"references is {wanted.references}; at least 2 are needed")
    if wanted.batch_size < 1:
        raise UserError(f"batch_size is {wanted.batch_size}; at least 1 is needed")
    if wanted.mauve and wanted.judge is None:
        raise UserError("--mauve compares texts in the features of a judge: it needs --judge")
    if wanted.kid_subset is not None and wanted.features is None:
        raise UserError("--kid-subset is about KID: it needs --features")
    if images and wanted.judge is not None:
        raise UserError(f"run {loaded.config.name} makes images: --judge is about text, images want --features FILE")
    if images and wanted.features is None:
        raise UserError(f"run {loaded.config.name} makes images: their measures need a network, --features FILE")
    if not images and wanted.features is not None:
        raise UserError(f"run {loaded.config.name} makes text: --features is about images, text wants --judge")


def _open_data(loaded: Loaded, wanted: Wanted, say: Callable[[str], None]) -> ShardSet | None:
    """The references' split; None if the run's own set isn't here and nothing asks for it."""
    needed = wanted.mauve or wanted.features is not None or wanted.data is not None
    try:
        data = ShardSet(prepared_path(loaded.config.data) if wanted.data is None else wanted.data, wanted.split)
    except UserError as error:
        if needed:
            raise
        say(f"without the data's own figures: {error}")
        return None
    model = loaded.config.model
    if (data.manifest.vocabulary_size, data.length) != (model.vocab_size, model.length):
        raise UserError(
            f"{data.root} has rows of {data.length} tokens of a vocabulary of {data.manifest.vocabulary_size}, "
            f"the model rows of {model.length} of {model.vocab_size}"
        )
    return data


def _references(data: ShardSet, wanted: Wanted) -> np.ndarray:
    """Ids of the rows that samples are compared with, evenly spaced over the split."""
    count = min(data.rows, wanted.count if wanted.references is None else wanted.references)
    return np.arange(count) * data.rows // count


# -- measures --------------------------------------------------------------------------------------------------------


class _Texts:
    """Entropy and distinct n-grams of texts; with a judge their perplexity, and MAUVE if wanted."""

    def __init__(self, loaded: Loaded, wanted: Wanted, data: ShardSet | None, say: Callable[[str], None]):
        self.vocabulary, self.wanted = loaded.vocabulary, wanted
        self.judge = None if wanted.judge is None else Judge.load(wanted.judge)
        self.labels, self.real, self.scores, self.references = None, None, None, 0
        if data is None:
            return
        ids = _references(data, wanted)
        rows, self.labels = data.read_labelled(ids)
        rows = rows[:, : wanted.length]  # entropy depends on the length
        if len(rows) < 2:
            say("without the data's own figures: the split has but one row")
            return
        self.references = len(rows)
        self.scores = self._scored(rows, "judging real texts")
        self.real = measure(rows, self.vocabulary.size, self.scores)

    def __call__(self, tokens: np.ndarray) -> dict[str, Any]:
        scores = self._scored(tokens, "judging samples")
        found: dict[str, Any] = {"text": measure(tokens, self.vocabulary.size, scores), "data": self.real}
        if self.judge is not None:
            found["judge"] = self.judge.facts
        if self.wanted.mauve:
            if scores is None or self.scores is None or scores.features is None or self.scores.features is None:
                raise UserError("MAUVE needs real texts to compare with")
            found["mauve"] = mauve(scores.features, self.scores.features)
        return found

    def _scored(self, rows: np.ndarray, what: str) -> Scores | None:
        if self.judge is None:
            return None
        texts = [self.vocabulary.decode(row) for row in rows]
        with _progress(what, "windows") as bar:
            task = bar.add_task("", total=None)
            return self.judge.score(texts, features=self.wanted.mauve, advance=lambda amount: bar.advance(task, amount))


class _Images:
    """FID and KID."""

    def __init__(self, loaded: Loaded, wanted: Wanted, data: ShardSet | None, say: Callable[[str], None]):
        assert wanted.features is not None
        assert data is not None
        shape, levels = loaded.config.data.shape, loaded.config.data.levels
        assert shape is not None
        assert levels is not None
        self.shape, self.levels, self.wanted = shape, levels, wanted
        ids = _references(data, wanted)
        subset_size(wanted.count, len(ids), wanted.kid_subset)  # said before hours of sampling
        rows, self.labels = data.read_labelled(ids)
        self.network = FeatureNetwork(wanted.features)
        say(f"features of {len(ids)} real images")
        self.real = self.network(self._pixels(rows))
        self.references = len(rows)

    def __call__(self, tokens: np.ndarray) -> dict[str, Any]:
        features = self.network(self._pixels(tokens))
        found = compare(features, self.real, self.network, subset=self.wanted.kid_subset, seed=self.wanted.seed)
        return {"images": found}

    def _pixels(self, tokens: np.ndarray) -> np.ndarray:
        """Tokens `[N, L]` as images `[N, H, W, C]` uint8."""
        return brightness(tokens.reshape(-1, *self.shape), self.levels)


# -- samples ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Drawn:
    """Samples of one setting."""

    tokens: np.ndarray  # [N, L] int64
    settings: SamplingConfig
    mode: str
    network_calls: int
    calls: float  # of a sample, on average
    seconds: float


def _measured(
    loaded: Loaded, wanted: Wanted, request: Request, data: ShardSet | None, measures: "_Texts | _Images"
) -> QualityReport:
    began = perf_counter()
    labels, origin = _labels(loaded, wanted.count, measures.labels)
    drawn = _sample(loaded, request, labels, wanted.batch_size)
    found = measures(drawn.tokens)
    settings = drawn.settings.model_dump(mode="json", exclude_none=True)
    provenance = Provenance(run=loaded.config.name, step=loaded.step, weights_hash=loaded.weights_hash)
    judge = found["judge"].judge_sha256 if "judge" in found else None
    network = found["images"].features_sha256 if "images" in found else None
    asked = [
        settings, wanted.count, drawn.tokens.shape[1], measures.references, judge, network, wanted.mauve,
        wanted.kid_subset, loaded.weights_hash, None if data is None else data.fingerprint,
    ]  # fmt: skip
    return QualityReport(
        created=datetime.now(UTC),
        model=provenance,
        data_fingerprint="not at hand" if data is None else data.fingerprint,
        split=wanted.split,
        vocabulary=loaded.vocabulary.name,
        seed=wanted.seed,
        seconds=perf_counter() - began,
        settings=settings,
        draws=drawn.mode,
        samples=len(drawn.tokens),
        length=drawn.tokens.shape[1],
        labels=origin,
        network_calls=drawn.network_calls,
        calls_per_sample=drawn.calls,
        sampling_seconds=drawn.seconds,
        references=measures.references,
        digest=_digest(asked),
        **found,
    )


def _sample(loaded: Loaded, request: Request, labels: Tensor | None, batch_size: int) -> _Drawn:
    """The samples of a request, batch after batch: a row's tokens don't depend on its company."""
    began = perf_counter()
    job = replace(canvas_of(loaded, request), labels=labels)
    parts = []
    with _progress("sampling", "samples") as bar:
        task = bar.add_task("", total=len(job))
        for start in range(0, len(job), batch_size):
            (part,) = samplers.run(loaded.model, [job.part(start, start + batch_size)], batch_size)
            if bool(part.broken.any()):
                raise UserError(
                    "the network answered with NaN or infinity: the model is damaged or its training diverged"
                )
            parts.append(part)
            bar.advance(task, len(part.tokens))
    return _Drawn(
        tokens=np.concatenate([part.tokens.cpu().numpy() for part in parts]),
        settings=getattr(parts[0], "settings", request.settings),
        mode=parts[0].mode,
        network_calls=sum(part.network_calls for part in parts),
        calls=float(torch.cat([part.calls for part in parts]).double().mean()),
        seconds=perf_counter() - began,
    )


def _first_label(loaded: Loaded) -> int | None:
    return 0 if loaded.config.model.classes else None


def _labels(loaded: Loaded, count: int, real: np.ndarray | None) -> tuple[Tensor | None, str | None]:
    """Classes `[count]` of the samples: those of the references in turn, else all classes in turn; and which it is."""
    classes = loaded.config.model.classes
    if not classes:
        return None, None
    if real is not None and len(real) and (real >= 0).all() and real.max() < classes:
        return torch.from_numpy(np.resize(real, count).astype(np.int64)), "those of the references in turn"
    return torch.arange(count) % classes, f"all {classes} in turn"


def _named(settings: SamplingConfig, wanted: Wanted) -> str:
    """What differs between the settings of this call."""
    parts = [f"{settings.steps} steps"] if wanted.steps else []
    return ", ".join(["", *parts, *([f"temperature {settings.temperature:g}"] if wanted.temperatures else [])])


def _digest(asked: Any) -> str:
    return hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest()[:8]


def _progress(what: str, unit: str) -> Progress:
    """A progress bar on a terminal, nothing elsewhere."""
    console = Console(stderr=True)
    columns = (TextColumn(what), BarColumn(), MofNCompleteColumn(), TextColumn(unit), TimeRemainingColumn())
    return Progress(*columns, console=console, disable=not console.is_terminal, transient=True)
