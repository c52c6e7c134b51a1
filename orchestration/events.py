"""What happened to a run, and when: `events.jsonl` in its folder, appended to by whoever saw it.

Metrics are cut back when a run goes back to a checkpoint; events are not. Each is a line of JSON with `kind`, `time` (s
since 1970) and what belongs to the kind:

    driver    did = began, ended    md4 train, with its process
    origin    the checkpoint of another run that this one begins from
    state     of Ray Train's controller: SCHEDULING, RUNNING, RESTARTING, RESIZING, PREEMPTING, FINISHED, ERRORED
    placed    Ray has a place for a group of workers: the placement group
    workers   a group of workers is about to make its first step: how many, from which step, the processes by rank,
              and what was lost with the group before it (`orchestration.goodput`)
    failure   why a group ended, by worker; how many restarts without progress are spent of those allowed; the decision
    damaged   a checkpoint can't be used, and why; the one before is
    hang      the group stood still: for how long, where, and which workers did not come
    preempted, resize   why the workers left their work, after a checkpoint
    spike     a step was skipped, or the run stopped at it, and why
    suite     did = began, done, failed, passed over, with the step of the checkpoint: a suite beside the training
    stopped   the run ended itself, since going on made no sense, and why
    behind    the run's folder in S3 lacks what was written since: how long, and why (`orchestration.run_mirror`)

Of a run in S3 a thread of each process appends them, by compare-and-swap, as nothing can be appended to there.
"""

import json
import os
import threading
import time
from functools import lru_cache
from typing import Any

from md4.errors import UserError
from pipelines.storage import Folder, Place

_FILE = "events.jsonl"
_PAUSE = 5.0  # s before S3 is tried again, after all attempts of `pipelines.s3`


class Events:
    """The events of the run in a folder, which exists.

    patience: of a run in S3, how many seconds `add` waits for the event to arrive. One that has not yet, because S3
        does not answer, is tried further, in its turn.
    """

    def __init__(self, place: Place, patience: float = 5.0):
        self._folder, self._patience = Folder(place), patience

    def add(self, kind: str, **facts: Any) -> None:
        """Append one. A line is written at once, so that several processes can."""
        line = (json.dumps({"kind": kind, "time": time.time(), **facts}) + "\n").encode()
        if self._folder.remote:
            _appender(self._folder).add(line)
            if self._patience:
                self.flush(self._patience)
            return
        handle = os.open(self._folder.path(_FILE), os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        try:
            os.write(handle, line)
        finally:
            os.close(handle)

    def flush(self, seconds: float) -> bool:
        """Wait, so long at most, until all that this process added has arrived; says whether it has."""
        return not self._folder.remote or _appender(self._folder).flush(seconds)

    def read(self, kind: str | None = None) -> list[dict[str, Any]]:
        """All of them, or those of one kind, in the order in which they were written. A torn line is passed over."""
        try:
            lines = self._folder.read(_FILE)
        except FileNotFoundError:
            return []
        found = []
        for line in lines.splitlines():
            try:
                found.append(json.loads(line))
            except ValueError:
                continue
        return [one for one in found if kind is None or one["kind"] == kind]


class _Appender:
    """Appends this process's lines to the file of one run in S3, from a thread that ends when there are none."""

    def __init__(self, folder: Folder):
        self._folder = folder
        self._lines: list[bytes] = []  # that have not arrived, in their order
        self._changed = threading.Condition()
        self._works = False

    def add(self, line: bytes) -> None:
        with self._changed:
            self._lines.append(line)
            if not self._works:
                self._works = True
                threading.Thread(target=self._work, name="events", daemon=True).start()

    def flush(self, seconds: float) -> bool:
        with self._changed:
            return self._changed.wait_for(lambda: not self._lines, seconds)

    def _work(self) -> None:
        while True:
            with self._changed:
                lines = list(self._lines)
                if not lines:
                    self._works = False
                    return
            try:
                self._folder.update(_FILE, lambda old, lines=lines: _with(old or b"", lines))
            except (OSError, UserError):
                time.sleep(_PAUSE)
                continue
            with self._changed:
                del self._lines[: len(lines)]
                self._changed.notify_all()


@lru_cache
def _appender(folder: Folder) -> _Appender:
    return _Appender(folder)


def _with(old: bytes, lines: list[bytes]) -> bytes:
    """The file with lines that it does not have yet: an attempt whose answer was lost may have put them there."""
    there = set(old.splitlines(keepends=True))
    return old + b"".join(line for line in lines if line not in there)
