"""Measuring the samples of a run: from the choices of the command line to reports, a table and a picture.

All settings begin with the same seed, so that what differs between two reports is the setting and not the luck.
"""

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
import torch
from pydantic import BaseModel
from torch import Tensor

from md4 import samplers
from md4.errors import UserError
from md4.samplers import SamplingConfig, wording
from orchestration.measures import Images, Measure, Texts, progress
from orchestration.results import Contributions
from orchestration.run_mirror import deliver
from orchestration.runs import Loaded, load_model
from orchestration.sampling import Request
from orchestration.sampling import prepare as canvas_of
from pipelines.frontier import FrontierReport, draw, frontier
from pipelines.image_quality import subset_size
from pipelines.prepare import prepared_path
from pipelines.quality_reports import QualityReport
from pipelines.reports import Provenance, write
from pipelines.shards import ShardSet
from pipelines.storage import Place


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


def run(path: Place, wanted: Wanted, say: Callable[[str], None] = print) -> Findings:
    """Sample at every combination of temperature and steps and measure; reports are written as soon as they are ready.

    With a judge and more than one combination the frontier follows, as JSON, Markdown and PNG. Everything that can be
    refused is refused before the first sample. Raises `UserError`.
    """
    began = perf_counter()
    loaded = load_model(path, ema=wanted.ema, report=say)
    reports = [found.report for found in measure(path, Plan.of(loaded, wanted, say), say)]
    whole = None
    if wanted.judge is not None and len(reports) > 1:
        digest = _digest([report.digest for report in reports])
        whole = frontier(reports, digest, perf_counter() - began)
        _, text, picture = deliver(path, "reports", partial(_write_frontier, whole))
        say(f"written: {text}, {picture}")
    return Findings(reports=reports, frontier=whole)


@dataclass(frozen=True)
class Plan:
    """What is to be sampled of a model and compared with what: all that can be refused before the first sample was."""

    loaded: Loaded
    wanted: Wanted
    request: Request
    settings: list[SamplingConfig]
    real: "_References"

    @classmethod
    def of(cls, loaded: Loaded, wanted: Wanted, say: Callable[[str], None] = print) -> "Plan":
        """UserError for measures that don't fit the model or each other, and for what can't be sampled."""
        settings = _grid(loaded.config.sampling, wanted)
        _check(loaded, wanted)
        request = Request(count=wanted.count, length=wanted.length, seed=wanted.seed, label=first_label(loaded))
        canvas_of(loaded, request)  # refuses a length, count or seed that can't be sampled
        return cls(loaded, wanted, request, settings, _read(_open_data(loaded, wanted, say), wanted))


@dataclass(frozen=True)
class Sampled:
    """A report, its file, and what single samples contributed to its figures."""

    report: QualityReport
    file: str  # path or url
    samples: dict[str, Contributions]


def measure(path: Place, plan: Plan, say: Callable[[str], None] = print) -> Iterator[Sampled]:
    """Sample and measure at each setting in turn; each report is written below `path` as soon as it is ready."""
    loaded, wanted = plan.loaded, plan.wanted
    measures = _measure(loaded, wanted, plan.real, say)
    if torch.cuda.is_available():
        loaded.model.to("cuda")
    for place, settings in enumerate(plan.settings):
        say(f"setting {place + 1} of {len(plan.settings)}: {wanted.count} samples{_named(settings, wanted)}")
        report, samples = _measured(loaded, wanted, replace(plan.request, settings=settings), plan.real, measures)
        files = deliver(path, "reports", partial(write, report))
        say(f"written: {files[1]}")
        yield Sampled(report, files[0], samples)


def _write_frontier(whole: FrontierReport, folder: Path) -> list[Path]:
    files = write(whole, folder)
    return [*files, draw(whole, files[0].with_suffix(".png"))]


def _grid(base: SamplingConfig, wanted: Wanted) -> list[SamplingConfig]:
    """Every combination, checked."""
    for name, values in (("temperature", wanted.temperatures), ("steps", wanted.steps)):
        if values and name in wanted.settings:
            raise UserError(f"{name} is given twice: as {name}={wanted.settings[name]} and by its option")
    return [
        wording.change(base, {**wanted.settings, **_given(steps=steps, temperature=temperature)})
        for steps in wanted.steps or (None,)
        for temperature in wanted.temperatures or (None,)
    ]


def _given(**values: Any) -> dict[str, Any]:
    return {name: value for name, value in values.items() if value is not None}


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


@dataclass(frozen=True)
class _References:
    """Rows of the split that samples are compared with, evenly spaced."""

    rows: np.ndarray | None  # [M, L]; None: there are none
    labels: np.ndarray | None  # [M]
    fingerprint: str | None  # of the set

    @property
    def count(self) -> int:
        return 0 if self.rows is None else len(self.rows)


def _read(data: ShardSet | None, wanted: Wanted) -> _References:
    if data is None:
        return _References(None, None, None)
    count = min(data.rows, wanted.count if wanted.references is None else wanted.references)
    if count < 2:
        raise UserError(f"the {data.split} split of {data.root} has {data.rows} rows; at least 2 are needed")
    rows, labels = data.read_labelled(np.arange(count) * data.rows // count)
    return _References(rows[:, : wanted.length], labels, data.fingerprint)  # entropy depends on the length


def _measure(loaded: Loaded, wanted: Wanted, real: _References, say: Callable[[str], None]) -> Measure:
    config = loaded.config.data
    if not config.has_images:
        return Texts(loaded.vocabulary, real.rows, wanted.judge, wanted.mauve, config.end_of_rows)
    assert config.shape is not None
    assert config.levels is not None
    assert wanted.features is not None
    assert real.rows is not None
    subset_size(wanted.count, real.count, wanted.kid_subset)  # said before hours of sampling
    return Images(config.shape, config.levels, real.rows, wanted.features, wanted.kid_subset, wanted.seed, say)


# -- samples ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Drawn:
    """Samples of one setting."""

    tokens: np.ndarray  # [N, L] int64
    settings: SamplingConfig
    mode: str
    network_calls: int
    calls: float  # of a sample, on average
    calls_error: float  # standard error of that
    seconds: float


def _measured(
    loaded: Loaded, wanted: Wanted, request: Request, real: _References, measures: Measure
) -> tuple[QualityReport, dict[str, Contributions]]:
    began = perf_counter()
    labels, origin = classes_of(loaded, wanted.count, real.labels)
    drawn = draw_rows(loaded, request, labels, wanted.batch_size)
    measured = measures(drawn.tokens)
    found = measured.parts
    settings = drawn.settings.model_dump(mode="json", exclude_none=True)
    provenance = Provenance(run=loaded.config.name, step=loaded.step, weights_hash=loaded.weights_hash)
    judge = found["judge"].judge_sha256 if "judge" in found else None
    network = found["images"].features_sha256 if "images" in found else None
    asked = [
        settings, wanted.count, drawn.tokens.shape[1], real.count, judge, network, wanted.mauve,
        wanted.kid_subset, loaded.weights_hash, real.fingerprint,
    ]  # fmt: skip
    report = QualityReport(
        created=datetime.now(UTC),
        model=provenance,
        data_fingerprint=real.fingerprint or "not at hand",
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
        references=real.count,
        digest=_digest(asked),
        **found,
    )
    return report, measured.samples


def draw_rows(loaded: Loaded, request: Request, labels: Tensor | None, batch_size: int) -> Drawn:
    """The samples of a request, batch after batch: a row's tokens don't depend on its company."""
    began = perf_counter()
    job = replace(canvas_of(loaded, request), labels=labels)
    parts = []
    with progress("sampling", "samples") as bar:
        task = bar.add_task("", total=len(job))
        for start in range(0, len(job), batch_size):
            (part,) = samplers.run(loaded.model, [job.part(start, start + batch_size)], batch_size)
            if bool(part.broken.any()):
                raise UserError(
                    "the network answered with NaN or infinity: the model is damaged or its training diverged"
                )
            parts.append(part)
            bar.advance(task, len(part.tokens))
    calls = torch.cat([part.calls for part in parts]).double()
    return Drawn(
        tokens=np.concatenate([part.tokens.cpu().numpy() for part in parts]),
        settings=getattr(parts[0], "settings", request.settings),
        mode=parts[0].mode,
        network_calls=sum(part.network_calls for part in parts),
        calls=float(calls.mean()),
        calls_error=float(calls.std()) / len(calls) ** 0.5,
        seconds=perf_counter() - began,
    )


def first_label(loaded: Loaded) -> int | None:
    return 0 if loaded.config.model.classes else None


def classes_of(loaded: Loaded, count: int, real: np.ndarray | None) -> tuple[Tensor | None, str | None]:
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
