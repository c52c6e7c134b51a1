"""The driver of a run: checks everything first, prepares the data if need be, starts Ray Train, shows progress."""

import json
import os
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from md4.errors import UserError
from md4.model import count_parameters
from orchestration import checkpoints
from orchestration.cluster import cluster
from orchestration.config import Config
from orchestration.runs import Run
from pipelines.config import check as check_corpus
from pipelines.prepare import prepare
from pipelines.shards import ShardSet
from pipelines.storage import Folder, Place

Report = Callable[[str], None]


@dataclass(frozen=True)
class Outcome:
    run: Run
    step: int
    seconds: float


def check(config: Config, resume: bool, report: Report) -> None:
    """Everything that can be wrong before any process starts; UserError with the first mistake. Takes no resource."""
    if config.train.device == "cuda" and not torch.cuda.is_available():
        raise UserError("train.device='cuda', but torch sees no CUDA device here; use cpu or auto")
    check_corpus(config.data)
    parameters = count_parameters(config.model)
    share = config.train.batch_size // config.train.workers
    report(
        f"{config.name}: {parameters:,} parameters, {config.train.steps:,} steps of {config.train.batch_size} x "
        f"{config.model.length} tokens on {config.train.workers} worker(s), ZeRO-{config.train.zero_stage}, "
        f"{share} rows a worker and step"
    )
    if resume:
        run = Run.resume(config, report)
        found = checkpoints.newest(run.checkpoints, report)
        report(
            f"continuing {run.path} " + (f"from step {found.step}" if found else "from the start: no checkpoint yet")
        )
    elif (config.directory / "config.yaml").exists():
        raise UserError(f"run {config.directory} exists already: continue it with --resume, or choose another name=...")


def train(config: Config, *, resume: bool = False, report: Report = print) -> Outcome:
    """Run `config` to its last step; returns when it is done.

    Raises:
        UserError: anything wrong with the configuration, the data or the run's folder, or the run failed for good.
    """
    check(config, resume, report)
    with cluster(num_cpus=config.train.workers + 2):
        data = prepare(config.data, report)
        shards = {split: ShardSet(data, split) for split in ("train", "validation")}
        _check_classes(config, shards["train"])
        run = Run(config.directory) if resume else Run.create(config)
        _check_data(run, shards["train"], report)
        began = time.perf_counter()
        with _Follower(run, config, report):
            result = _fit(config, run, data)
        return Outcome(run, result["step"], time.perf_counter() - began)


def _check_data(run: Run, shards: ShardSet, report: Report) -> None:
    """A run goes on with the data that it began with."""
    found = checkpoints.newest(run.checkpoints, report)
    if found and found.manifest["data_fingerprint"] != shards.fingerprint:
        raise UserError(
            f"run {run.path} was trained on data {found.manifest['data_fingerprint']}, "
            f"but {shards.root} is now {shards.fingerprint}"
        )


def _check_classes(config: Config, shards: ShardSet) -> None:
    """A class-conditional model needs labels, and no more of them than it has classes."""
    pixels = shards.manifest.pixels
    found = None if pixels is None else pixels.classes
    if config.model.classes and found is None:
        raise UserError(f"model.classes={config.model.classes}, but the data in {shards.root} have no labels")
    if config.model.classes and found is not None and found > config.model.classes:
        raise UserError(f"model.classes={config.model.classes}, but the data in {shards.root} have {found} classes")


def _use_gpu(config: Config) -> bool:
    return config.train.device == "cuda" or (config.train.device == "auto" and torch.cuda.is_available())


def _fit(config: Config, run: Run, data: Place) -> dict[str, Any]:
    from ray.train import FailureConfig, RunConfig, ScalingConfig, TrainingFailedError
    from ray.train.torch import TorchTrainer

    from orchestration import worker

    trainer = TorchTrainer(
        worker.run,
        train_loop_config={
            # Workers run in a folder of Ray's, so paths must not depend on the current one.
            "config": {**config.model_dump(mode="json"), "runs": str(Path(config.runs).resolve())},
            "data": str(Folder(data).absolute()),
        },
        scaling_config=ScalingConfig(num_workers=config.train.workers, use_gpu=_use_gpu(config)),
        run_config=RunConfig(
            # Ray's own notes on this attempt; what is worth keeping stands in the run's folder itself.
            name=f"attempt-{time.time_ns()}",
            storage_path=str((run.path / ".ray").resolve()),
            failure_config=FailureConfig(max_failures=config.train.max_restarts),
        ),
    )
    try:
        result: Any = trainer.fit().return_value
    except TrainingFailedError as error:
        raise _explain(error, run) from error
    if "error" in result:
        raise UserError(result["error"])
    return result


def _explain(error: Exception, run: Run) -> Exception:
    """What a failed run tells its user: the mistake itself if it was one, else the failure and how to go on."""
    failures = getattr(error, "worker_failures", None) or {0: error}
    for failure in failures.values():
        cause: BaseException | None = failure
        while cause is not None:
            if isinstance(cause, UserError):
                return UserError(str(cause))
            cause = getattr(cause, "cause", None) or cause.__cause__
    lines = "\n".join(f"worker {rank}: {str(failure).strip().splitlines()[-1]}" for rank, failure in failures.items())
    return UserError(
        f"training failed for good:\n{lines}\ncontinue from the last checkpoint of {run.path} with --resume"
    )


class _Follower:
    """Prints the run's metrics as they are written, one clear line each."""

    def __init__(self, run: Run, config: Config, report: Report, every: float = 0.5):
        self._run, self._config, self._report, self._every = run, config, report, every
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._follow, daemon=True)
        self._position, self._file = 0, 0
        self._seen = max((row["time"] for row in run.metrics()), default=0.0)  # rows of earlier attempts

    def __enter__(self) -> None:
        self._thread.start()

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()

    def _follow(self) -> None:
        while not self._done.wait(self._every):
            self._print_new()
        self._print_new()

    def _print_new(self) -> None:
        path = self._run.metrics_file
        if not path.exists():
            return
        with path.open(encoding="utf-8") as file:
            if self._file != (now := os.fstat(file.fileno()).st_ino):  # a restart cuts the file back, into a new one
                self._file, self._position = now, 0
            file.seek(self._position)
            while (line := file.readline()).endswith("\n"):
                self._position = file.tell()
                row = json.loads(line)
                if row["time"] > self._seen:
                    self._seen = row["time"]
                    self._report(describe(row, self._config))


def describe(row: dict[str, Any], config: Config) -> str:
    """A row of metrics as the line a person reads."""
    step, steps = row["step"], config.train.steps
    head = f"step {step:>{len(str(steps))}}/{steps}"
    unit = "bits/dim" if config.data.has_images else "bits/token"
    if row["kind"] == "train":
        left = (steps - step) * row["seconds_per_step"]
        norm = "-" if row["gradient_norm"] is None else f"{row['gradient_norm']:.3f}"
        return (
            f"{head}  {row['bits_per_token']:.4f} {unit}  grad {norm}  lr {row['learning_rate']:.2e}  "
            f"{row['tokens_per_second']:,.0f} tokens/s  {_clock(left)} left"
        )
    if row["kind"] == "evaluation":
        return f"{head}  validation <= {row['bits_per_token']:.4f} +- {row['standard_error']:.4f} {unit}"
    if row["kind"] == "checkpoint":
        return f"{head}  checkpoint {row['path']} ({row['seconds']:.1f} s)"
    return f"{head}  {row['workers']} worker(s), {row['compute']} products"


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"
