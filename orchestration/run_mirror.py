"""How files that are written on this machine come into the folder of a run in S3.

Nothing can be appended to or mapped in S3. So the first worker writes what grows (metrics, progress, TensorBoard, W&B)
and what it draws (reports) into a folder of its machine, and a thread brings every file that has changed to the run's
folder, again and again: `Mirror`. A file arrives complete, of JSON lines up to the last whole line. S3 has the truth:
a worker that starts, on whatever machine, begins with what is there, and a checkpoint is not committed before the
metrics up to it are there. Whoever writes a few files at once and is done uses `deliver`.

A run on this machine is its own folder: nothing is copied.
"""

import hashlib
import os
import shutil
import socket
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from md4.errors import Failed
from orchestration.events import Events
from orchestration.runs import METRICS
from pipelines.row_cache import private_folder
from pipelines.storage import Folder, Place, write_atomically

_BEGUN_WITH = (METRICS, "wandb/run-id")  # what a worker that starts goes on with
_EVERY = 2.0  # s between two looks for files that have changed
_SHARE = 20  # a file is left alone so many times as long as it took to send: long ones go more rarely
_BEHIND = 60.0  # s without success after which it is told
_CLOSING = 180.0  # s for the last look: longer than all attempts of `pipelines.s3` take

_Stamp = tuple[int, int, int]  # of a file: changes with its content


class Mirror:
    """The folder on this machine that the first worker of a run writes to. One in S3 follows it until `close`.

    folder: where to write. Of a run on this machine it is the run's own, and nothing else happens.
    """

    def __init__(self, place: Folder, events: Events):
        self._place, self._events = place, events
        self._thread: threading.Thread | None = None
        if not place.remote:
            self.folder = Path(place.url)
            return
        # One for each run, made anew: what a killed worker left in it is not what S3 has.
        name = f"{place.name}-{hashlib.sha256(place.url.encode()).hexdigest()[:12]}"
        self.folder = private_folder("runs") / name
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir(parents=True)
        self._sent: dict[str, _Stamp] = {}
        self._rests: dict[str, float] = {}  # until when a file is left alone
        self._one = threading.Lock()  # sends at a time
        for file in _BEGUN_WITH:
            self._fetch(file)
        self._done = threading.Event()
        self.told = False  # that S3 is behind
        self._trouble: str | None = None  # with the last look
        self._thread = threading.Thread(target=self._follow, name="mirror", daemon=True)
        self._thread.start()

    def push(self, file: str) -> None:
        """Bring a file to S3, now. From any thread; OSError or UserError if that fails."""
        if self._thread is not None:
            self._send(file)

    def close(self, seconds: float = _CLOSING) -> None:
        """Bring everything to S3, and follow no more; Failed if it does not come there within so many seconds."""
        if self._thread is None:
            return
        self._done.set()
        self._thread.join(seconds)
        trouble = f"it took more than {seconds:g} s" if self._thread.is_alive() else self._trouble
        if trouble is not None:
            raise Failed(
                f"the folder of the run {self._place} lacks what was written last: {trouble}; "
                f"{socket.gethostname()} has it in {self.folder}"
            )

    def _fetch(self, file: str) -> None:
        try:
            write_atomically(self.folder / file, self._place.read(file))
        except FileNotFoundError:
            return
        self._sent[file] = _stamp(self.folder / file)

    def _follow(self) -> None:
        fresh = time.monotonic()
        while not self._done.wait(_EVERY):
            if (trouble := self._look()) is None:
                fresh, self.told = time.monotonic(), False
            elif not self.told and (late := time.monotonic() - fresh) > _BEHIND:
                self.told = True
                self._events.add("behind", seconds=round(late), why=trouble)
                print(f"the folder of the run {self._place} is {late:.0f} s behind: {trouble}", flush=True)
        self._trouble = self._look(last=True)

    def _look(self, last: bool = False) -> str | None:
        """Send what has changed; gives why that did not work, if it did not."""
        try:
            for file in _files(self.folder):
                if last or time.monotonic() >= self._rests.get(file, 0.0):
                    self._send(file)
        except Exception as error:  # whatever it is: the training goes on, and the next look may succeed
            return str(error) or type(error).__name__
        return None

    def _send(self, file: str) -> None:
        with self._one:
            began = time.monotonic()
            try:
                stamp = _stamp(self.folder / file)
                if self._sent.get(file) == stamp:
                    return
                content = (self.folder / file).read_bytes()
            except FileNotFoundError:
                return
            if file.endswith(".jsonl"):
                content = content[: content.rfind(b"\n") + 1]
            self._place.write(file, content)
            self._sent[file] = stamp
            now = time.monotonic()
            self._rests[file] = now + _SHARE * (now - began)


def deliver(place: Place, below: str, write: Callable[[Path], Iterable[Path]]) -> list[str]:
    """Have `write` put files into a folder, which is `below` in that of a run; gives their paths or urls there."""
    run = Folder(place)
    if not run.remote:
        return [str(file) for file in write(Path(run.url) / below)]
    with tempfile.TemporaryDirectory() as temporary:
        files = list(write(Path(temporary)))
        for file in files:
            (run / below).write(file.name, file.read_bytes())
        return [(run / below).path(file.name) for file in files]


def _files(folder: Path) -> Iterator[str]:
    """What is to be seen in S3: no links, and nothing that is being written (`.NAME`, `NAME.tmp`)."""
    for path, folders, names in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(names):
            full = Path(path) / name
            if not (name.startswith(".") or name.endswith(".tmp") or full.is_symlink()):
                yield str(full.relative_to(folder))


def _stamp(file: Path) -> _Stamp:
    facts = file.stat()
    return facts.st_ino, facts.st_size, facts.st_mtime_ns
