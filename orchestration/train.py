"""The driver of a run: checks everything first, prepares the data if need be, starts Ray Train, shows progress."""

import json
import math
import os
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import torch

from md4.errors import Failed, UserError
from md4.model import count_parameters
from orchestration import checkpoints, forks, memory_plan, spares
from orchestration.cluster import address, cluster, gpus, worker_environment
from orchestration.config import Config
from orchestration.cursor import check_cursor, run_order
from orchestration.events import Events
from orchestration.passes import Passes
from orchestration.runs import METRICS, Run, check_writable, refuse_taken
from orchestration.stopping import Stop
from orchestration.suites import settings as suites
from orchestration.suites.beside import Beside
from pipelines.config import check as check_corpus
from pipelines.config import prepared_path
from pipelines.manifest import MANIFEST, Manifest
from pipelines.prepare import prepare
from pipelines.storage import Entry, Folder, Place

Report = Callable[[str], None]
_RESIZE_SECONDS = 5.0  # how often an elastic run looks for more, or fewer, resources


@dataclass(frozen=True)
class Outcome:
    run: Run
    step: int
    seconds: float


def check(config: Config, resume: bool, report: Report) -> Config:
    """Everything that can be wrong before any process starts; UserError with the first mistake. Takes no resource.

    Returns the configuration with the checkpoint that it begins from found (`forks.pinned`).
    """
    if config.train.device == "cuda" and not torch.cuda.is_available() and address() is None:
        raise UserError("train.device='cuda', but torch sees no CUDA device here; use cpu or auto")
    memory_plan.check(config)
    if config.evaluation.suite is not None:
        suites.load(config.evaluation.suite)
    for note in check_corpus(config.data):
        report(note)
    if config.checkpoint.directory is not None:
        config.checkpoints.exists("any")  # a bucket that is not there is named now
    parameters, train = count_parameters(config.model), config.train
    share = Passes(train.batch_size, train.slices, train.least_workers, train.micro_batch).places
    report(
        f"{config.name}: {parameters:,} parameters, {config.train.steps:,} steps of {config.train.batch_size} x "
        f"{config.model.length} tokens on {config.train.workers} worker(s), ZeRO-{config.train.zero_stage}, "
        f"up to {share} rows a worker and step"
    )
    if not resume:
        refuse_taken(config)
    config = forks.pinned(config, resume, report)
    if resume:
        run = Run.resume(config, report)
        found = checkpoints.newest(run.checkpoints, report)
        report(
            f"continuing {run.place} " + (f"from step {found.step}" if found else "from the start: no checkpoint yet")
        )
    folders = [prepared_path(one) for _, one in config.data.sets()]
    if all(Folder(folder).exists(MANIFEST) for folder in folders):  # else as soon as they are prepared
        _check_data(config, folders, resume, report)
    return config


def train(
    config: Config,
    *,
    resume: bool = False,
    report: Report = print,
    on_row: Callable[[dict[str, Any]], None] | None = None,
    stop: Stop | None = None,
) -> Outcome:
    """Run `config` to its last step; returns when it is done.

    on_row: is given each row of metrics that the run writes, in a thread of its own; stop: ends the run from outside.

    Raises:
        Stopped: `stop` was asked to.
        UserError: anything wrong with the configuration, the data or the run's folder, or the run failed for good.
    """
    config = check(config, resume, report)
    check_writable(config.place)
    beside = 0 if config.evaluation.suite is None else math.ceil(config.evaluation.suite_cpus)
    with cluster(num_cpus=config.train.most_workers + 2 + beside):
        prepared_before = all(Folder(prepared_path(one)).exists(MANIFEST) for _, one in config.data.sets())
        data = [prepare(one, report) for _, one in config.data.sets()]
        if not prepared_before:
            _check_data(config, data, resume, report)
        run = Run(config.place) if resume else Run.create(config)
        began = time.perf_counter()
        events = Events(run.place)
        events.add("driver", did="began", pid=os.getpid())
        if not resume and config.train.start_from is not None:
            events.add("origin", checkpoint=config.train.start_from)
        try:
            with _Follower(run, config, report, on_row), Beside(run, config, report) as suites:
                result = _fit(config, run, data, stop)
                suites.finish()
        finally:
            events.add("driver", did="ended", pid=os.getpid())
        return Outcome(run, result["step"], time.perf_counter() - began)


def _check_data(config: Config, folders: Sequence[Place], resume: bool, report: Report) -> None:
    """UserError unless the prepared sets can serve the run, from the step on that it is at."""
    manifests = [Manifest.load(folder) for folder in folders]
    order = run_order(config, manifests)
    for folder, manifest in zip(folders, manifests, strict=True):
        _check_classes(config, folder, manifest)
        _check_vocabulary(config, folder, manifest)
    if config.evaluation.every and not manifests[0].splits["validation"].rows:
        raise UserError(
            f"{str(folders[0])!r} has no rows in its validation split to evaluate with: "
            "set evaluation.every=0, or data.validation higher"
        )
    found = checkpoints.newest(Run(config.place).checkpoints, lambda _: None) if resume else None
    if found is None and config.train.start_from is not None:
        found = checkpoints.read(config.train.start_from)
    if found is not None:
        check_cursor(order, found, report)


def _check_vocabulary(config: Config, folder: Place, manifest: Manifest) -> None:
    """The set's tokens must be those of the run's vocabulary, whose file may have changed since."""
    words = config.data.tokens
    digest = getattr(manifest, "vocabulary_digest", "")
    if manifest.vocabulary != words.name or (digest and digest != words.digest):
        raise UserError(
            f"{folder} holds tokens of the vocabulary {manifest.vocabulary}, but data.vocabulary="
            f"{config.data.vocabulary} is {words.name}: prepare the set again, or name the vocabulary it was made with"
        )


def _check_classes(config: Config, folder: Place, manifest: Manifest) -> None:
    """A class-conditional model needs labels, and no more of them than it has classes."""
    found = None if manifest.pixels is None else manifest.pixels.classes
    if config.model.classes and found is None:
        raise UserError(f"model.classes={config.model.classes}, but the data in {folder} have no labels")
    if config.model.classes and found is not None and found > config.model.classes:
        raise UserError(f"model.classes={config.model.classes}, but the data in {folder} have {found} classes")


def _use_gpu(config: Config) -> bool:
    """Does each worker take a GPU? The machines of a cluster that was joined may have them, and the driver's none."""
    if config.train.device == "auto":
        return torch.cuda.is_available() or (address() is not None and gpus() > 0)
    return config.train.device == "cuda"


def scaling(config: Config) -> Any:
    from ray.train import ScalingConfig

    least, most = config.train.least_workers, config.train.most_workers
    if least == most:
        return ScalingConfig(num_workers=most, use_gpu=_use_gpu(config))
    return ScalingConfig(
        num_workers=(least, most), use_gpu=_use_gpu(config), elastic_resize_monitor_interval_s=_RESIZE_SECONDS
    )


def _fit(config: Config, run: Run, data: Sequence[Place], stop: Stop | None = None) -> dict[str, Any]:
    from ray.train import FailureConfig, RunConfig, TrainingFailedError

    from orchestration import worker
    from orchestration.policies import Trainer
    from orchestration.recovery import Recovery

    # Workers run in a folder of Ray's, so paths must not depend on the current one.
    checkpoints_place = str(run.checkpoints.absolute())
    with _ray_folder(run) as notes:
        trainer = Trainer(
            worker.run,
            train_loop_config={
                "run": run.address,
                "checkpoints": checkpoints_place,
                "data": [str(Folder(place).absolute()) for place in data],
            },
            scaling_config=scaling(config),
            run_config=RunConfig(
                name=f"attempt-{time.time_ns()}",
                storage_path=notes,
                failure_config=FailureConfig(max_failures=-1),  # what counts is the trainer's own budget
                callbacks=[Recovery(run.address)],  # type: ignore[list-item]
                worker_runtime_env={"env_vars": worker_environment() | spares.environment()},
            ),
            folder=run.address,
            checkpoints=checkpoints_place,
            max_restarts=config.train.max_restarts,
            stop=stop,
        )
        try:
            result: Any = trainer.fit().return_value
        except TrainingFailedError as error:
            raise _explain(error, run) from error
    if "error" in result:
        raise UserError(result["error"])
    return result


@contextmanager
def _ray_folder(run: Run) -> Iterator[str]:
    """Where Ray puts its own notes on an attempt; what is worth keeping stands in the run's folder itself.

    Its controller writes them, which is on the driver's machine: others need not see them.
    """
    if not run.place.remote:
        yield str((run.path / ".ray").resolve())
        return
    with tempfile.TemporaryDirectory(prefix="md4-ray-") as folder:
        yield folder


def _explain(error: Exception, run: Run) -> Exception:
    """What a failed run tells its user: the mistake itself if it was one, else the failure and how to go on."""
    from orchestration.policies import causes, last_line

    for cause in causes(error):
        if isinstance(cause, UserError):
            return type(cause)(str(cause))
    failures = getattr(error, "worker_failures", None) or {0: error}
    lines = "\n".join(f"worker {rank}: {last_line(failure)}" for rank, failure in failures.items())
    return Failed(f"training failed for good:\n{lines}\ncontinue from the last checkpoint of {run.place} with --resume")


class _Follower:
    """Tells the run's metrics as they are written, one clear line each."""

    def __init__(
        self, run: Run, config: Config, report: Report, on_row: Callable[[dict[str, Any]], None] | None = None
    ):
        self._run, self._config, self._report, self._on_row = run, config, report, on_row
        self._every = 2.0 if run.place.remote else 0.5
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._follow, daemon=True)
        self._position, self._file = 0, 0  # of a file of this machine
        self._entry: Entry | None = None  # of one in S3
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
        for row in self._new_rows_of_s3() if self._run.place.remote else self._new_rows():
            if row["time"] > self._seen:
                self._seen = row["time"]
                self._report(describe(row, self._config))
                if self._on_row is not None:
                    self._on_row(row)

    def _new_rows(self) -> Iterator[dict[str, Any]]:
        path = self._run.metrics_file
        if not path.exists():
            return
        with path.open(encoding="utf-8") as file:
            if self._file != (now := os.fstat(file.fileno()).st_ino):  # a restart cuts the file back, into a new one
                self._file, self._position = now, 0
            file.seek(self._position)
            while (line := file.readline()).endswith("\n"):
                self._position = file.tell()
                yield json.loads(line)

    def _new_rows_of_s3(self) -> list[dict[str, Any]]:
        """All rows, if some have come since the last look; what S3 does not tell now, it tells at the next look."""
        with suppress(OSError, UserError):
            if (entry := self._run.place.entry(METRICS)) != self._entry:
                rows = self._run.metrics()
                self._entry = entry
                return rows
        return []


def describe(row: dict[str, Any], config: Config) -> str:
    """A row of metrics as the line a person reads."""
    step, steps = row["step"], config.train.steps
    head = f"step {step:>{len(str(steps))}}/{steps}"
    unit = "bits/dim" if config.data.has_images else "bits/token"
    if row["kind"] == "train":
        left = (steps - step) * row["seconds_per_step"]
        loss = "-" if row["bits_per_token"] is None else f"{row['bits_per_token']:.4f}"
        norm = "-" if row["gradient_norm"] is None else f"{row['gradient_norm']:.3f}"
        return (
            f"{head}  {loss} {unit}  grad {norm}  lr {row['learning_rate']:.2e}  "
            f"{row['tokens_per_second']:,.0f} tokens/s  {_clock(left)} left"
        )
    if row["kind"] == "evaluation":
        return f"{head}  validation <= {row['bits_per_token']:.4f} +- {row['standard_error']:.4f} {unit}"
    if row["kind"] == "checkpoint":
        return f"{head}  checkpoint {row['path']} ({row['seconds']:.1f} s, {row['blocked']:.2f} s of them in the way)"
    if row["kind"] == "checkpoint failed":
        return f"{head}  no checkpoint: {row['error']}"
    if row["kind"] == "suite":
        return f"step {step}: suite {row['suite']}: {row['headline']} ({row['seconds']:.0f} s)"
    if row["kind"] == "spike":
        return f"{head}  {row['action']}: {row['reason']}; the batch is in {row['batch']}"
    return f"{head}  {row['workers']} worker(s), {row['compute']} products"


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"
