"""A real run whose first worker is killed, seen from outside: what it says of itself before, meanwhile and after."""

import os
import signal
import socket
import threading
import time
from contextlib import suppress

import httpx
import pytest

from orchestration import progress
from orchestration.events import Events
from orchestration.goodput import Goodput
from orchestration.status import status
from orchestration.train import train
from tests.orchestration.test_prometheus import scrape

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_cluster")]
STEPS, EVERY = 160, 40


def wait_until(condition, seconds: float = 280):
    end = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < end
        time.sleep(0.005)
    return found


def test_figures_survive_a_kill(tiny, monkeypatch):
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    config = tiny(
        f"train.steps={STEPS}", f"checkpoint.every={EVERY}", "train.log_every=20", "train.max_restarts=2",
        "evaluation.every=0", "train.workers=2", "train.peak_tflops=0.001", "tracking.wandb=offline",
        f"tracking.prometheus_port={port}",
    )  # fmt: skip
    folder, seen = config.directory, {}

    def kill_after_a_checkpoint() -> None:
        wait_until((folder / "checkpoints" / "latest.json").exists)
        seen["before"] = scrape(port)
        noted = progress.read(folder)
        assert noted is not None
        os.kill(noted["pid"], signal.SIGKILL)
        time.sleep(0.2)
        seen["step"] = (progress.read(folder) or noted)["step"]
        seen["status"] = status(folder)
        wait_until(restarted)

    def restarted() -> bool:
        with suppress(httpx.TransportError):  # not there yet
            seen["after"] = scrape(port, patience=0)
        return seen.get("after", {}).get("md4_restarts_total") == 1

    watcher = threading.Thread(target=kill_after_a_checkpoint, daemon=True)
    watcher.start()
    run = train(config, report=print).run
    watcher.join(30)
    assert "after" in seen

    group = Events(folder).read("workers")[1]
    lost = seen["step"] - group["step"]
    assert group["lost"] == lost
    assert group["step"] % EVERY == 0
    assert group["step"] > 0
    assert seen["status"].step == seen["step"]
    rows = run.metrics("train")
    assert [row["step"] for row in rows] == list(range(20, STEPS + 1, 20))
    last = rows[-1]
    assert (last["restarts"], last["lost_steps"], last["skipped_steps"]) == (1, lost, 0)
    assert len(last["bits_by_time"]) == 10
    assert 0.2 < last["mask_ratio"] < 0.8
    # 16 rows of 32 tokens through 2 layers of width 32, three times the forward pass: about 110 million operations.
    operations = last["tflops"] * 1e12 * last["seconds_per_step"]
    assert operations == pytest.approx(3 * 16 * 32 * 2 * 34_000, rel=0.5)
    assert last["mfu"] == pytest.approx(last["tflops"] / (2 * 0.001))
    assert 0 <= last["data_wait"] < 1

    noted = progress.read(folder)
    account = Goodput.of(Events(folder).read(), noted)
    assert account is not None
    assert noted is not None
    told = account.at(noted["time"])
    seconds = dict(told["seconds"])
    total = seconds.pop("total")
    assert 0 < told["goodput"] < 1
    assert sum(seconds.values()) == pytest.approx(total, abs=3)  # a second at either end of what is noted each second
    assert status(folder).state == "finished"

    assert seen["before"]["md4_restarts_total"] == 0
    assert seen["before"]["md4_step"] >= EVERY - 20
    assert seen["after"]["md4_restarts_total"] == 1
    assert seen["after"]["md4_lost_steps_total"] == lost
    (name,) = {path.stem.removeprefix("run-") for path in folder.glob("wandb/offline-run-*/run-*.wandb")}
    assert name == (folder / "wandb" / "run-id").read_text().strip()
    assert len(list(folder.glob("wandb/offline-run-*"))) == 2
