"""Evaluating a trained model: from the choices of the command line to reports in its folder."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from os import cpu_count
from pathlib import Path

import torch

from md4 import weights
from md4.errors import UserError
from md4.genmd4 import GenMD4
from md4.objectives import MaskedDiffusion
from orchestration import exported
from orchestration.cluster import cluster
from orchestration.config import EvaluationConfig
from orchestration.run_mirror import deliver
from orchestration.runs import Loaded, load_model
from pipelines import zero_shot
from pipelines.config import prepared_path
from pipelines.evaluate import Estimates, evaluate_rows
from pipelines.reports import LikelihoodReport, Provenance, write
from pipelines.shards import ShardSet
from pipelines.storage import Folder, Place
from pipelines.vocabularies import BytePairs, Trained, Vocabulary

Data = ShardSet | zero_shot.ZeroShotSet


@dataclass(frozen=True)
class ZeroShot:
    """Which foreign data sets to evaluate, and by which protocol (`pipelines.zero_shot`)."""

    names: tuple[str, ...]
    protocol: str = "md4"
    stride: int | None = None
    separate: bool = False
    tokenizer: str | None = None  # GPT-2's vocabulary: a folder, or a name on the hub


@dataclass(frozen=True)
class Evaluation:
    """What to estimate, and how. None: as the run's configuration says, or the natural choice."""

    data: str | Path | None = (
        None  # a prepared set, perhaps in S3; with zero_shot, the folder that the files of its sets lie below
    )
    split: str | None = None
    rows: int | None = None
    draws: int | None = None
    estimator: str | None = None
    timesteps: int | None = None
    seed: int = 0
    batch_size: int = 64
    workers: int = 0
    ema: bool = True
    zero_shot: ZeroShot | None = None
    sets: str | None = None  # of a run's mixture: the name of one, or all; the first if not given


@dataclass(frozen=True)
class Subject:
    """A trained model, and what its folder says of it."""

    model: MaskedDiffusion
    length: int
    vocabulary: Vocabulary | None
    provenance: Provenance
    # Where the prepared sets are that it was trained on, by their names in the mixture. Their corpora are not needed.
    data: dict[str, Callable[[], Place]] = field(default_factory=dict)
    defaults: EvaluationConfig = field(default_factory=lambda: EvaluationConfig.model_validate({}))
    step: int | None = None  # of training; of an exported model as its folder says
    # The same as a model to sample; UserError where the folder doesn't say what its tokens are.
    to_sample: Callable[[], Loaded] | None = None


def open_subject(
    path: Place, ema: bool = True, report: Callable[[str], None] = print, step: int | None = None
) -> Subject:
    """The model of a run's newest sound checkpoint, or of that of a step, or of an exported folder; UserError if it is
    none of these."""
    folder = Folder(path)
    if exported.is_exported(folder):
        found = weights.load(folder.url)
        facts = Provenance(run=folder.absolute().name, step=None, weights_hash=found.card.sha256[:16])
        return Subject(
            model=found.model,
            length=found.config.length,
            vocabulary=exported.words_of(found, folder),
            provenance=facts,
            step=exported.step_of(found),
            to_sample=lambda: exported.loaded(found, Path(folder.url)),
        )
    loaded = load_model(path, ema=ema, report=report, step=step)
    names, sets = loaded.config.data.names(), loaded.config.data.sets()
    return Subject(
        model=loaded.model,
        length=loaded.config.model.length,
        vocabulary=loaded.vocabulary,
        step=loaded.step,
        to_sample=lambda: loaded,
        provenance=Provenance(run=loaded.config.name, step=loaded.step, weights_hash=loaded.weights_hash),
        data={name: partial(prepared_path, one) for name, (_, one) in zip(names, sets, strict=True)},
        defaults=loaded.config.evaluation,
    )


def run(path: Place, wanted: Evaluation, report: Callable[[str], None] = print) -> Iterator[LikelihoodReport]:
    """Evaluate the model of a folder; each report is written into reports/ there, and given, as soon as it is ready.

    With workers, Ray is started or joined, and every actor loads the model from the folder. Raises `UserError` as
    `open_subject`, `evaluate` and `pipelines.zero_shot` do, and if a run has a newer checkpoint before all have loaded.
    """
    subject = open_subject(path, wanted.ema, report)
    for found in measure(path, subject, wanted, list(sets_of(subject, wanted)), report):
        yield found.report


@dataclass(frozen=True)
class Measured:
    """A report, its file, and what single rows contributed to it."""

    report: LikelihoodReport
    file: str  # path or url
    rows: Estimates


def measure(
    path: Place,
    subject: Subject,
    wanted: Evaluation,
    sets: Sequence[tuple[str | None, Data]],
    report: Callable[[str], None] = print,
) -> Iterator[Measured]:
    """The same, of a model that is open and of sets as `sets_of` gives them."""
    if not wanted.workers and torch.cuda.is_available():
        subject.model.to("cuda")
    load = partial(same_model, Folder(path).absolute(), wanted.ema, subject.provenance)
    # Ray Data's own tasks need a slot beside those of the actors.
    with cluster(num_cpus=max(cpu_count() or 1, wanted.workers + 1)) if wanted.workers else nullcontext():
        for name, data in sets:
            result, rows = evaluate_rows(
                subject.model,
                data,
                draws=subject.defaults.draws if wanted.draws is None else wanted.draws,
                limit=wanted.rows,
                batch_size=wanted.batch_size,
                seed=wanted.seed,
                estimator=_estimator(subject, wanted),
                timesteps=wanted.timesteps,
                workers=wanted.workers,
                load=load,
                provenance=subject.provenance,
            )
            result = result.model_copy(update={"data_set": name})
            files = deliver(path, "reports", partial(write, result))
            report(f"written: {', '.join(files)}")
            yield Measured(result, files[0], rows)


def same_model(path: Place, ema: bool, provenance: Provenance) -> MaskedDiffusion:
    """The model of a folder, if it still has these weights; UserError if not."""
    found = open_subject(path, ema, step=provenance.step)
    if found.provenance != provenance:
        raise UserError(f"{path} has got other weights meanwhile (now step {found.provenance.step}): evaluate it again")
    return found.model


def _estimator(subject: Subject, wanted: Evaluation) -> str:
    if wanted.estimator is not None:
        return wanted.estimator
    if wanted.timesteps is not None:
        return "discrete"
    # GenMD4 has but one, whatever the default is.
    return "continuous" if isinstance(subject.model, GenMD4) else subject.defaults.estimator


def sets_of(subject: Subject, wanted: Evaluation) -> Iterator[tuple[str | None, Data]]:
    """What is to be evaluated; with its name, if it is one of several sets of the run."""
    if wanted.sets is not None and (wanted.data is not None or wanted.zero_shot is not None):
        raise UserError("--set names a set of the run's own mixture: leave out --data and --zero-shot")
    if wanted.zero_shot is not None:
        yield from ((None, one) for one in _zero_shot_sets(subject, wanted, wanted.zero_shot))
        return
    folders: dict[str | None, Place]
    if wanted.data is not None:
        folders = {None: wanted.data}
    elif subject.data:
        several = len(subject.data) > 1
        folders = {name if several else None: subject.data[name]() for name in _names(subject, wanted.sets)}
    else:
        raise UserError("an exported model has no data of its own: name a prepared set by --data, or use --zero-shot")
    opened = [(name, ShardSet(folder, wanted.split or "validation")) for name, folder in folders.items()]
    for _, shards in opened:  # one that does not fit is named before hours are spent on the others
        size, length = shards.manifest.vocabulary_size, shards.length
        if (size, length) != (subject.model.vocab_size, subject.length):
            raise UserError(
                f"{shards.root} has rows of {length} tokens of a vocabulary of {size}, "
                f"the model rows of {subject.length} of {subject.model.vocab_size}"
            )
        name = shards.manifest.vocabulary
        if isinstance(subject.vocabulary, Trained) and name != subject.vocabulary.name:
            raise UserError(
                f"{shards.root} has tokens of the vocabulary {name}, the model those of {subject.vocabulary.name}"
            )
    yield from opened


def _names(subject: Subject, wanted: str | None) -> list[str]:
    """The sets of a mixture that are meant."""
    names = list(subject.data)
    if wanted is None:
        return names[:1]
    if wanted in names:  # one may be called all
        return [wanted]
    if wanted == "all":
        return names
    raise UserError(f"--set {wanted}: the run's sets are called {', '.join(names)}; or say all")


def _zero_shot_sets(subject: Subject, wanted: Evaluation, chosen: ZeroShot) -> Iterator[zero_shot.ZeroShotSet]:
    if wanted.data is None:
        raise UserError("--zero-shot needs --data FOLDER, where the files of the data sets are")
    if not chosen.names:
        raise UserError(f"--zero-shot names no data set; known are {', '.join(zero_shot.DATA_SETS)}")
    if Folder(wanted.data).remote:
        raise UserError(f"--data {wanted.data}: the files of zero-shot sets must lie on this machine")
    folder = Path(wanted.data)
    rule = zero_shot.protocol(chosen.protocol, subject.length, chosen.stride, chosen.separate)
    words = subject.vocabulary
    if words is None:
        raise UserError("this model's folder doesn't say what its vocabulary is: it can't read text")
    if chosen.tokenizer is not None:
        if words.name != BytePairs.name:
            raise UserError(f"--tokenizer is about {BytePairs.name}; the model's vocabulary is {words.name}")
        words = BytePairs(chosen.tokenizer)
    for name in chosen.names:  # a mistyped or absent one is named before hours are spent on the others
        zero_shot.find(name, folder, wanted.split)
    for name in chosen.names:
        # GenMD4's bound is known for whole windows only.
        drop_short = isinstance(subject.model, GenMD4)
        yield zero_shot.load(name, folder, words, rule, subject.length, wanted.split, drop_short)
