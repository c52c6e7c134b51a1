"""What runs in a trial's process: the ordinary trainer, and its evaluations told to Tune.

The process holds no logical resources (`orchestration.search.packing`). Tune ends it when a scheduler says so; Ray ends
with it the trainer that it started, and its workers.
"""

import json
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from md4.errors import UserError
from orchestration.search.study import Begin, Record, Round, Segment, Study, Trial, as_round

METRIC, TIME = "bits_per_token", "round"
_POINTER = "begin.json"  # all that a checkpoint of Tune's holds: where ours is


def run(setting: Mapping[str, Any]) -> None:
    """One trial of Tune's, from where it is to its end.

    Args:
        setting: `study` (its folder), `here` (the folder that relative paths are below), and the values by key.
    """
    from ray import tune

    os.chdir(setting["here"])
    if not os.environ.get("CUDA_VISIBLE_DEVICES", "all"):
        del os.environ["CUDA_VISIBLE_DEVICES"]  # Ray hides GPUs from who asked for none; only their number is asked
    study = Study(setting["study"])
    trial = Trial(study, number_of(tune.get_context().get_trial_name()))
    record = trial.begin({key: setting[key] for key in study.space.space})
    population = study.space.search.scheduler == "pbt"
    if population and (begins := _begin()) is not None and begins.trial != trial.number:
        record = trial.fork({key: setting[key] for key in study.space.space}, begins)
    if record.ended is not None and record.ended.how == "failed":
        record = trial.reopen()
    ended = record.ended is not None
    known = trial.rounds(upto_checkpoint=not ended)
    for one in known[-1:] if population and ended else [] if population else known:
        tune.report(_told(one, replayed=True))
    if not ended:
        try:
            _train(trial, record, population)
        except UserError as error:
            trial.end("failed", str(error))
            raise
        trial.end("finished")


def number_of(name: str) -> int:
    """The trial's number, of its name in Tune."""
    return int(name)


def _train(trial: Trial, record: Record, population: bool) -> None:
    from orchestration.train import train

    segment = record.segments[-1]
    config = trial.config(segment)
    waiting: dict[int, Round] = {}

    def heard(row: dict[str, Any]) -> None:
        from ray import tune

        if (one := as_round(row, config)) is not None:
            if not population:
                tune.report(_told(one))
                return
            waiting[one.step] = one
        if row["kind"] == "checkpoint" and row["step"] in waiting:
            one = waiting.pop(row["step"])
            with tempfile.TemporaryDirectory() as folder:
                _point(Path(folder), trial, segment, one, row["path"])
                tune.report(_told(one), checkpoint=tune.Checkpoint.from_directory(folder))

    resume = (config.directory / "config.yaml").exists()
    train(config, resume=resume, report=lambda _: None, on_row=heard)


def _told(one: Round, replayed: bool = False) -> dict[str, Any]:
    """What Tune hears of a round."""
    told = {METRIC: one.bits, "standard_error": one.error, TIME: one.number, "tokens": one.tokens}
    return told | {"replayed": replayed}


def _point(folder: Path, trial: Trial, segment: Segment, one: Round, checkpoint: str) -> None:
    place = trial.run_of(segment) / "checkpoints" / checkpoint
    begins = Begin(trial=trial.number, round=one.number, checkpoint=str(place))
    (folder / _POINTER).write_text(begins.model_dump_json(), encoding="utf-8")


def _begin() -> Begin | None:
    """Where Tune says that this trial goes on from."""
    from ray import tune

    found = tune.get_checkpoint()
    if found is None:
        return None
    with found.as_directory() as folder:
        return Begin.model_validate(json.loads((Path(folder) / _POINTER).read_text("utf-8")))
