"""`md4 train` as a process of its own, on a cluster of several nodes (`tests.nodes`)."""

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from md4.errors import UserError
from orchestration.config import Config
from orchestration.events import Events
from orchestration.runs import Run
from tests.nodes import ROOT

Found = TypeVar("Found")


def wait_for(what: Callable[[], Found | None], seconds: float, why: str) -> Found:
    """The first true answer of `what`; TimeoutError when there is none in time."""
    end = time.monotonic() + seconds
    while not (found := what()):
        if time.monotonic() > end:
            raise TimeoutError(f"{why}: not within {seconds:.0f} s")
        time.sleep(0.02)
    return found


class Driver:
    """`md4 train CONFIG` in a process of its own, on the cluster at `address`.

    home: where its settings and what it says go, and its temporary files; by default the former are beside the run's
        folder.
    """

    def __init__(self, config: Config, address: str, *options: str, home: Path | None = None):
        self.config = config
        self.events = Events(config.place)
        environment = os.environ | {"RAY_ADDRESS": address, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"}
        if home is None:
            home = config.directory.parent
        else:
            environment["TMPDIR"] = str(home)
        home.mkdir(parents=True, exist_ok=True)
        settings, self._log = home / f"{config.name}.yaml", home / f"{config.name}.log"
        settings.write_text(config.to_yaml(), encoding="utf-8")
        with self._log.open("a") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "orchestration", "train", str(settings), *options],
                env=environment, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT,
            )  # fmt: skip

    @property
    def said(self) -> str:
        """What it printed, all attempts of this run together."""
        return self._log.read_text("utf-8")

    def rows(self, kind: str | None = None) -> list[dict[str, Any]]:
        """The run's metrics so far."""
        try:
            return Run(self.config.place).metrics(kind)
        except (UserError, ValueError):  # not there yet, being written
            return []

    def step(self) -> int:
        """The last step that was finished, as the metrics tell (train.log_every=1)."""
        return max((row["step"] for row in self.rows("train")), default=0)

    def wait_for_step(self, step: int, seconds: float = 240) -> None:
        wait_for(lambda: self._alive() and self.step() >= step, seconds, f"step {step}; {self.said[-2000:]}")

    def wait_for_event(self, kind: str, seconds: float = 240, **facts: Any) -> dict[str, Any]:
        """The first event of that kind with those facts."""

        def look() -> dict[str, Any] | None:
            self._alive()
            found = self.events.read(kind)
            return next((one for one in found if facts.items() <= one.items()), None)

        return wait_for(look, seconds, f"event {kind} {facts}; {self.said[-2000:]}")

    def workers(self) -> list[int]:
        """Process ids of the newest group of workers, by rank."""
        return self.events.read("workers")[-1]["pids"]

    def finish(self, seconds: float = 400) -> Run:
        """Wait for the run's end, which must be a good one."""
        code = self.process.wait(seconds)
        assert code == 0, self.said
        return Run(self.config.place)

    def stop(self) -> None:
        """End the process at once, as a lost machine does."""
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()

    def _alive(self) -> bool:
        assert self.process.poll() in (None, 0), self.said
        return True
