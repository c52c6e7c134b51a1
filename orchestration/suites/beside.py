"""A suite beside a training: run on its checkpoints by a Ray task with resources of its own; nobody waits for it.

The worker that commits a checkpoint holds it (`orchestration.holds`) if it is the suite's turn. The driver sees the
hold, starts the task, and releases the checkpoint when the figures are in the table. At most one runs at a time. What
was not finished when a run was ended, or killed, is still held, and done by who continues it.

Why this is no `ray.train.ValidationConfig`: Ray Train validates checkpoints that all workers together `report` to its
controller. That is a meeting of the workers for each, at a step when it is known that ours is committed, and a register
of checkpoints beside ours that restarts would be made from. Its queue keeps the order, ends with the attempt, and the
end of a run waits for all of it. What remains that it would do for us is the task.
"""

import json
import os
import threading
import time
from collections.abc import Callable
from contextlib import chdir, nullcontext, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from orchestration import holds, results
from orchestration.checkpoints import MANIFEST
from orchestration.config import Config
from orchestration.events import Events
from orchestration.run_mirror import deliver
from orchestration.runs import METRICS, Run, add_metrics
from orchestration.suites import settings
from orchestration.suites.settings import Suite
from orchestration.tracking import TensorBoard
from pipelines.storage import Folder

_LOOK_SECONDS = 0.5  # between two looks at what is held; in S3 each is a request
_LOOK_SECONDS_REMOTE = 5.0


@dataclass(frozen=True)
class _Task:
    reference: Any  # of its answer
    name: str  # folder of the checkpoint
    step: int
    began: float  # monotonic, s


class Beside:
    """The suite of a run whose driver this process is; does nothing for a run without one. A context."""

    def __init__(self, run: Run, config: Config, report: Callable[[str], None]):
        self._run, self._options, self._report = run, config.evaluation, report
        self._tensorboard = config.tracking.tensorboard
        self._events, self._checkpoints = Events(run.place), run.checkpoints.absolute()
        self._end = threading.Event()
        self._task: _Task | None = None
        self._trouble: str | None = None  # of the last look, which is told once
        self._rows: list[dict[str, Any]] = []  # of metrics, that wait for the end of the training
        name = self._options.suite
        self._suite = None if name is None else settings.load(name).absolute()
        self._table = results.place(self._options.suite_results).absolute()
        self._thread = threading.Thread(target=self._follow, name="suite", daemon=True)

    def __enter__(self) -> "Beside":
        if self._suite is not None:
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._end.set()
        if self._suite is None:
            return
        self._thread.join()
        if self._task is not None:  # its checkpoint stays held
            self._cancel(self._task)

    def finish(self) -> None:
        """Wait for what is pending when the training is done, as long as the settings allow; then say what is left."""
        if self._suite is None:
            return
        end = time.monotonic() + self._options.suite_seconds
        told = False
        while (left := self._left()) and time.monotonic() < end:
            if not told:
                self._report(f"suite {self._suite.name}: the run is done, its last figures are being measured")
                told = True
            time.sleep(_LOOK_SECONDS)
        self._end.set()
        self._thread.join()
        self._add_rows()
        if left:
            steps = ", ".join(str(_step(name)) for name in left)
            self._report(
                f"suite {self._suite.name}: not done for the checkpoints of step {steps} after "
                f"{self._options.suite_seconds:g} s; they stay: md4 evaluate {self._run.place} "
                f"--suite {self._options.suite} --step {_step(left[-1])}"
            )

    # -- in a thread -------------------------------------------------------------------------------------------------

    def _follow(self) -> None:
        while not self._end.wait(_LOOK_SECONDS_REMOTE if self._checkpoints.remote else _LOOK_SECONDS):
            try:
                self._look()
                self._trouble = None
            except Exception as error:  # whatever it is, the training goes on
                if self._trouble != str(error):
                    self._trouble = str(error)
                    self._events.add("suite", did="failed", reason=self._trouble)

    def _look(self) -> None:
        """Take what is done, give up what takes too long, begin what is next."""
        if self._task is not None and not self._settled(self._task):
            return
        self._task = None
        pending = self._left()
        if not pending:
            return
        if self._options.suite_pending == "newest":
            for name in pending[:-1]:
                self._events.add("suite", did="passed over", step=_step(name))
                holds.release(self._checkpoints, name)
            pending = pending[-1:]
        assert self._suite is not None
        self._task = self._begin(pending[0], self._suite)

    def _left(self) -> list[str]:
        """Checkpoints that the suite is still to be run on, the oldest first."""
        return [name for name in holds.names(self._checkpoints) if (self._checkpoints / name).exists(MANIFEST)]

    def _begin(self, name: str, suite: Suite) -> _Task:
        import ray

        options, step = self._options, _step(name)
        evaluate = ray.remote(_evaluate).options(
            num_cpus=options.suite_cpus, num_gpus=options.suite_gpus, max_retries=1, name=f"suite-{step}"
        )
        self._events.add("suite", did="began", step=step)
        path, threads = str(self._run.place.absolute()), max(1, int(options.suite_cpus))
        reference = evaluate.remote(path, suite, str(self._table), step, threads, os.getcwd())
        return _Task(reference, name, step, time.monotonic())

    def _settled(self, task: _Task) -> bool:
        """Is the task over, or too late? Then its checkpoint is released, and the run knows what became of it."""
        import ray
        from ray.exceptions import RayError

        from orchestration.policies import last_line

        done, _ = ray.wait([task.reference], timeout=0)
        if not done:
            if time.monotonic() - task.began < self._options.suite_seconds:
                return False
            self._cancel(task)
            self._fail(task, f"not done within {self._options.suite_seconds:g} s (evaluation.suite_seconds)")
            return True
        try:
            self._tell(task, ray.get(task.reference))
        except RayError as error:
            self._fail(task, last_line(getattr(error, "cause", None) or error))
        holds.release(self._checkpoints, task.name)
        return True

    def _fail(self, task: _Task, reason: str) -> None:
        self._events.add("suite", did="failed", step=task.step, reason=reason)
        self._report(f"suite {self._options.suite}, step {task.step}: {reason}")
        holds.release(self._checkpoints, task.name)

    def _tell(self, task: _Task, found: dict[str, Any]) -> None:
        """The figures as a row of the run's metrics, unless they are there already."""
        self._events.add("suite", did="done", step=task.step, attempt=found["attempt"], seconds=found["seconds"])
        known = {(row["step"], row["attempt"]) for row in self._run.metrics("suite")}
        if (task.step, found["attempt"]) in known:
            return
        row = {"kind": "suite", "step": task.step, "time": time.time(), **found}
        if self._run.place.remote:
            self._rows.append(row)
        else:
            add_metrics(self._run.metrics_file, row)
        if self._tensorboard:  # a folder of its own: of two writers in one, TensorBoard shows the newer
            deliver(self._run.place, "tensorboard/suite", partial(_draw, row))

    def _add_rows(self) -> None:
        """To the metrics of a run in S3, which the first worker replaces by its own again and again while it trains."""
        lines = "".join(json.dumps(row) + "\n" for row in self._rows).encode()
        if lines:
            self._run.place.update(METRICS, lambda old: (old or b"") + lines)
        self._rows = []

    @staticmethod
    def _cancel(task: _Task) -> None:
        import ray

        with suppress(Exception):  # the cluster may be gone
            ray.cancel(task.reference, force=True)


def _draw(row: dict[str, Any], folder: Path) -> list[Path]:
    """The figures of a row for TensorBoard."""
    board = TensorBoard(folder, None)
    board.log(row)
    board.close()
    return list(folder.iterdir())


def _step(name: str) -> int:
    return int(name[5:13])


def _evaluate(path: str, suite: Suite, table: str, step: int, threads: int, home: str) -> dict[str, Any]:
    """The task: what a row of metrics says of the suite's figures."""
    import torch

    from orchestration.suites.reports import figures
    from orchestration.suites.run import Options, run

    began = time.perf_counter()
    torch.set_num_threads(threads)
    with chdir(home) if os.path.isdir(home) else nullcontext():  # a run's data may be named from there
        outcome = run(path, suite, Folder(table), Options(step=step), say=lambda _: None)
    found: dict[str, Any] = {"suite": suite.name, "attempt": outcome.attempt, "headline": figures(outcome.results)}
    for one in outcome.results:
        found[one.metric] = one.value
        if one.standard_error is not None:
            found[f"{one.metric}/error"] = one.standard_error
    return {**found, "seconds": time.perf_counter() - began}
