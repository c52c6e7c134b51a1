"""What `md4 status` and `md4 watch` say of runs in every state, from their folders."""

import io
import json
import sys
import threading
import time

import pytest
from rich.console import Console

from orchestration.cli import main
from orchestration.events import Events
from orchestration.progress import Progress
from orchestration.runs import Run
from orchestration.status import lines, status
from orchestration.watch import sparkline, watch
from tests.orchestration.small_run import write_run

SPENT = {"train": 8.0, "data": 1.0, "evaluation": 0.0, "checkpoint": 1.0}


def train_row(step: int, **more) -> dict:
    return {
        "kind": "train", "step": step, "time": time.time(), "bits_per_token": 4.0 - step / 100,
        "bits_by_time": [1.0, None] + 8 * [2.0], "mask_ratio": 0.5, "gradient_norm": 1.25, "seconds_per_step": 0.5,
        "tokens_per_second": 1e4, "tflops": 0.25, "mfu": None, "data_wait": 0.02, **more,
    }  # fmt: skip


@pytest.fixture
def run(tmp_path) -> Run:
    """A run of 800 steps whose workers are at step 30, with a checkpoint of step 7."""
    run = Run(write_run(tmp_path))
    rows = [train_row(10), train_row(20), {"kind": "evaluation", "step": 20, "time": 0.0, "bits_per_token": 3.9}]
    name = "step-00000007-abcdef"
    rows.append({"kind": "checkpoint", "step": 7, "time": time.time() - 90, "path": name})
    run.metrics_file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    events = Events(run.path)
    events.add("driver", did="began", pid=1)
    events.add("state", state="RUNNING")
    events.add("workers", workers=2, step=0, lost=0, lost_seconds=0.0, start_seconds=5.0)
    events.add("workers", workers=3, step=7, lost=4, lost_seconds=2.0, start_seconds=6.0)
    return run


@pytest.fixture
def alive(run):
    progress = Progress(run.path, 30, lambda: {"phase": "pass 1 of step 31", "workers": 3, "spent": SPENT})
    yield progress
    progress.close()


def test_a_running_run(run, alive):
    found = status(run.path)
    assert (found.state, found.why, found.step, found.steps, found.workers) == ("running", None, 30, 800, 3)
    assert found.eta_seconds == 770 * 0.5
    assert (found.loss, found.validation, found.checkpoint_step) == (3.8, 3.9, 7)
    assert found.checkpoint_age == pytest.approx(90, abs=20)
    assert found.account is not None
    assert (found.account["restarts"], found.account["lost_steps"]) == (1, 4)
    assert found.account["seconds"]["start"] == 11.0
    told = dict(lines(found))
    assert told["step"] == "30 of 800 (4%), 6:25 left"
    assert told["by time"].startswith("1.00 - 2.00")
    late = status(run.path, time.time() + 12)
    assert late.state == "running"
    assert "at pass 1 of step 31 for" not in str(late.why)


def test_a_worker_that_stands_still_while_its_process_lives(run, alive):
    alive._moved = time.time() - 33
    alive.close()  # notes it
    assert str(status(run.path).why).startswith("at pass 1 of step 31 for 3")


@pytest.mark.parametrize(
    ("event", "state", "why"),
    [
        ({"kind": "state", "state": "FINISHED"}, "finished", ""),
        ({"kind": "state", "state": "ERRORED"}, "failed", "--resume"),
        (
            {"kind": "stopped", "step": 31, "reason": "the loss is nan [at once]"},
            "stopped",
            "the loss is nan [at once]",
        ),
    ],
)
def test_a_run_that_is_over(run, alive, event, state, why):
    Events(run.path).add(**event)
    if event["kind"] == "stopped":  # Ray was told nothing of it
        Events(run.path).add("state", state="FINISHED")
    found = status(run.path, time.time() + 1000)
    assert (found.state, found.over) == (state, True)
    assert why in str(found.why)
    Events(run.path).add("driver", did="began", pid=2)
    assert not status(run.path).over  # resumed


def test_a_dead_run_says_for_how_long_nothing_has_happened(run, alive):
    alive.close()
    found = status(run.path, time.time() + 300)
    assert found.state == "silent"
    assert "nothing has happened for 5:0" in str(found.why)
    assert found.eta_seconds is None
    assert found.account is not None
    assert found.account["seconds"]["total"] < 60  # the silence is not the run's


def test_workers_that_are_started_again(run, alive):
    alive.close()
    Events(run.path).add("state", state="RESTARTING")
    noted = json.loads((run.path / "progress.json").read_text())
    noted["time"] -= 30
    (run.path / "progress.json").write_text(json.dumps(noted))
    found = status(run.path)
    assert (found.state, found.why) == ("restarting", "the workers are being started (RESTARTING)")


def test_a_run_of_which_nothing_is_known(tmp_path):
    found = status(write_run(tmp_path))
    assert (found.state, found.step, found.account) == ("waiting", 0, None)
    assert lines(found)


def test_the_command(run, alive, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["md4", "status", str(run.path), "--json"])
    main()
    tree = json.loads(capsys.readouterr().out)
    assert (tree["state"], tree["step"], tree["account"]["lost_steps"]) == ("running", 30, 4)
    monkeypatch.setattr(sys, "argv", ["md4", "status", str(run.path)])
    main()
    said = capsys.readouterr().out
    assert "3 worker(s) from step 7, 4 steps lost" in said
    assert "30 of 800" in said


def test_watch_follows_a_run_to_its_end(run, alive):
    """Through a new start of the run: the file of metrics is another one, and shorter."""
    screen = io.StringIO()
    shown = threading.Thread(
        target=watch, args=(run.path, 0.05, Console(file=screen, width=100, force_terminal=True)), daemon=True
    )
    shown.start()

    def wait_for(text: str) -> None:
        end = time.monotonic() + 20
        while text not in screen.getvalue():
            assert time.monotonic() < end, text
            time.sleep(0.02)

    wait_for("30 of 800")
    shorter = run.path / "new"
    shorter.write_text(json.dumps(train_row(10)) + "\n")
    shorter.rename(run.metrics_file)
    alive.finished(12)
    alive._note()
    wait_for("12 of 800")
    Events(run.path).add("state", state="FINISHED")
    shown.join(20)
    assert not shown.is_alive()
    assert "finished" in screen.getvalue()


def test_a_sparkline():
    assert sparkline([], 10) == ""
    assert sparkline([1.0, 1.0], 10) == "▁▁"
    assert sparkline([0, 7, 0, 7], 2) == "▁▁"
    assert sparkline(list(range(80)), 8) == "▁▂▃▄▅▆▇█"
