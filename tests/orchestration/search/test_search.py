"""Studies under a real Tune, Train and DeepSpeed."""

import json
import os
import time

import pytest
import ray
from rich.console import Console

from md4.errors import UserError
from orchestration.config import load
from orchestration.runs import Run
from orchestration.search.run import run
from orchestration.search.study import Study
from orchestration.search.table import Table

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_cluster")]


def quiet() -> Table:
    return Table(Console(width=200, force_terminal=False))


def wait_for(condition, seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.05)


def alive(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_two_trials_of_three_workers_by_halving_on_four_cpus(planned, capsys):
    """More at a time than fit are asked for: they run one after the other. The second learns nothing, so it is ended
    after its first round: its workers are gone and their CPUs free, long before its last step."""
    plan = planned(
        {"optimizer.learning_rate": [1e-2, 1e-9]},
        {"algorithm": "grid", "scheduler": "asha", "reduction": 2, "concurrent": 4},
        "train.workers=3",
        every=60,
    )
    said: list[str] = []
    study = run(plan, False, said.append, quiet())
    assert any("a trial needs 3 CPU for its 3 worker(s)" in line and "1 at a time; 4 were" in line for line in said)

    good, bad = (one.record() for one in study.trials)
    assert (good.ended.how, bad.ended.how, bad.ended.round) == ("finished", "stopped", 1)
    assert [one.tokens for one in study.trials[0].rounds()] == [60 * 512, 120 * 512, 180 * 512]
    assert [one.number for one in study.trials[1].rounds()] == [1]
    stopped = Run(study.path / "trials" / "001")
    assert max(row["step"] for row in stopped.metrics("train")) < 180
    (start,) = stopped.metrics("start")
    wait_for(lambda: not alive(start["pid"]))
    wait_for(lambda: ray.available_resources().get("CPU", 0) == 4)

    shown = capsys.readouterr().out
    assert "trial 000 round 3/3" in shown
    assert "trial 001 stopped: after round 1 of 3, below the cut of its rung" in shown
    report = json.loads((study.path / "report.json").read_text())
    assert [(one["trial"], one["state"]) for one in report["trials"]] == [(0, "finished"), (1, "stopped")]
    assert "| 1 | 000 | finished | 92,160 |" in (study.path / "report.md").read_text()
    winner = load(str(study.path / "winner.yaml"))
    assert (winner.name, winner.optimizer.learning_rate, winner.train.steps) == ("study-winner", 0.01, 180)
    assert winner.checkpoint.keep == 2
    for picture in ("curves.png", "parallel.png"):
        assert (study.path / picture).read_bytes().startswith(b"\x89PNG")

    with pytest.raises(UserError, match="exists already: continue it with --resume"):
        run(plan, False, said.append, quiet())
