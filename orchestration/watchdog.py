"""Notices that a group of workers stands still, says whom it waits for, and ends the worker so that Ray starts anew.

A worker that hangs in a collective, or is stopped, raises nothing: the others wait with it, often for half an hour,
and Ray sees processes that live. So a thread of each worker tells the others, through the store that the process group
already has, how many places of the training loop it has come by, and its last one. All workers come by the same places
in the same order: who stands still while nobody else gets further is behind if its number is the smallest.
"""

import json
import os
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta

import torch.distributed as dist
from torch.distributed import TCPStore  # type: ignore[attr-defined]

EXIT_CODE = 75  # of a worker that ended itself: "temporary failure" of sysexits.h
_BEAT_SECONDS = 1.0
_CLOSING_SECONDS = 5.0  # a store that no longer answers is not waited for
_FIRST_PATIENCE = 10  # times as much before the first step is made: memory is found, files are read


@dataclass
class _Seen:
    """Of one worker: what it told last, and when that was new (by this process's clock)."""

    count: int = 0
    place: str = "the start"
    beat: int = -1
    moved: float = 0.0
    lived: float = 0.0


class Watchdog:
    """Watches from its making until `close`.

    patience: seconds without progress of any worker, after which the group is given up; 0 = never.
    tell: is told why, before this process ends.
    """

    def __init__(self, patience: float, tell: Callable[[str], None]):
        self._patience, self._tell = patience, tell
        self._rank, self._world = dist.get_rank(), dist.get_world_size()
        self._count, self._place, self._stepped = 0, "the start", False
        self._moved = time.monotonic()
        self._done = threading.Event()
        self._threads: list[threading.Thread] = []
        if patience and self._world > 1:
            # A connection of its own: that of the process group may be waiting for something.
            self._store = TCPStore(
                os.environ["MASTER_ADDR"],
                int(os.environ["MASTER_PORT"]),
                is_master=False,
                wait_for_workers=False,
                timeout=timedelta(seconds=max(1.0, patience / 4)),
            )
            now = time.monotonic()
            self._seen = {rank: _Seen(moved=now, lived=now) for rank in range(self._world)}
            self._answered = now
            self._threads = [
                threading.Thread(target=task, name="watchdog", daemon=True) for task in (self._talk, self._watch)
            ]
            for thread in self._threads:
                thread.start()

    def at(self, place: str, step: int) -> None:
        """The worker has come to this place of the loop. Cheap; called by the thread that trains."""
        self._moved = time.monotonic()
        self._place = f"{place} of step {step}"
        self._count += 1

    @property
    def place(self) -> str:
        """Where the worker is in its loop."""
        return self._place

    def stepped(self) -> None:
        """A step was made: from now on standing still is not a slow start."""
        self._moved = time.monotonic()
        self._stepped = True

    def close(self) -> None:
        """Watch no longer. The threads end first: one that Python's end finds inside the store aborts the process."""
        self._done.set()
        for thread in self._threads:
            thread.join(_CLOSING_SECONDS)

    def _talk(self) -> None:
        """Tell and hear. Waits without end for a store whose process is stopped: hence a thread of its own."""
        beat = 0
        while not self._done.wait(_BEAT_SECONDS):
            beat += 1
            with suppress(RuntimeError):  # torch's, of a store that does not answer
                self._store.set(_key(self._rank), json.dumps([self._count, self._place, beat]))
                for rank in range(self._world):
                    if self._store.check([_key(rank)]):
                        self._note(rank, *json.loads(self._store.get(_key(rank))))
                self._answered = time.monotonic()

    def _watch(self) -> None:
        while not self._done.wait(_BEAT_SECONDS):
            if reason := self._stuck():
                self._tell(reason)
                os._exit(EXIT_CODE)  # the thread that trains cannot be reached

    def _note(self, rank: int, count: int, place: str, beat: int) -> None:
        seen, now = self._seen[rank], time.monotonic()
        if count != seen.count:
            seen.moved = now
        if beat != seen.beat:
            seen.lived = now
        seen.count, seen.place, seen.beat = count, place, beat

    def _stuck(self) -> str | None:
        """Why the group is to be given up, if it is."""
        now = time.monotonic()
        patience = self._patience * (1 if self._stepped else _FIRST_PATIENCE)
        if now - self._answered > patience:
            return f"worker 0 has not answered for {now - self._answered:.0f} s; this worker is at {self._place}"
        # Of itself it need not hear: a slow first step is over, and patience short, before the others tell so.
        still = now - max(self._moved, *(seen.moved for seen in self._seen.values()))
        if still <= patience:
            return None
        last = min(seen.count for seen in self._seen.values())
        behind = [rank for rank, seen in self._seen.items() if seen.count == last]
        if len(behind) == self._world:
            return f"all {self._world} workers have been at {self._place} for {still:.0f} s"
        told = []
        for rank in behind:
            seen = self._seen[rank]
            silent = self._answered - seen.lived  # when the store is gone, nobody is heard of
            alive = f", and its process is silent for {silent:.0f} s" if silent > patience / 2 else ""
            told.append(f"worker {rank} stays at {seen.place}{alive}")
        ahead = max(self._seen.values(), key=lambda seen: seen.count)
        return f"no progress for {still:.0f} s: {'; '.join(told)}; the others wait at {ahead.place}"


def _key(rank: int) -> str:
    return f"md4/watchdog/{rank}"
