"""How much of a run's time went into training that was not lost, and where the rest went.

Known from two things: the first worker's clock, whose seconds by cause are kept in checkpoints and noted every second
(`orchestration.progress`), and the events. When a group of workers starts, it compares what the group before it had
come to with the checkpoint that it begins from: the difference is lost. Its event `workers` says so:

    lost          steps that the group before it had made and that are made again
    lost_seconds  the time that they, and what was done beside them, had taken
    start_seconds from the last sign of life of the group before to this one's first step
    away_seconds  of these, while no `md4 train` was running at all: that time is not counted
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from orchestration.clock import CAUSES


@dataclass
class Goodput:
    """The account of a run, in seconds."""

    began: float  # since 1970
    restarts: int = 0  # groups of workers after the first
    lost_steps: int = 0
    lost: float = 0.0
    start: float = 0.0
    away: float = 0.0
    spent: dict[str, float] = field(default_factory=lambda: dict.fromkeys(CAUSES, 0.0))

    @classmethod
    def of(cls, events: Sequence[Mapping[str, Any]], progress: Mapping[str, Any] | None) -> "Goodput | None":
        """From the events of a run and its progress; None before its first workers are there."""
        groups = [event for event in events if event["kind"] == "workers"]
        if not groups:
            return None
        found = cls(began=events[0]["time"], restarts=len(groups) - 1)
        for group in groups:
            found.lost_steps += group.get("lost", 0)
            found.lost += group.get("lost_seconds", 0.0)
            found.start += group.get("start_seconds", 0.0)
            found.away += group.get("away_seconds", 0.0)
        if progress is not None:
            found.spent = dict(progress["spent"])
        return found

    def at(self, now: float, spent: Mapping[str, float] | None = None) -> dict[str, Any]:
        """The account at a time (s since 1970): total, seconds by cause, and the share that was productive."""
        spent = self.spent if spent is None else spent
        total = max(1e-9, now - self.began - self.away)
        return {
            "goodput": min(1.0, spent["train"] / total),
            "restarts": self.restarts,
            "lost_steps": self.lost_steps,
            "seconds": {"total": total, **spent, "lost": self.lost, "start": self.start},
        }


def handover(
    events: Sequence[Mapping[str, Any]],
    before: Mapping[str, Any] | None,
    step: int,
    spent: Mapping[str, float],
    now: float,
) -> dict[str, float]:
    """What the event `workers` says of a group that starts at `step` with the seconds `spent` by what it goes on with.

    before: the progress of the group before it; None: there was none.
    """
    if before is None:
        began = events[0]["time"] if events else now
        return {"lost": 0, "lost_seconds": 0.0, "start_seconds": now - began, "away_seconds": 0.0}
    away = 0.0
    last = before["time"]  # sign of life before the newest `md4 train`
    for event in events:
        if event["kind"] == "driver" and event["did"] == "began" and event["time"] > last:
            away = event["time"] - last
        last = max(last, event["time"])
    return {
        "lost": max(0, before["step"] - step),
        "lost_seconds": max(0.0, sum(before["spent"].values()) - sum(spent.values())),
        "start_seconds": max(0.0, now - before["time"] - away),
        "away_seconds": away,
    }
