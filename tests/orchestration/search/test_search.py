"""Studies under a real Tune, Train and DeepSpeed."""

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import ray
from rich.console import Console

from md4.errors import UserError
from orchestration import checkpoints
from orchestration.config import load
from orchestration.events import Events
from orchestration.runs import Run
from orchestration.search.run import Plan, on_this_node, run
from orchestration.search.study import Study
from orchestration.search.table import Table
from orchestration.search.trial import METRIC

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_cluster")]
POPULATION = (
    {"optimizer.learning_rate": {"loguniform": [1e-7, 1e-1]}, "model.times.a": {"uniform": [0.4, 1]}},
    {"scheduler": "pbt", "trials": 2, "rounds": 6, "quantile": 0.5, "seed": 3},
)
EVERY = 30  # steps of its rounds


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


@pytest.mark.slow
def test_two_trials_of_three_workers_by_halving_on_four_cpus(planned, capsys):
    """More at a time than fit are asked for: they run one after the other. The second learns nothing, so it is ended
    after its first round: its workers are gone and their CPUs free, long before its last step."""
    every = 300  # steps of a round: many, for the trainer goes on while Tune decides
    plan = planned(
        {"optimizer.learning_rate": [1e-2, 1e-9]},
        {"algorithm": "grid", "scheduler": "asha", "reduction": 2, "concurrent": 4},
        "train.workers=3",
        "train.log_every=20",
        every=every,
    )
    said: list[str] = []
    study = run(plan, False, said.append, quiet())
    assert any("a trial needs 3 CPU for its 3 worker(s)" in line and "1 at a time; 4 were" in line for line in said)

    good, bad = (one.record() for one in study.trials)
    assert (good.ended.how, bad.ended.how, bad.ended.round) == ("finished", "stopped", 1)
    assert [one.tokens for one in study.trials[0].rounds()] == [every * 512, 2 * every * 512, 3 * every * 512]
    assert [one.number for one in study.trials[1].rounds()] == [1]
    stopped = Run(study.path / "trials" / "001")
    assert max(row["step"] for row in stopped.metrics("train")) < 3 * every
    (start,) = stopped.metrics("start")
    wait_for(lambda: not alive(start["pid"]))
    wait_for(lambda: ray.available_resources().get("CPU", 0) == 4)

    shown = capsys.readouterr().out
    assert "trial 000 round 3/3" in shown
    assert "trial 001 stopped: after round 1 of 3, below the cut of its rung" in shown
    report = json.loads((study.path / "report.json").read_text())
    assert [(one["trial"], one["state"]) for one in report["trials"]] == [(0, "finished"), (1, "stopped")]
    assert "| 1 | 000 | finished | 460,800 |" in (study.path / "report.md").read_text()
    winner = load(str(study.path / "winner.yaml"))
    assert (winner.name, winner.optimizer.learning_rate, winner.train.steps) == ("study-winner", 0.01, 3 * every)
    assert winner.checkpoint.keep == 2
    for picture in ("curves.png", "parallel.png"):
        assert (study.path / picture).read_bytes().startswith(b"\x89PNG")

    with pytest.raises(UserError, match="exists already: continue it with --resume"):
        run(plan, False, said.append, quiet())


def test_trials_processes_stay_on_the_node_of_the_search():
    """They work in its folder, and write the study's."""
    asked = on_this_node()
    assert list(asked) == [f"node:{ray.util.get_node_ip_address()}"]
    group = ray.util.placement_group([asked])
    ray.get(group.ready(), timeout=60)
    nodes = ray.util.placement_group_table(group)["bundles_to_node_id"]
    assert list(nodes.values()) == [ray.get_runtime_context().get_node_id()]
    ray.util.remove_placement_group(group)


@pytest.mark.slow
def test_more_trials_than_fit_run_in_turn_and_none_waits_for_ever(planned):
    """Four trials of two workers, all at a time by the settings, on four CPUs."""
    plan = planned(
        {"seed": [1, 2, 3, 4]}, {"algorithm": "grid", "scheduler": "none", "concurrent": 4}, "train.workers=2"
    )
    said: list[str] = []
    study = run(plan, False, said.append, quiet())
    assert any("2 fit, 2 at a time; 4 were asked for" in line for line in said)
    assert [one.record().ended.how for one in study.trials] == ["finished"] * 4
    spans = []
    for number in range(4):
        events = Events(study.path / "trials" / f"{number:03d}").read("driver")
        spans.append((events[0]["time"], events[-1]["time"]))
    for now, _ in spans:
        assert sum(began <= now < ended for began, ended in spans) <= 3  # two, and one that has just ended


def check_forks(study: Study) -> int:
    """All trials finished, and each fork began with its donor's weights; how many forks there are."""
    records = [one.record() for one in study.trials]
    assert [one.ended.how for one in records] == ["finished"] * len(records)
    forks = [(one.number, number, s) for one in records for number, s in enumerate(one.segments[1:], 1)]
    for trial, number, segment in forks:
        donor = checkpoints.read(segment.begins.checkpoint)
        assert segment.begins.trial != trial
        assert donor.step == EVERY * segment.begins.round
        assert 1e-7 <= segment.values["optimizer.learning_rate"] <= 1e-1
        assert 0.4 <= segment.values["model.times.a"] <= 1
        assert segment.values != records[segment.begins.trial].segments[0].values
        fork = Run(study.path / "trials" / segment.run)
        assert fork.config.optimizer.learning_rate == segment.values["optimizer.learning_rate"]
        assert fork.config.train.start_from == segment.begins.checkpoint
        if number == len(records[trial].segments) - 1:
            assert min(row["step"] for row in fork.metrics("train")) == donor.step + 1
            newest = checkpoints.newest(fork.checkpoints, print)
            assert newest.step == 6 * EVERY
            assert newest.manifest["origin"]["weights_hash"] == donor.weights_hash("weights")
    return len(forks)


@pytest.mark.slow
def test_a_population_goes_on_from_its_best_with_other_values(planned):
    plan = planned(*POPULATION, every=EVERY)
    study = run(plan, False, print, quiet())
    assert check_forks(study)
    assert [one.rounds()[-1].number for one in study.trials] == [6, 6]
    assert "## Who went on from whom" in (study.path / "report.md").read_text()
    ray.get(ray.remote(num_cpus=4)(lambda: None).remote(), timeout=60)  # all CPUs are free


@pytest.mark.slow
def test_optuna_proposes_and_remembers_what_was_measured(planned):
    plan = planned(
        {"optimizer.learning_rate": {"loguniform": [1e-6, 1e-1]}, "model.network.layers": {"int": [1, 2]}},
        {"algorithm": "optuna", "scheduler": "asha", "trials": 4, "reduction": 2, "concurrent": 2},
    )
    study = run(plan, False, print, quiet())
    before = [one.record() for one in study.trials]
    assert all(one.ended.how in ("finished", "stopped") for one in before)
    assert len({one.values["optimizer.learning_rate"] for one in before}) == 4
    # As if it had been killed before the second trial had a record, and after others had: each keeps what is its own.
    (study.path / "trials" / "001.json").unlink()
    shutil.rmtree(study.path / "trials" / "001")
    told: list[tuple[int, float]] = []
    table = quiet()
    measured = table.measured
    table.measured = lambda number, result: (told.append((number, result[METRIC])), measured(number, result))
    again = run(plan, True, print, table)
    after = [one.record() for one in again.trials]
    assert [after[n] for n in (0, 2, 3)] == [before[n] for n in (0, 2, 3)]
    assert after[1].ended.how in ("finished", "stopped")
    assert [len(Run(study.path / "trials" / f"{n:03d}").metrics("start")) for n in range(4)] == [1, 1, 1, 1]
    for number in (0, 2, 3):  # what Optuna heard of them again
        assert [bits for one, bits in told if one == number] == [one.bits for one in again.trials[number].rounds()]


def command(plan: Plan, overrides: list[str], folder: Path) -> list[str]:
    return [
        sys.executable, "-m", "orchestration", "search", "pydocs-tiny", "--space", str(folder / "study.yaml"),
        "--name", "study", "--studies", str(folder / "studies"), *overrides,
    ]  # fmt: skip


@pytest.mark.slow
def test_a_killed_search_goes_on_where_its_trials_were(planned, tmp_path, given):
    """SIGKILL of the driver in the middle of the second trial. Nothing of a report is there; then the first trial stays
    as it is, and the second goes on from its checkpoint."""
    overrides = [*given, "train.workers=1"]
    plan = planned(
        {"optimizer.learning_rate": [1e-2, 3e-3]},
        {"algorithm": "grid", "scheduler": "asha", "rounds": 4, "first_rung": 3, "concurrent": 1},
        every=100,
    )
    environment = {key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"}
    with open(tmp_path / "log", "w") as log:
        driver = subprocess.Popen(command(plan, overrides, tmp_path), env=environment, stdout=log, stderr=log)
    second = plan.folder / "trials" / "001"

    def has_checkpoint() -> bool:
        assert driver.poll() is None, (tmp_path / "log").read_text()
        return second.exists() and bool(checkpoints.committed_in(second / "checkpoints"))

    wait_for(has_checkpoint, 240)
    driver.send_signal(signal.SIGKILL)
    driver.wait()
    (pid,) = {row["pid"] for row in Run(second).metrics("start")}
    wait_for(lambda: not alive(pid))
    assert not [one for one in plan.folder.iterdir() if one.name.startswith(("report", "winner", "curves"))]
    study = Study(plan.folder)
    assert study.trials[0].record().ended.how == "finished"
    assert study.trials[1].record().ended is None
    files = [path for path in (plan.folder / "trials" / "000").rglob("*") if path.is_file()]
    first = {path: path.read_bytes() for path in files}

    said: list[str] = []
    study = run(plan, True, said.append, quiet())
    assert {path: path.read_bytes() for path in files} == first
    starts = Events(second).read("workers")
    assert len(starts) == 2
    assert starts[1]["step"] in (100, 200, 300)
    steps = [row["step"] for row in Run(second).metrics("train")]
    assert steps == sorted(set(steps))
    assert study.trials[1].record().ended.how in ("finished", "stopped")
    assert (study.path / "report.md").exists()


@pytest.mark.slow
def test_a_killed_population_goes_on_with_its_forks(planned, tmp_path, given):
    """SIGKILL of the driver while a trial goes on from the other's checkpoint. What was exchanged stays as it was, and
    every round is measured once."""
    plan = planned(*POPULATION, every=EVERY)
    environment = {key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"}
    with open(tmp_path / "log", "w") as log:
        typed = command(plan, [*given, "train.workers=1"], tmp_path)
        driver = subprocess.Popen(typed, env=environment, stdout=log, stderr=log)

    def fork() -> Run | None:
        assert driver.poll() is None, (tmp_path / "log").read_text()
        if not (plan.folder / "study.yaml").exists():
            return None
        records = [one.record() for one in Study(plan.folder).trials]
        forks = [plan.folder / "trials" / one.segments[-1].run for one in records if one and len(one.segments) > 1]
        runs = [Run(folder) for folder in forks if (folder / "config.yaml").exists()]
        return next((run for run in runs if run.metrics("train")), None)

    wait_for(fork, 240)
    driver.send_signal(signal.SIGKILL)
    driver.wait()
    before = [one.record() for one in Study(plan.folder).trials]
    pids = {
        row["pid"]
        for one in before
        for s in one.segments
        for row in Run(plan.folder / "trials" / s.run).metrics("start")
    }
    wait_for(lambda: not any(map(alive, pids)))
    assert not [one for one in plan.folder.iterdir() if one.name.startswith(("report", "winner", "curves"))]
    assert not all(one.ended for one in before)

    study = run(plan, True, print, quiet())
    assert check_forks(study) >= 1
    for old, new in zip(before, (one.record() for one in study.trials), strict=True):
        assert new.segments[: len(old.segments)] == old.segments
    for trial in study.trials:
        assert [one.number for one in trial.rounds()] == list(range(1, 7))
    assert "## Who went on from whom" in (study.path / "report.md").read_text()


@pytest.mark.slow
def test_a_trial_whose_process_dies_fails_gives_back_its_place_and_is_tried_again(planned):
    """Three workers of four CPUs: if the place of the first trial stayed taken, the second would wait for ever."""
    plan = planned(
        {"optimizer.learning_rate": [1e-2, 3e-3]},
        {"algorithm": "grid", "scheduler": "none", "concurrent": 1},
        "train.workers=3",
        every=60,
    )

    def kill() -> None:
        first = plan.folder / "trials" / "000"
        wait_for(lambda: first.exists() and checkpoints.committed_in(first / "checkpoints"), 200)
        os.kill(Events(first).read("driver")[0]["pid"], signal.SIGKILL)

    killer = threading.Thread(target=kill)
    killer.start()
    said: list[str] = []
    study = run(plan, False, said.append, quiet())
    killer.join()
    assert [one.record().ended.how for one in study.trials] == ["failed", "finished"]
    assert any("trial 000 failed: " in line for line in said)
    study = run(plan, True, print, quiet())
    assert [one.record().ended.how for one in study.trials] == ["finished", "finished"]
    assert Events(study.path / "trials" / "000").read("workers")[-1]["step"] >= 60


@pytest.mark.slow
def test_a_trial_that_diverges_fails_with_its_reason_and_the_others_go_on(planned):
    plan = planned(
        {"optimizer.learning_rate": [1e-2, 1e20]}, {"algorithm": "grid", "scheduler": "none"}, "optimizer.warmup=1"
    )
    said: list[str] = []
    study = run(plan, False, said.append, quiet())
    assert [one.record().ended.how for one in study.trials] == ["finished", "failed"]
    assert any(line.startswith("trial 001 failed: ") and "at step" in line for line in said)
    assert "Trial 001 failed: " in (study.path / "report.md").read_text()
