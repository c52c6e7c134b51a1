"""Facts for a card, from a run or from an exported folder."""

import json
import math
from collections.abc import Callable, Iterable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from md4 import weights
from md4.errors import UserError
from md4.model import ModelConfig
from md4.objectives import MaskedDiffusion
from md4.samplers import SamplingConfig
from md4.samplers.saved import SavedSettings
from orchestration.cards import reports as reading
from orchestration.cards.facts import (
    CardFacts,
    DataFacts,
    FigureFact,
    Licences,
    ModelFacts,
    PictureFact,
    SampleFact,
    SplitFacts,
    TrainingFacts,
)
from orchestration.cards.training import training_of
from orchestration.curves import draw_loss
from orchestration.exported import is_exported
from orchestration.runs import Loaded, Run, load_model, read_saved
from pipelines.config import prepared_path
from pipelines.manifest import Manifest
from pipelines.named import SETS
from pipelines.storage import Folder, Place

_SAMPLES, _TEXT = 8, 600  # samples on a card, and characters of each


def of(path: Place, *, licences: Licences | None = None, about: str | None = None) -> CardFacts:
    """Facts of a run or of an exported model, whichever `path` is. Raises `UserError` if it is neither."""
    place = Folder(path)
    if is_exported(place):
        return of_folder(Path(place.url), licences=licences, about=about)
    return of_run(path, licences=licences, about=about)


def of_run(
    path: Place,
    *,
    ema: bool = True,
    licences: Licences | None = None,
    about: str | None = None,
    report: Callable[[str], None] = lambda _: None,
) -> CardFacts:
    """Facts of a run's newest sound checkpoint. licences, about: as given, else as the run's configuration says.

    Figures are those of reports on these very weights. Raises `UserError` for no run, or one without checkpoint.
    """
    loaded, run = load_model(path, ema=ema, report=report), Run(path)
    config, stated = loaded.config, loaded.config.card
    everything = reading.read(run.place, "reports")
    own = reading.on(everything, {loaded.weights_hash})
    data = tuple(_data(loaded))
    training = training_of(run, loaded)
    figures = [*_validation(run, loaded), *reading.figures(own)]
    chosen = licences or Licences()
    return CardFacts(
        name=config.name,
        about=about or stated.about,
        model=_model(config.model, loaded.model, config.sampling, loaded.vocabulary.name),
        data=data,
        training=training,
        figures=tuple(figures),
        findings=tuple(reading.findings(own)),
        samples=tuple(_samples(run, loaded)),
        pictures=tuple(_pictures(run, loaded)),
        kept=tuple(_kept(read_saved(path))),
        limits=(*_limits(config.model, figures, training), *stated.limits),
        unmeasured=tuple(_unmeasured(own.values(), config.data.has_images, len(everything) - len(own))),
        licences=Licences(weights=chosen.weights or stated.weights_licence, data=chosen.data or stated.data_licence),
        lineage={
            "run": config.name,
            "step": loaded.step,
            "weights hash": loaded.weights_hash,
            **_began(loaded.config.train.start_from),
            "averaged weights": loaded.averaged,
            "data fingerprint": ", ".join(each.fingerprint or "not at hand" for each in data),
            "code version": training.code_version,
            "checkpoint": training.ended,
        },
    )


def of_folder(path: Path, *, licences: Licences | None = None, about: str | None = None) -> CardFacts:
    """Facts of an exported model or a version of a registry: what its config.json, lineage.json and reports say.

    Of its training it knows no more than those do. Raises `UserError` for a folder that is not an export, or damaged.
    """
    found = weights.load(path)
    card, source = found.card, found.card.source
    own = reading.on(
        reading.read(Folder(path), "evaluation", "reports"), {card.sha256[:16], source.get("weights_hash")} - {None}
    )
    lineage = {name.replace("_", " "): value for name, value in source.items()} | _lineage(path)
    figures = list(reading.figures(own))
    return CardFacts(
        name=str(source.get("run") or path.absolute().name),
        about=about,
        model=_model(card.model, found.model, card.sampling, card.vocabulary),
        figures=tuple(figures),
        findings=tuple(reading.findings(own)),
        kept=tuple(_kept(read_saved(path))),
        limits=tuple(_limits(card.model, figures, None)),
        unmeasured=tuple(_unmeasured(own.values(), card.model.shape is not None, 0)),
        licences=licences or Licences(),
        lineage={**lineage, "sha256 of the weights' file": card.sha256, "code version": card.code_version},
    )


def _lineage(path: Path) -> dict[str, Any]:
    """What a registry noted of a version, one value a line; nothing if it is no version."""
    file = path / "lineage.json"
    if not file.is_file():
        return {}
    try:
        tree = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{file} is not JSON ({error})") from None
    plain = {name.replace("_", " "): value for name, value in tree.items() if not isinstance(value, dict | list)}
    return plain | _began((tree.get("parent") or {}).get("checkpoint"))


def _began(checkpoint: str | None) -> dict[str, str]:
    """Of a run that went on from another one's checkpoint: the steps and tokens up to there are that one's."""
    return {} if checkpoint is None else {"began from": checkpoint}


def _model(config: ModelConfig, model: MaskedDiffusion, sampling: SamplingConfig, words: str | None) -> ModelFacts:
    return ModelFacts(
        kind="text" if config.shape is None else "images",
        objective=config.objective,
        schedule=str(config.schedule) if config.objective == "md4" else "learned, one power for each token",
        network=config.network.model_dump(mode="json", exclude_none=True),
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        vocabulary=words,
        vocabulary_size=config.vocab_size,
        length=config.length,
        shape=config.shape,
        classes=config.classes,
        sampling=sampling.resolve(config.objective).model_dump(mode="json", exclude_none=True),
    )


def _data(loaded: Loaded) -> Iterable[DataFacts]:
    """The run's sets; without counts where a prepared set is not at hand."""
    config = loaded.config.data
    several = len(config.names()) > 1
    for name, (weight, one) in zip(config.names(), config.sets(), strict=True):
        share, name = (float(weight), name) if several else (None, one.source)
        try:
            manifest = Manifest.load(prepared_path(one))
        except (UserError, OSError):
            yield DataFacts(name=name, about=one.source, fingerprint=None, weight=share)
            continue
        about = ". ".join(filter(None, (manifest.source.identity, manifest.source.version, _known(one.source))))
        yardsticks = {} if manifest.ngrams is None else manifest.ngrams.model_dump()
        if manifest.pixels is not None:
            yardsticks = {"pixels by themselves": manifest.pixels.independent_bits}
        yield DataFacts(
            name=name,
            about=about,
            fingerprint=manifest.fingerprint,
            packing=manifest.packing if manifest.pixels is None else None,
            weight=share,
            splits=tuple(
                SplitFacts(name=split, documents=each.documents, tokens=each.tokens, rows=each.rows)
                for split, each in manifest.splits.items()
            ),
            yardsticks=yardsticks,
        )


def _known(source: str) -> str | None:
    return SETS[source].about if source in SETS else None


def _validation(run: Run, loaded: Loaded) -> Iterable[FigureFact]:
    """The bound that training itself measured at this step; it is of the moving average, as the weights must be."""
    if not loaded.averaged:
        return
    for row in run.metrics("evaluation"):
        if row["step"] == loaded.step and math.isfinite(row["bits_per_token"]):
            yield FigureFact(
                metric="negative ELBO (upper bound), while training",
                value=row["bits_per_token"],
                standard_error=row["standard_error"],
                unit="bits per token",
                data="validation",
                how=f"{row['estimator']}, {row['rows']:,} rows, {row['draws']} draws each",
                source="metrics.jsonl",
            )


def _samples(run: Run, loaded: Loaded) -> Iterable[SampleFact]:
    """Samples that `md4 sample` has written of these weights. Of images there are pictures."""
    if loaded.config.data.has_images:
        return
    left = _SAMPLES
    for name, tree in reading.trees(run.place, "samples"):
        if tree.get("weights_hash") != loaded.weights_hash or not {"samples", "prompts", "settings"} <= tree.keys():
            continue
        settings = {
            name: value if name != "grid" or isinstance(value, str) else f"{len(value)} times"
            for name, value in tree["settings"].items()
            if value is not None
        }
        words = " ".join(f"{name}={value}" for name, value in settings.items())
        for one, prompt in list(zip(tree["samples"], tree["prompts"], strict=True))[:left]:
            yield SampleFact(text=one["text"][:_TEXT], prompt=prompt, seed=one["seed"], how=words)
            left -= 1


def _pictures(run: Run, loaded: Loaded) -> Iterable[PictureFact]:
    """The loss curve, drawn anew, and pictures that stand beside samples and reports of this step."""
    if run.metrics("train"):
        with TemporaryDirectory() as folder:
            png = draw_loss(run, Path(folder) / "loss.png").read_bytes()
        yield PictureFact(name="loss", title="Loss over steps", png=png)
    step = f"step-{loaded.step:08d}"
    found = [(name, f"Samples ({Path(name).stem})") for name in _pngs(run, "samples", f"{step}-")[:2]]
    found += [
        (name, "Score of samples by the network calls that they cost, and what searched grids gain")
        for name in _pngs(run, "reports", "sampler-frontier-")[-1:]
        if step in name
    ]
    for place, (name, title) in enumerate(found):
        yield PictureFact(name=f"picture-{place + 1}", title=title, png=run.place.read(name))


def _pngs(run: Run, folder: str, beginning: str) -> list[str]:
    return [
        name for name in run.place.list(folder) if name.startswith(f"{folder}/{beginning}") and name.endswith(".png")
    ]


def _kept(found: Iterable[SavedSettings]) -> Iterable[str]:
    for one in sorted(found, key=lambda one: (one.name, one.steps)):
        asked = "sampler=best" if one.name == "best" else f"grid={one.name}"
        settings = one.facts.get("asked")
        words = "" if settings is None else ": " + " ".join(f"{name}={value}" for name, value in settings.items())
        yield f"`{asked} steps={one.steps}`{words}"


def _limits(model: ModelConfig, figures: Iterable[FigureFact], training: TrainingFacts | None) -> Iterable[str]:
    """What follows from the facts, and from the method."""
    yield (
        "It writes several tokens in one network call when it has fewer calls than tokens; these are drawn without "
        "knowing of each other, and at few calls they may not go together."
    )
    if model.shape is None:
        yield (
            f"It has seen texts of {model.length:,} tokens. Longer ones are written in blocks that see no more than "
            "that."
        )
    else:
        yield f"It makes images of {' x '.join(map(str, model.shape))} and no others."
    if model.classes:
        yield f"It makes the {model.classes} classes that it was shown; nothing else can be asked for."
    if any("upper bound" in figure.metric for figure in figures):
        yield "Its negative log-likelihood is known from above only: the bounds say how bad it is at most."
    if training is not None and training.skipped_steps:
        yield f"{training.skipped_steps} steps of its training were skipped because their loss or gradient leapt."
    if training is not None and not training.averaged:
        yield "Its weights are those of the last step, not their moving average."


def _unmeasured(own: Iterable[dict[str, Any]], images: bool, others: int) -> Iterable[str]:
    """What no report on these weights is about."""
    kinds = {tree["kind"] for tree in own}
    if "likelihood" not in kinds:
        yield "the likelihood of a whole split (`md4 evaluate`)"
    if not {"quality", "frontier", "sampler-frontier"} & kinds:
        yield "the quality of its samples (`md4 quality`, `md4 grid --frontier`)"
    if not images and not any(tree.get("zero_shot") for tree in own):
        yield "texts of other sources than its own (`md4 evaluate --zero-shot`)"
    yield "whether it repeats examples of its training data"
    yield "bias, and what is offensive, private or untrue in " + ("its images" if images else "its texts")
    if others:
        yield f"{others} reports of the run are on other weights, and are not shown"
