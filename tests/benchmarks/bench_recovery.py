"""How long a run stands still after a loss: kill of a worker, kill of a node, and what is left of the time at a kill a
minute.

    python -m tests.benchmarks.bench_recovery [KILLS] [MINUTES]

The demo's network on 2 workers, each on a node of its own (`tests.nodes`). Recovery is the time from the SIGKILL to
the end of the next step, of a group that has trained for half a minute: it has spare processes by then. Goals, median
of 5: worker <= 15 s, node <= 35 s. The first kill of each kind is one sooner than that, told apart. Goodput is the
share of wall time, from the first step on, that went into steps whose work was kept, a worker being killed every
minute.
"""

import json
import os
import signal
import statistics
import sys
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from orchestration.config import Config, load
from tests.benchmarks.harness import RESULTS, machine
from tests.nodes import Nodes, nodes
from tests.orchestration.driver import Driver, wait_for

SETTLED = 30.0  # s of training after which spare processes are there
PRESET, GOALS = "pydocs-tiny", {"worker": 15.0, "node": 35.0}
SETTINGS = [
    "train.steps=1000000", "train.workers=1..2", "train.log_every=1", "train.max_restarts=9", "checkpoint.every=0",
    "checkpoint.seconds=5", "evaluation.every=0", "tracking.tensorboard=false", "optimizer.schedule=constant",
]  # fmt: skip


def settings(folder: Path, name: str, *overrides: str) -> Config:
    own = [f"name={name}", f"runs={folder}/runs", f"data.directory={folder}/data"]
    return load(PRESET, [*own, *SETTINGS, *overrides])


def ready(driver: Driver, workers: int, after: float, settled: float = SETTLED) -> None:
    """Wait until that many workers, started after a time, have trained for so many seconds and have a checkpoint."""

    def since() -> bool:
        groups = driver.events.read("workers")
        if not groups or groups[-1]["workers"] != workers or groups[-1]["time"] < after:
            return False
        return any(row["time"] > groups[-1]["time"] for row in driver.rows("checkpoint"))

    wait_for(since, 240, f"{workers} workers with a checkpoint")
    time.sleep(max(0.0, driver.rows("start")[-1]["time"] + settled - time.time()))


def next_step(driver: Driver, after: float) -> float:
    """Seconds from a time to the end of the next step of a group that was started since."""

    def found() -> list[float]:
        groups = [one["time"] for one in driver.events.read("workers") if one["time"] > after]
        return [row["time"] for row in driver.rows("train") if groups and row["time"] > groups[0]]

    return wait_for(found, 240, "the next step")[0] - after


def recoveries(cluster: Nodes, folder: Path, kills: int) -> dict[str, list[float]]:
    """Seconds of each recovery, by what was killed."""
    figures: dict[str, list[float]] = {"worker": [], "node": [], "worker at once": [], "node at once": []}
    driver, began = Driver(settings(folder, "recovery"), cluster.address), time.time()
    plan = [(what, number) for what in GOALS for number in range(kills + 1)]
    try:
        for what, number in plan:
            ready(driver, 2, began, SETTLED if number else 0.0)
            began, victim = time.time(), driver.workers()[number % 2]
            os.kill(victim, signal.SIGKILL) if what == "worker" else cluster.kill_node_of(victim)
            kind = what if number else f"{what} at once"
            figures[kind].append(next_step(driver, began))
            print(f"{kind} kill: {figures[kind][-1]:.1f} s", file=sys.stderr, flush=True)
            cluster.ensure(2)
    finally:
        driver.stop()
    return figures


def goodput(cluster: Nodes, folder: Path, minutes: int) -> dict[str, Any]:
    """Of a run in which a worker dies every minute."""
    driver = Driver(settings(folder, "goodput"), cluster.address)
    try:
        driver.wait_for_step(1)
        began = time.time()
        for minute in range(minutes):
            time.sleep(max(0.0, began + 60 * minute + 30 - time.time()))
            os.kill(driver.workers()[minute % 2], signal.SIGKILL)
        time.sleep(max(0.0, began + 60 * minutes - time.time()))
    finally:
        driver.stop()
    rows = [row for row in driver.rows("train") if row["time"] > began]
    lost = sum(one["lost"] for one in driver.events.read("workers"))
    useful = sum(row["seconds_per_step"] for row in rows)
    return {"minutes": minutes, "kills": minutes, "goodput": useful / (60 * minutes), "lost_steps": lost}


def main() -> None:
    kills = int(sys.argv[1]) if len(sys.argv) > 1 else 5
    minutes = int(sys.argv[2]) if len(sys.argv) > 2 else 3
    with tempfile.TemporaryDirectory() as folder, nodes(2) as cluster:
        figures = recoveries(cluster, Path(folder), kills)
        share = goodput(cluster, Path(folder), minutes) if minutes else None
    result = {
        "benchmark": "recovery",
        "measured": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": "python -m tests.benchmarks.bench_recovery",
        "machine": machine(),
        "seconds": figures,
        "median": {what: statistics.median(times) for what, times in figures.items() if times},
        "goal": GOALS,
        "goodput": share,
    }
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "recovery.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    for what, times in figures.items():
        told = ", ".join(f"{seconds:.1f}" for seconds in times)
        goal = f" (goal {GOALS[what]:.0f} s)" if what in GOALS else ""
        print(f"{what} kill to next step: median {statistics.median(times):.1f} s of {told}{goal}")
    if share:
        print(
            f"goodput at a kill a minute: {share['goodput']:.2f} over {minutes} min, {share['lost_steps']} steps lost"
        )


if __name__ == "__main__":
    main()
