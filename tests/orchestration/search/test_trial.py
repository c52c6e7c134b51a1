"""What becomes of a trial that was killed or broke, from what lies in its folder; no trainer and no Tune."""

import json
from types import SimpleNamespace

import pytest
import ray
from rich.console import Console

from orchestration.checkpoints import MANIFEST
from orchestration.runs import Run
from orchestration.search import trial as trials
from orchestration.search.study import Begin, Study
from orchestration.search.table import Table
from orchestration.search.trial import TrialProcess
from orchestration.search.watching import Watcher

RATES = {"optimizer.learning_rate": {"loguniform": [1e-4, 1e-1]}}


class Told(SimpleNamespace):
    """A trial as Tune tells of it."""

    def __str__(self) -> str:
        return f"{self.config['number']:03d}"


@pytest.fixture
def made(planned):
    """`made(search)` -> a new study of three rounds."""

    def make(search: dict) -> Study:
        plan = planned(RATES, {"trials": 2, **search})
        return Study.create(plan.folder, plan.preset, plan.base, plan.space)

    return make


@pytest.fixture
def process(monkeypatch, tmp_path):
    """`process(study, number)` -> a trial's process as Tune sets it up, whose trainer must not start."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("RAY_ADDRESS", "none")
    monkeypatch.setattr(ray, "get_runtime_context", lambda: SimpleNamespace(gcs_address="none"))

    def train(*_) -> None:
        raise AssertionError("the trainer was started")

    monkeypatch.setattr(trials, "_Training", train)

    def make(study: Study, number: int, **values: float) -> TrialProcess:
        made = TrialProcess.__new__(TrialProcess)
        monkeypatch.setattr(TrialProcess, "trial_name", f"{number:03d}")
        made.setup({"study": str(study.path), "here": str(tmp_path), "number": number, **values})
        return made

    return make


def write_rounds(study: Study, number: int, rounds: int) -> None:
    """A run with evaluations after so many rounds, and the checkpoint of the last, in the newest segment."""
    trial = study.trials[number]
    record = trial.record() or trial.begin(study.space.point(number))
    run = Run.create(trial.config(record.segments[-1]))
    every = run.config.evaluation.every
    first = record.segments[-1].begins.round if record.segments[-1].begins else 0
    rows = [
        {"kind": "evaluation", "step": every * n, "time": 0.0, "bits_per_token": 5.0 - n, "standard_error": 0.02}
        for n in range(first, rounds + 1)
    ]
    run.metrics_file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    run.checkpoints.write(f"step-{every * rounds:08d}-abcdef/{MANIFEST}", b"{}")


@pytest.mark.parametrize("failed", [False, True])
def test_a_trial_killed_between_its_last_checkpoint_and_its_end_is_finished(made, process, failed):
    study = made({})
    write_rounds(study, 0, 3)
    if failed:
        study.trials[0].end("failed", "ended before its last round")
    one = process(study, 0)
    told = [one.step() for _ in range(3)]
    assert [row["round"] for row in told] == [1, 2, 3]
    assert [row["done"] for row in told] == [False, False, True]
    assert study.trials[0].record().ended.how == "finished"


def test_so_is_one_of_a_population(made, process):
    study = made({"scheduler": "pbt"})
    values = study.space.point(1)
    study.trials[1].begin(values)
    study.trials[1].fork(values, Begin(trial=0, round=1, checkpoint="/somewhere/step-00000004-abcdef"))
    write_rounds(study, 1, 3)
    told = process(study, 1, **values).step()
    assert (told["round"], told["done"]) == (3, True)
    assert study.trials[1].record().ended.how == "finished"


def test_a_trial_with_a_round_to_go_trains_on(made, process):
    study = made({})
    write_rounds(study, 0, 2)
    with pytest.raises(AssertionError, match="the trainer was started"):
        process(study, 0).step()
    assert study.trials[0].record().ended is None


def test_a_trial_that_breaks_before_it_has_a_record_has_a_reason(made):
    study = made({})
    broken = Told(config={"number": 1}, get_pickled_error=lambda: None, get_error=lambda: "no such\nfolder")
    Watcher(study, Table(Console())).on_trial_error(0, [], broken)
    record = study.trials[1].record()
    assert record is not None
    assert (record.values, record.ended.how, record.ended.why) == (study.space.point(1), "failed", "folder")
