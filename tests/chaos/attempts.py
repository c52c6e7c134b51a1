"""A run that is disturbed: `md4 train` in a process of its own, watched through the files that it writes."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from orchestration.config import load
from orchestration.events import Events
from orchestration.runs import Run
from tests.nodes import ROOT, Nodes, signal_all

NAME = "tiny"  # of every run; each case has a folder for its own
_POLL_SECONDS = 0.05


class Trouble(Exception):
    """Something did not happen, or not as it should: the case has failed."""


@dataclass
class Recovery:
    """From a kill to the next finished step."""

    killed: float  # s since 1970
    finished: int  # steps, when it came
    begun: int | None = None  # the step from which it went on
    seconds: float | None = None

    @property
    def lost(self) -> int:
        """Steps that were finished and had to be made again."""
        return self.finished - (self.finished if self.begun is None else self.begun)


@dataclass
class Attempts:
    """All attempts of one run: several, if its driver ends and is started again."""

    nodes: Nodes
    settings: Sequence[str]
    folder: Path  # of this run's own
    patience: float  # s for whatever is waited for
    recoveries: list[Recovery] = field(default_factory=list)
    told: dict[str, tuple[int, float]] = field(default_factory=dict)  # checkpoints it told of: folder -> step, when
    damaged: set[str] = field(default_factory=set)  # those of them that we damaged
    driver: subprocess.Popen[bytes] | None = None

    def __post_init__(self) -> None:
        self.config = load("pydocs-tiny", self.settings)
        self.path = self.config.directory
        self.output = self.folder / "output.txt"
        self._rows: list[dict[str, Any]] = []
        self._read_at: tuple[int, int, int] | None = None

    # -- begin and end --

    def start(self, *changes: str, resume: bool = False) -> None:
        """`md4 train`, or the same with --resume."""
        command = [sys.executable, "-m", "orchestration", "train", "pydocs-tiny", *self.settings, *changes]
        with self.output.open("ab") as output:
            self.driver = subprocess.Popen(
                [*command, *(["--resume"] if resume else [])],
                cwd=ROOT,
                env={**os.environ, "RAY_ADDRESS": self.nodes.address},
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def finish(self) -> None:
        """Wait until the driver has ended well."""
        if status := self.end():
            raise Trouble(f"the driver ended with status {status}")

    def end(self) -> int:
        """Wait until the driver has ended; its exit status."""
        self._until(lambda: self._driver_status() is not None, "the end of the driver", driver=False)
        return self._driver_status() or 0

    def kill_driver(self) -> None:
        """SIGKILL to the driver; its workers are ended by Ray."""
        assert self.driver is not None
        self._note_kill()
        self.driver.kill()
        self.driver.wait()

    def close(self) -> None:
        """End what is still there."""
        if self.driver is not None and self.driver.poll() is None:
            self.driver.kill()
            self.driver.wait()

    # -- states --

    def reach(self, step: int) -> None:
        """Wait until `step` is finished, by the attempt that goes on now."""
        self._until(lambda: self.step >= step, f"step {step}")

    def wait(self, condition: Callable[[], Any], what: str) -> None:
        """Wait until something is so; Trouble if the driver ends before."""
        self._until(condition, what)

    @property
    def step(self) -> int:
        """The last finished step."""
        return max((row["step"] for row in self.metrics("train")), default=0)

    def metrics(self, kind: str) -> list[dict[str, Any]]:
        """Rows of that kind; on the way, those of checkpoints are noted for good, for a restart cuts them off."""
        file = self.path / "metrics.jsonl"
        if not file.exists():
            return []
        stat = file.stat()
        if (state := (stat.st_ino, stat.st_size, stat.st_mtime_ns)) != self._read_at:  # asked for twenty times a second
            self._rows, self._read_at = Run(self.path).metrics(), state
            self.told |= {row["path"]: (row["step"], row["time"]) for row in self._rows if row["kind"] == "checkpoint"}
        return [row for row in self._rows if row["kind"] == kind]

    def events(self, kind: str) -> list[dict[str, Any]]:
        return Events(self.path).read(kind)

    def said(self) -> str:
        """What the driver printed."""
        return self.output.read_text(encoding="utf-8", errors="replace") if self.output.exists() else ""

    # -- victims --

    @property
    def leader(self) -> int:
        """The process of the first worker."""
        return self.metrics("start")[-1]["pid"]

    @property
    def other(self) -> int:
        """That of another one."""
        leader = self.leader
        return next(pid for pid in self.nodes.workers() if pid != leader)

    def kill(self, *processes: int) -> None:
        """SIGKILL, all at once."""
        self._note_kill(lambda: signal_all(processes, signal.SIGKILL))

    def kill_node_of(self, worker: int) -> None:
        """The whole node, and a new one in its place."""
        self._note_kill(lambda: self.nodes.kill_node_of(worker))

    def stop(self, *processes: int) -> None:
        """SIGSTOP: they are there, and do nothing."""
        signal_all(processes, signal.SIGSTOP)

    def note_stop(self) -> None:
        """From here on time counts as that of a recovery."""
        self._note_kill()

    def recovered(self, begun: int | None = None) -> Recovery:
        """Wait until a step is finished after the last kill; Trouble unless the attempt begins from step `begun`."""
        recovery = self.recoveries[-1]
        before = len([one for one in self.events("workers") if one["time"] <= recovery.killed])
        self._until(lambda: len(self.events("workers")) > before, "a new group of workers")
        group = self.events("workers")[before]
        recovery.begun = group["step"]
        told = [(step, name) for name, (step, when) in self.told.items() if when < group["time"]]
        newest = max((step for step, name in told if name not in self.damaged), default=0)
        if group["step"] < newest:
            raise Trouble(f"the checkpoint of step {newest} was told of, but the run went on from {group['step']}")
        if begun is not None and group["step"] != begun:
            raise Trouble(f"the run went on from step {group['step']}, not {begun}")

        def first_step() -> bool:
            later = [row["time"] for row in self.metrics("train") if row["time"] > group["time"]]
            if later:
                recovery.seconds = min(later) - recovery.killed
            return bool(later)

        self._until(first_step, "a step after the restart")
        return recovery

    def _note_kill(self, kill: Callable[[], None] = lambda: None) -> None:
        finished, now = self.step, time.time()
        kill()
        finished = max(finished, self.step)  # what was told until the victim was dead counts as told
        self.recoveries.append(Recovery(now, finished))

    def _driver_status(self) -> int | None:
        return None if self.driver is None else self.driver.poll()

    def _until(self, condition: Callable[[], Any], what: str, driver: bool = True) -> None:
        end = time.monotonic() + self.patience
        while not condition():
            self.metrics("checkpoint")
            if driver and (status := self._driver_status()) is not None and not condition():
                raise Trouble(f"the driver ended with status {status} before {what}")
            if time.monotonic() > end:
                raise Trouble(f"{what} did not come within {self.patience:.0f} s")
            time.sleep(_POLL_SECONDS)
