"""One layer for folders on this machine and in S3: what a prepared set is written to and read from.

A `Folder` is opened from a path or an `s3://bucket/prefix` url, and names what is in it by paths below it. Files appear
completely or not at all. Requests to S3 are tried again while their failure may pass (`pipelines.s3`).

FileNotFoundError says that a file is missing. What else is wrong with S3 (no such bucket, no credentials, access
denied, an endpoint that does not answer) comes as a UserError that names the url; local failures stay OSError.
"""

import fcntl
import io
import os
import random
import re
import shutil
import uuid
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

import pyarrow.fs

from md4.errors import UserError

if TYPE_CHECKING:
    from pipelines.s3 import Bucket

COALESCE_BYTES = 2**17  # ranges this near to each other are read as one: a request costs more than such a gap
_SCHEME = re.compile(r"^[A-Za-z][A-Za-z0-9+.-]*:/")


@dataclass(frozen=True)
class Retries:
    """How often a request is made, and how long is waited in between: up to `first * 2**n` seconds, drawn evenly."""

    attempts: int = 10
    first: float = 0.25
    longest: float = 20.0
    timeout: float = 60.0  # seconds without a byte after which a request counts as failed

    def wait(self, failures: int) -> float:
        """Seconds to wait after so many failures. Random, so that many clients do not come back all at once."""
        return random.uniform(0, min(self.longest, self.first * 2 ** (failures - 1)))


RETRIES = Retries()  # of folders that are opened from now on


def write_atomically(file: Path, data: bytes) -> None:
    """A file on this machine that exists completely or not at all, whenever the process or the machine dies."""
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = file.with_name(f"{file.name}.{uuid.uuid4().hex}.tmp")
    try:
        with open(temporary, "wb") as out:
            out.write(data)
            out.flush()
            os.fsync(out.fileno())
        os.replace(temporary, file)
        sync_folder(file.parent)
    finally:
        temporary.unlink(missing_ok=True)


def sync_folder(folder: Path) -> None:
    """Force the names in a folder to the disk."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """One process at a time, of those that ask for it with the same folder."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


@dataclass(frozen=True)
class Entry:
    """A file in a folder."""

    size: int  # bytes
    written: float  # s since 1970


class Folder:
    """A folder that may or may not exist yet. Cheap to make and to pickle: nothing is asked before a file is."""

    def __init__(self, place: "Place", retries: Retries | None = None):
        """UserError for a url that is not one of S3."""
        text = str(place)
        self.remote = bool(_SCHEME.match(text))
        self.url = text.rstrip("/") if self.remote else str(Path(text))
        if retries is None:
            retries = place._retries if isinstance(place, Folder) else RETRIES
        self._retries = retries
        if self.remote:
            found = re.fullmatch(r"s3://([^/]+)((?:/[^/]+)*)", self.url)
            if found is None:
                raise UserError(f"{text!r} is neither a local path nor a url of the form s3://bucket/prefix")
            self._bucket, self._prefix = found[1], found[2].lstrip("/")

    def __str__(self) -> str:
        return self.url

    def __repr__(self) -> str:
        return f"Folder({self.url!r})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Folder) and (self.url, self._retries) == (other.url, other._retries)

    def __hash__(self) -> int:
        return hash(self.url)

    def __truediv__(self, below: str) -> "Folder":
        return Folder(self.path(below), self._retries)

    @property
    def name(self) -> str:
        """The last part of the path."""
        return self.url.rpartition("/")[2]

    def path(self, file: str) -> str:
        """The path or url of a file in the folder."""
        return f"{self.url}/{file}" if self.remote else os.path.join(self.url, file)

    def absolute(self) -> "Folder":
        """The same folder, for a process with another working directory."""
        return self if self.remote else Folder(os.path.abspath(self.url))

    def read(self, file: str) -> bytes:
        """All bytes of a file."""
        if self.remote:
            return self._s3().get(self._key(file))
        with open(self.path(file), "rb") as opened:
            return opened.read()

    def read_ranges(self, file: str, spans: list[tuple[int, int]]) -> list[bytes]:
        """The bytes `start..stop-1` of each span; in S3 by one request for each, made at the same time."""
        if self.remote:
            return self._s3().ranges(self._key(file), spans)
        parts = []
        with open(self.path(file), "rb") as opened:
            for start, stop in spans:
                opened.seek(start)
                parts.append(opened.read(stop - start))
                if len(parts[-1]) < stop - start:
                    raise OSError(f"{self.path(file)!r} ends before byte {stop}")
        return parts

    def open(self, file: str) -> BinaryIO:
        """A file to be read at any place. In S3 every read is a request: read much at once."""
        if not self.remote:
            return open(self.path(file), "rb")
        return io.BufferedReader(_Remote(self, file, self.size(file)), 2**16)

    def write(self, file: str, data: bytes) -> None:
        """Write a file, which others see completely or not at all. What S3 got is read back and compared."""
        if self.remote:
            self._s3().put(self._key(file), data)
        else:
            write_atomically(Path(self.path(file)), data)

    def create(self, file: str, data: bytes) -> None:
        """Write a file that is not there yet; FileExistsError if there is one with other bytes."""
        if self.remote:
            if not self._s3().put_if(self._key(file), data, None) and self.read(file) != data:
                raise FileExistsError(f"{self.path(file)} exists already")
            return
        target = Path(self.path(file))
        temporary = target.with_name(f".{target.name}.{uuid.uuid4().hex}.tmp")
        write_atomically(temporary, data)
        try:
            os.link(temporary, target)  # unlike a renaming, fails where something is
        except FileExistsError:
            if target.read_bytes() != data:
                raise
        finally:
            temporary.unlink()
        sync_folder(target.parent)

    def update(self, file: str, change: Callable[[bytes | None], bytes | None]) -> None:
        """Replace a small file by `change(its bytes, or None)`, unless that is None, with nobody's change between."""
        if not self.remote:
            target = Path(self.path(file))
            target.parent.mkdir(parents=True, exist_ok=True)
            with alone(target.parent):
                new = change(target.read_bytes() if target.exists() else None)
                if new is not None:
                    write_atomically(target, new)
            return
        while True:
            found = self._s3().tagged(self._key(file))
            new = change(found and found[0])
            if new is None or self._s3().put_if(self._key(file), new, found and found[1]):
                return

    def size(self, file: str) -> int:
        """Bytes of a file."""
        return self._s3().size(self._key(file)) if self.remote else os.stat(self.path(file)).st_size

    def entry(self, file: str) -> Entry:
        """Size and time of writing of a file."""
        if self.remote:
            return Entry(*self._s3().facts(self._key(file)))
        facts = os.stat(self.path(file))
        return Entry(facts.st_size, facts.st_mtime)

    def exists(self, file: str) -> bool:
        """Is there such a file?"""
        if not self.remote:
            return os.path.isfile(self.path(file))
        try:
            self.size(file)
        except FileNotFoundError:
            return False
        return True

    def list(self, below: str = "") -> dict[str, Entry]:
        """Every file in the folder, or in a folder below it, by path below this one, sorted. Empty if there is none."""
        if self.remote:
            cut = len(self._prefix) + 1 if self._prefix else 0
            found = self._s3().find(self._key(below) + "/" if self._key(below) else "")
            return {key[cut:]: Entry(*facts) for key, facts in sorted(found.items())}
        entries = {}
        for folder, _, names in os.walk(self.path(below)):
            for name in names:
                full = os.path.join(folder, name)
                try:
                    facts = os.stat(full)
                except FileNotFoundError:  # somebody's temporary file
                    continue
                entries[os.path.relpath(full, self.url)] = Entry(facts.st_size, facts.st_mtime)
        return dict(sorted(entries.items()))

    def remove(self, file: str) -> None:
        """Delete a file, if it is there."""
        if self.remote:
            self._s3().remove(self._key(file))
        else:
            Path(self.path(file)).unlink(missing_ok=True)

    def remove_all(self) -> None:
        """Delete the folder with everything in it, if it is there."""
        if not self.remote:
            shutil.rmtree(self.url, ignore_errors=True)
            return
        for file in self.list():
            self.remove(file)

    def arrow(self) -> tuple[pyarrow.fs.FileSystem, str]:
        """What pyarrow and Ray Data read the folder with: a file system, and the folder's path in it."""
        if not self.remote:
            return pyarrow.fs.LocalFileSystem(), os.path.abspath(self.url)
        from pipelines.s3 import arrow_files

        files = arrow_files(self._retries)
        return pyarrow.fs.PyFileSystem(pyarrow.fs.FSSpecHandler(files)), f"{self._bucket}/{self._prefix}".rstrip("/")

    def _key(self, file: str) -> str:
        return "/".join(part for part in (self._prefix, file) if part)

    def _s3(self) -> "Bucket":
        # Imported where it is needed: the client of AWS takes most of a second.
        from pipelines.s3 import Bucket

        return Bucket(self._bucket, self._retries)


Place = str | Path | Folder


def location(place: str) -> Path | Folder:
    """A path of this machine as such, and a url as a Folder."""
    return Folder(place) if _SCHEME.match(place) else Path(place)


def local(folder: Folder) -> Path:
    """The path of a folder of this machine; UserError for one in S3, which has none."""
    if folder.remote:
        raise UserError(f"{folder} is in S3, and a folder of this machine is needed here")
    return Path(folder.url)


def coalesced(spans: Iterable[tuple[int, int]], gap: int = COALESCE_BYTES) -> list[tuple[int, int]]:
    """Spans `start..stop-1` that cover the given ones: sorted, and joined where at most `gap` bytes lie between."""
    joined: list[tuple[int, int]] = []
    for start, stop in sorted(spans):
        if joined and start - joined[-1][1] <= gap:
            joined[-1] = joined[-1][0], max(joined[-1][1], stop)
        else:
            joined.append((start, stop))
    return joined


class Pieces(io.RawIOBase):
    """Some spans of a file, already read, as that file: reading anything else of it is an error."""

    def __init__(self, size: int, spans: list[tuple[int, int]], parts: list[bytes]):
        self._size, self._place = size, 0
        self._parts = list(zip(spans, map(memoryview, parts), strict=True))

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._place

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self._place = offset + {os.SEEK_SET: 0, os.SEEK_CUR: self._place, os.SEEK_END: self._size}[whence]
        return self._place

    def readinto(self, buffer) -> int:  # type: ignore[no-untyped-def]
        wanted = min(len(buffer), self._size - self._place)
        data = self._bytes(self._place, self._place + max(0, wanted))
        buffer[: len(data)] = data
        self._place += len(data)
        return len(data)

    def _bytes(self, start: int, stop: int) -> "bytes | memoryview":
        for (first, last), data in self._parts:
            if first <= start and stop <= last:
                return data[start - first : stop - first]
        raise OSError(f"bytes {start} to {stop} were not read")


class _Remote(Pieces):
    """A file in S3."""

    def __init__(self, folder: Folder, file: str, size: int):
        super().__init__(size, [], [])
        self._folder, self._file = folder, file

    def _bytes(self, start: int, stop: int) -> bytes:
        return self._folder.read_ranges(self._file, [(start, stop)])[0]
