"""What is killed in the tests: an addition or a promotion, in a process that ends at a given operation on files."""

import os
import signal
import sys
from pathlib import Path
from typing import Any

from orchestration.registry import Registry, promotion
from pipelines.storage import Folder

_EVENTS = {"os.rename": 1, "os.link": 1, "os.remove": 0, "os.mkdir": 0}  # and which argument says where


def run(operation: str, place: str, source: str, kill_at: int | None) -> None:
    """Do it, and die right before the file operation of that number below `place`."""
    if kill_at is not None:
        _die_at(place, kill_at)
    operations[operation](Registry(place), source)


def add(registry: Registry, source: str) -> None:
    registry.add("small", source, by="ada", say=lambda text: None)


def promote(registry: Registry, source: str) -> None:
    wanted = promotion.Wanted(registry.find("small@2"), "production", by="ada")
    promotion.promote(registry, wanted, Folder(source), say=lambda text: None)


def rollback(registry: Registry, source: str) -> None:
    registry.rollback("small", "production", "bad", version=2, by="ada")


operations = {"add": add, "promote": promote, "rollback": rollback}


def _die_at(place: str, kill_at: int) -> None:
    count = 0

    def watch(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal count
        if event == "open":
            path, _, flags = arguments
            counts = isinstance(flags, int) and bool(flags & os.O_WRONLY)
        else:
            path, counts = arguments[_EVENTS[event]] if event in _EVENTS else None, event in _EVENTS
        if counts and isinstance(path, str | os.PathLike) and Path(path).is_relative_to(place):
            count += 1
            if count == kill_at:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(watch)
