"""`md4 grid --frontier`: which sampler, grid and settings give the best samples for a given number of network calls."""

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
import torch

from md4 import samplers
from md4.errors import UserError
from md4.samplers import SamplingConfig, wording
from md4.samplers.grids import GRIDS
from md4.samplers.saved import SavedSettings
from md4.samplers.settings import BEST, SAMPLERS
from orchestration import grids
from orchestration.quality import classes_of, draw_rows, first_label
from orchestration.run_mirror import deliver
from orchestration.runs import Loaded, load_model
from orchestration.sampling import Request
from orchestration.yardsticks import Yardstick, real_rows, yardstick
from pipelines.reports import Provenance, write
from pipelines.sampler_frontier import (
    Figure,
    GridGain,
    SamplerFrontier,
    SamplerPoint,
    Winner,
    best_within,
    draw,
    frontier_of,
)
from pipelines.storage import Place

# What is tried of each sampler beside its steps and grids.
_VARIANTS: dict[str, tuple[dict[str, Any], ...]] = {
    "first_hitting": ({}, {"extrapolate": True}),
    "entropy": tuple({"entropy_bound": bound} for bound in (16.0, 4.0, 1.0, 0.25)),
}
_FREE = ("temperature", "top_p", "top_k", "guidance")  # settings that may be given for all


@dataclass(frozen=True)
class Wanted:
    """What to try and how to measure; `search` finds the grids first."""

    search: grids.Search
    settings: Mapping[str, Any] = field(default_factory=dict)  # of all samplers
    samplers: tuple[str, ...] = ()  # all that the model has, if none is named
    count: int = 256  # samples of each setting
    judge: str | None = None
    features: Path | None = None  # network for images
    batch_size: int = 64
    save: bool = False


def run(
    path: Place, wanted: Wanted, say: Callable[[str], None] = print
) -> tuple[SamplerFrontier, list[tuple[grids.GridReport, str]], list[str]]:
    """Search grids, sample every setting with the same seeds, measure, and sample the winners again with other seeds.

    Writes the report, whose files (JSON, Markdown, PNG) are given last, and with `save` the winners into the run's
    folder. Raises `UserError`; what can be refused is refused before the search.
    """
    began = perf_counter()
    _check(wanted)
    loaded = load_model(path, ema=wanted.search.ema, report=say)
    common = _common(wanted.settings)
    tried = list(_plan(loaded, wanted))
    measure = yardstick(loaded, wanted.search.split, wanted.count, wanted.judge, wanted.features, say)
    found = grids.run(path, wanted.search, say)
    for report, _ in found:
        say(report.headline())
    loaded = load_model(path, ema=wanted.search.ema, report=say)  # now with its grids
    if torch.cuda.is_available():
        loaded.model.to("cuda")
    real, labels = real_rows(loaded, wanted.search.split, wanted.count)
    score, figures = measure(real)
    data = {"score": score, **figures}
    bounds = {
        (kind if kind != "found" else wanted.search.name, report.steps): getattr(report, kind)
        for report, _ in found
        for kind in (*GRIDS, "found")
    }
    points = []
    for place, asked in enumerate(tried):
        point = _point(loaded, wanted, measure, {**asked, **common}, labels, wanted.search.seed)
        if asked["sampler"] == "ancestral" and not common:
            bound = bounds[asked["grid"], asked["steps"]]
            measured = Figure(value=bound.checked, standard_error=bound.standard_error)
            point = point.model_copy(update={"bound": measured})
        points.append(point.model_copy(update={"settings": asked}))
        say(f"{place + 1} of {len(tried)}: {points[-1].title}, {point.calls.value:.1f} calls, score {point.score}")
    points = frontier_of(points)
    winners = list(_winners(path, loaded, wanted, measure, points, labels, common))
    rows = found[0][0]
    result = SamplerFrontier(
        created=datetime.now(UTC),
        model=Provenance(run=loaded.config.name, step=loaded.step, weights_hash=loaded.weights_hash),
        data_fingerprint=rows.data_fingerprint,
        split=wanted.search.split,
        vocabulary=loaded.vocabulary.name,
        seed=wanted.search.seed,
        seconds=perf_counter() - began,
        score=measure.score,
        samples=wanted.count,
        length=real.shape[1],
        common=common,
        judge=measure.judge,
        digest=_digest(
            [tried, common, wanted.count, wanted.search.rows, wanted.search.draws, measure.score, loaded.weights_hash]
        ),
        data=data,
        real_rows=len(real) if len(real) < wanted.count else None,
        points=points,
        winners=winners,
        gains=[
            GridGain(steps=report.steps, below=kind, bits=Figure(value=gain.bits, standard_error=gain.standard_error))
            for kind in GRIDS
            for report, _ in found
            for gain in [getattr(report, f"below_{kind}")]
        ],
    )
    return result, found, deliver(path, "reports", partial(_files, result))


def _files(report: SamplerFrontier, folder: Path) -> list[Path]:
    files = write(report, folder)
    return [*files, draw(report, files[0].with_suffix(".png"))]


def _check(wanted: Wanted) -> None:
    if wanted.count < 4:
        raise UserError(f"count is {wanted.count}; at least 4 samples are needed for a standard error")
    if wanted.batch_size < 1:
        raise UserError(f"batch_size is {wanted.batch_size}; at least 1 is needed")


def _common(given: Mapping[str, Any]) -> dict[str, Any]:
    """Settings of all samplers, checked. UserError for one that not all have: which sampler is what is searched."""
    for name in given:
        if name not in _FREE:
            raise UserError(f"{name} is no setting of all samplers; allowed beside --frontier: {', '.join(_FREE)}")
    changed = wording.change(SamplingConfig(), given).model_dump(include=set(_FREE))
    return {name: value for name, value in changed.items() if name in given}


def _plan(loaded: Loaded, wanted: Wanted) -> Iterator[dict[str, Any]]:
    """All settings to try. UserError for a sampler that the model doesn't have."""
    table = SAMPLERS[loaded.model.objective]
    for name in wanted.samplers:
        if name not in table:
            raise UserError(
                f"sampler={name} is not for models of objective {loaded.model.objective}; allowed: {', '.join(table)}"
            )
    kinds = (*GRIDS, wanted.search.name)
    for name in wanted.samplers or table:
        choices = [{"grid": grid} for grid in kinds] if "grid" in table[name] else [{}]
        for variant in _VARIANTS.get(name, ({},)):
            for choice in choices:
                for steps in wanted.search.steps if "steps" in table[name] else (None,):
                    given = {} if steps is None else {"steps": steps}
                    yield {"sampler": name, **given, **choice, **variant}


def _point(
    loaded: Loaded,
    wanted: Wanted,
    measure: Yardstick,
    asked: Mapping[str, Any],
    real: np.ndarray | None,
    seed: int,
) -> SamplerPoint:
    settings = wording.change(SamplingConfig(), asked)
    labels, _ = classes_of(loaded, wanted.count, real)
    request = Request(count=wanted.count, seed=seed, label=first_label(loaded), settings=settings)
    drawn = draw_rows(loaded, request, labels, wanted.batch_size)
    score, figures = measure(drawn.tokens)
    calls = Figure(value=drawn.calls, standard_error=drawn.calls_error)
    return SamplerPoint(settings=dict(asked), calls=calls, score=score, figures=figures)


def _winners(
    path: Place,
    loaded: Loaded,
    wanted: Wanted,
    measure: Yardstick,
    points: Sequence[SamplerPoint],
    labels: np.ndarray | None,
    common: Mapping[str, Any],
) -> Iterator[Winner]:
    """The best setting of each number of calls, sampled again; kept with the run if that is wanted."""
    for calls in sorted(wanted.search.steps):
        best = best_within(points, calls)
        if best is None:
            continue
        asked = {**best.settings, **common}
        again = _point(loaded, wanted, measure, asked, labels, wanted.search.seed + wanted.count)
        kept = None
        if wanted.save:
            facts = {"run": loaded.config.name, "step": loaded.step, "weights_hash": loaded.weights_hash}
            told = {"calls": again.calls.value, "score": again.score.model_dump(), "measure": measure.score}
            settings = samplers.filled(loaded.model, wording.change(SamplingConfig(), asked))
            found = SavedSettings(name=BEST, steps=calls, settings=settings, facts={**facts, **told, "asked": asked})
            kept = grids.keep(path, found)
        yield Winner(calls=calls, settings=asked, score=best.score, again=again.score, kept=kept)


def _digest(asked: Any) -> str:
    return hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest()[:8]
