"""What happened to a run, and when: `events.jsonl` in its folder, appended to by whoever saw it.

Metrics are cut back when a run goes back to a checkpoint; events are not. Each is a line of JSON with `kind`, `time` (s
since 1970) and what belongs to the kind:

    driver    did = began, ended    md4 train, with its process
    state     of Ray Train's controller: SCHEDULING, RUNNING, RESTARTING, RESIZING, PREEMPTING, FINISHED, ERRORED
    workers   a group of workers is about to make its first step: how many, from which step, the processes by rank,
              and what was lost with the group before it (`orchestration.goodput`)
    failure   why a group ended, by worker; how many restarts without progress are spent of those allowed; the decision
    damaged   a checkpoint can't be used, and why; the one before is
    hang      the group stood still: for how long, where, and which workers did not come
    preempted, resize   why the workers left their work, after a checkpoint
    spike     a step was skipped, or the run stopped at it, and why
    suite     did = began, done, failed, passed over, with the step of the checkpoint: a suite beside the training
    stopped   the run ended itself, since going on made no sense, and why
"""

import json
import os
import time
from pathlib import Path
from typing import Any


class Events:
    """The events of the run in a folder, which exists."""

    def __init__(self, folder: str | Path):
        self.file = Path(folder) / "events.jsonl"

    def add(self, kind: str, **facts: Any) -> None:
        """Append one. A line is written at once, so that several processes can."""
        line = json.dumps({"kind": kind, "time": time.time(), **facts}) + "\n"
        handle = os.open(self.file, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        try:
            os.write(handle, line.encode())
        finally:
            os.close(handle)

    def read(self, kind: str | None = None) -> list[dict[str, Any]]:
        """All of them, or those of one kind, in the order in which they were written. A torn line is passed over."""
        if not self.file.exists():
            return []
        found = []
        for line in self.file.read_text(encoding="utf-8").splitlines():
            try:
                found.append(json.loads(line))
            except ValueError:
                continue
        return [one for one in found if kind is None or one["kind"] == kind]
