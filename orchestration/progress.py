"""Where a run is now, for whoever looks, and for the next worker if this one is killed.

`progress.json` in the run's folder is written about once a second by a thread of the first worker, so that it is a sign
of life, too. The number of the last finished step is also in `.step`, 8 bytes mapped into memory: noting it costs
nothing, and it outlives the process, whatever killed that.
"""

import json
import mmap
import os
import socket
import struct
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from pipelines.storage import Folder, Place

_EVERY = 1.0  # seconds
_FILE, _STEP = "progress.json", ".step"
_NUMBER = struct.Struct("<q")


def read(place: Place) -> dict[str, Any] | None:
    """The progress last noted of the run in a folder; None when there is none.

    `step`, `phase`, `moved` (when the last step was finished), `time` (of the note), `workers`, `pid`, `host`, `spent`
    (seconds by cause, see `orchestration.clock`).
    """
    folder = Folder(place)
    try:
        found = json.loads(folder.read(_FILE))
    except (OSError, ValueError):
        return None
    if not folder.remote:  # there the file is some seconds old, and the number not at hand
        with suppress(OSError, struct.error):
            found["step"] = max(found["step"], _NUMBER.unpack(folder.read(_STEP))[0])
    return found


class Progress:
    """Notes the progress of the first worker, at once and then from a thread until `close`.

    facts: gives what is to be noted beside step and time; called in that thread.
    """

    def __init__(self, folder: str | Path, step: int, facts: Callable[[], dict[str, Any]]):
        self._folder, self._facts = Path(folder), facts
        self._step, self._moved = step, time.time()
        self._fixed = {"pid": os.getpid(), "host": socket.gethostname()}
        self._number: mmap.mmap | None = None
        with suppress(OSError, ValueError):  # a file system that maps nothing: then a second is not known exactly
            path = self._folder / _STEP
            path.write_bytes(_NUMBER.pack(step))
            with path.open("r+b") as file:
                self._number = mmap.mmap(file.fileno(), _NUMBER.size)
        self._note()
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._keep_noting, name="progress", daemon=True)
        self._thread.start()

    def finished(self, step: int) -> None:
        """A step was finished."""
        self._step, self._moved = step, time.time()
        if self._number is not None:
            _NUMBER.pack_into(self._number, 0, step)

    def close(self) -> None:
        """Note the last state, and no more."""
        self._done.set()
        self._thread.join()
        self._note()

    def _keep_noting(self) -> None:
        while not self._done.wait(_EVERY):
            with suppress(OSError):  # a full disk, for instance: the run does not depend on it
                self._note()

    def _note(self) -> None:
        now = {"step": self._step, "time": time.time(), "moved": self._moved, **self._fixed, **self._facts()}
        temporary = self._folder / f".{_FILE}"
        temporary.write_text(json.dumps(now) + "\n", encoding="utf-8")
        os.replace(temporary, self._folder / _FILE)
