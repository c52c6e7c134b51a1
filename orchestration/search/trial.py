"""What runs in a trial's process: the ordinary trainer, and its evaluations told to Tune.

The process holds no logical CPUs (`orchestration.search.packing`). When a scheduler ends the trial, it ends its trainer
in order, so that the place of the workers is free for the next one (`orchestration.stopping`).
"""

import json
import math
import os
import queue
import threading
from pathlib import Path
from typing import Any

import ray
from ray import tune

from md4.errors import UserError
from orchestration.search.study import Begin, Record, Round, Study, Trial, as_round
from orchestration.stopping import Stop

METRIC, TIME = "bits_per_token", "round"
_POINTER = "begin.json"  # all that a checkpoint of Tune's holds: where ours is
_END_SECONDS = 60.0  # that a trainer is given to end in order


class TrialProcess(tune.Trainable):
    """One trial of Tune's: each step is a round.

    Its setting has `study` (its folder), `here` (the folder that relative paths are below), `number`, and, of a
    population, the values by key.
    """

    def setup(self, config: dict[str, Any]) -> None:
        os.chdir(config["here"])
        # Ray hides GPUs from who asked for none, and this machine may have none: the cluster's are asked for.
        os.environ.setdefault("RAY_ADDRESS", ray.get_runtime_context().gcs_address)
        self._study = Study(config["study"])
        self._trial = Trial(self._study, int(self.trial_name))
        self._setting = config
        self._begins: Begin | None = None
        self._training: _Training | None = None
        self._replay: list[Round] | None = None
        self._last: Round | None = None

    def step(self) -> dict[str, Any]:
        """The next round, as Tune hears of it."""
        if self._replay is None:
            self._begin()
        assert self._replay is not None
        if self._replay:
            self._last = self._replay.pop(0)
            return _told(self._last, replayed=True, done=self._training is None and not self._replay)
        assert self._training is not None
        self._last = self._training.next()
        done = self._last.number == self._study.space.search.rounds
        if done:
            self._training.finish()
            self._trial.end("finished")
        return _told(self._last, done=done)

    def save_checkpoint(self, checkpoint_dir: str) -> None:
        """Where the checkpoint of the last round is, for another trial of a population to go on from."""
        if self._last is None or not self._population:
            return
        begins = Begin(trial=self._trial.number, round=self._last.number, checkpoint=self._last.checkpoint or "")
        (Path(checkpoint_dir) / _POINTER).write_text(begins.model_dump_json(), encoding="utf-8")

    def load_checkpoint(self, checkpoint: Any) -> None:
        """Tune has this trial go on from there."""
        self._begins = Begin.model_validate(json.loads((Path(checkpoint) / _POINTER).read_text("utf-8")))

    def cleanup(self) -> None:
        """End the trainer, if it is at work, and wait for that."""
        if self._training is not None:
            self._training.end()

    @property
    def _population(self) -> bool:
        return self._study.space.search.scheduler == "pbt"

    def _begin(self) -> None:
        """Find out where the trial is, and start its trainer, unless it is over."""
        trial, setting = self._trial, self._setting
        given = {key: setting[key] for key in self._study.space.space if key in setting}
        record = trial.begin(given or self._study.space.point(trial.number))
        if self._begins is not None and self._begins.trial != trial.number:
            record = trial.fork(given, self._begins)
        if record.ended is not None and record.ended.how == "failed":
            record = trial.reopen()
        over = record.ended is not None
        known = trial.rounds(upto_checkpoint=not over)
        if not over and known and known[-1].number == self._study.space.search.rounds:
            trial.end("finished")  # it was killed after its last checkpoint, before that could be noted
            over = True
        # A scheduler of rungs has to hear of all of them; a population is where it is.
        self._replay = known if not self._population else known[-1:] if over else []
        if not over:
            self._training = _Training(trial, record, self._population, known[-1].number if known else 0)


class _Training:
    """The trainer of a trial's newest run, in a thread, and the rounds that it finishes."""

    def __init__(self, trial: Trial, record: Record, population: bool, known: int):
        self._trial, self._config = trial, trial.config(record.segments[-1])
        self._population, self._known = population, known
        self._news: queue.Queue[Round | BaseException | None] = queue.Queue()
        self._waiting: dict[int, Round] = {}  # by step, for their checkpoint
        self._stop = Stop()
        self._thread = threading.Thread(target=self._train, daemon=True)
        self._thread.start()

    def next(self) -> Round:
        """Wait for the next round; raises what the trainer ended with, if it ends before."""
        found = self._news.get()
        if isinstance(found, Round):
            return found
        raise found or RuntimeError(f"run {self._config.directory} ended before its last round")

    def finish(self) -> None:
        """Wait for the end of the trainer after its last round; raises what it ended with."""
        found = self._news.get()
        if isinstance(found, BaseException):
            raise found

    def end(self) -> None:
        """End the trainer now."""
        if self._thread.is_alive():
            self._stop.ask()
            self._thread.join(_END_SECONDS)

    def _train(self) -> None:
        try:
            from orchestration.train import train

            resume = (self._config.directory / "config.yaml").exists()
            train(self._config, resume=resume, report=lambda _: None, on_row=self._heard, stop=self._stop)
            self._news.put(None)
        except BaseException as error:
            if isinstance(error, UserError):
                self._trial.end("failed", str(error))
            self._news.put(error)

    def _heard(self, row: dict[str, Any]) -> None:
        one = as_round(row, self._config)
        if one is not None and one.number > self._known:
            if not self._population:
                self._news.put(one)
                return
            self._waiting[one.step] = one
        if row["kind"] == "checkpoint" and row["step"] in self._waiting:  # others may go on from it now
            one = self._waiting.pop(row["step"])
            self._news.put(one.at(str(self._config.directory / "checkpoints" / row["path"])))


def _told(one: Round, *, replayed: bool = False, done: bool = False) -> dict[str, Any]:
    """What Tune hears of a round. A bound that is no number is the worst: its schedulers sort."""
    bits = one.bits if math.isfinite(one.bits) else math.inf
    told = {METRIC: bits, "standard_error": one.error, TIME: one.number, "tokens": one.tokens}
    return told | {"replayed": replayed, "done": done}
