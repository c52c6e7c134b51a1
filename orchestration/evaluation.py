"""Evaluating a run: from the choices of the command line to reports in the run's folder."""

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from os import cpu_count
from pathlib import Path

import torch

from md4.errors import UserError
from md4.genmd4 import GenMD4
from md4.objectives import MaskedDiffusion
from orchestration.cluster import cluster
from orchestration.runs import Loaded, load_model
from pipelines import zero_shot
from pipelines.evaluate import evaluate
from pipelines.prepare import prepared_path
from pipelines.reports import LikelihoodReport, Provenance, write
from pipelines.shards import ShardSet
from pipelines.vocabularies import BytePairs


@dataclass(frozen=True)
class ZeroShot:
    """Which foreign data sets to evaluate, and by which protocol (`pipelines.zero_shot`)."""

    names: tuple[str, ...]
    folder: Path  # that the sets' files lie below
    protocol: str = "md4"
    stride: int | None = None
    separate: bool = False
    tokenizer: str | None = None  # GPT-2's vocabulary: a folder, or a name on the hub


@dataclass(frozen=True)
class Evaluation:
    """What to estimate, and how. None: as the run's configuration says, or the natural choice."""

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


def run(path: Path, wanted: Evaluation, report: Callable[[str], None] = print) -> Iterator[LikelihoodReport]:
    """Evaluate the newest checkpoint of a run; each report is written into the run's reports/ when it is given.

    With workers, Ray is started or joined, and every actor loads the model from the run's folder. Raises `UserError` as
    `load_model`, `evaluate` and `pipelines.zero_shot` do, and if the run has a newer checkpoint before all have loaded.
    """
    loaded = load_model(path, ema=wanted.ema, report=report)
    if not wanted.workers and torch.cuda.is_available():
        loaded.model.to("cuda")
    load = partial(same_model, str(path.absolute()), wanted.ema, loaded.weights_hash)
    # Ray Data's own tasks need a slot beside those of the actors.
    with cluster(num_cpus=max(cpu_count() or 1, wanted.workers + 1)) if wanted.workers else nullcontext():
        for data in _sets(loaded, wanted):
            result = evaluate(
                loaded.model,
                data,
                draws=loaded.config.evaluation.draws if wanted.draws is None else wanted.draws,
                limit=wanted.rows,
                batch_size=wanted.batch_size,
                seed=wanted.seed,
                estimator=_estimator(loaded, wanted),
                timesteps=wanted.timesteps,
                workers=wanted.workers,
                load=load,
                provenance=Provenance(run=loaded.config.name, step=loaded.step, weights_hash=loaded.weights_hash),
            )
            files = write(result, path / "reports")
            report(f"written: {', '.join(str(file) for file in files)}")
            yield result


def _estimator(loaded: Loaded, wanted: Evaluation) -> str:
    if wanted.estimator is not None:
        return wanted.estimator
    if wanted.timesteps is not None:
        return "discrete"
    # GenMD4 has but one, whatever the configuration's default is.
    return "continuous" if isinstance(loaded.model, GenMD4) else loaded.config.evaluation.estimator


def _sets(loaded: Loaded, wanted: Evaluation) -> Iterator[ShardSet | zero_shot.ZeroShotSet]:
    chosen = wanted.zero_shot
    if chosen is None:
        yield ShardSet(prepared_path(loaded.config.data), wanted.split or "validation")
        return
    length = loaded.config.model.length
    rule = zero_shot.protocol(chosen.protocol, length, chosen.stride, chosen.separate)
    words = loaded.vocabulary
    if chosen.tokenizer is not None:
        if words.name != BytePairs.name:
            raise UserError(f"tokenizer={chosen.tokenizer}: the run's vocabulary is {words.name}, not {BytePairs.name}")
        words = BytePairs(chosen.tokenizer)
    for name in chosen.names:  # a mistyped or absent one is named before hours are spent on the others
        zero_shot.find(name, chosen.folder, wanted.split)
    for name in chosen.names:
        # GenMD4's bound is known for whole windows only.
        drop_short = isinstance(loaded.model, GenMD4)
        yield zero_shot.load(name, chosen.folder, words, rule, length, wanted.split, drop_short)


def same_model(path: str, ema: bool, weights_hash: str) -> MaskedDiffusion:
    """The model of a run's newest checkpoint, if it is still the one with this hash; UserError if not."""
    loaded = load_model(path, ema=ema)
    if loaded.weights_hash != weights_hash:
        raise UserError(f"run {path} has got a newer checkpoint (step {loaded.step}) meanwhile: evaluate it again")
    return loaded.model
