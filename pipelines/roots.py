"""Where a source lies: a file or a folder, on this machine or in S3, and the files in it.

Links are followed as long as they stay in the folder; one that leads out of it is refused. (The cache of the Hugging
Face hub links from a snapshot to the blobs beside it: there, the folder is that of the whole repository.)
"""

import io
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from md4.errors import UserError
from pipelines.storage import Folder

_READ_BYTES = 2**22  # of one request to S3
_URL = re.compile(r"^[A-Za-z][A-Za-z0-9+.-]*://")


@dataclass(frozen=True)
class File:
    """A file of a source."""

    place: str  # absolute path, or url
    name: str  # path below the source's root, the same wherever the source lies
    size: int  # bytes
    stamp: int  # when it was written, in ns: tells that it may have changed


class Root:
    """A file or a folder that may or may not exist. What there is, is asked anew by every call."""

    def __init__(self, path: str):
        """UserError for a url of a kind that cannot be read."""
        self.remote = bool(_URL.match(path))
        self.url = Folder(path).url if self.remote else os.path.normpath(os.path.abspath(os.path.expanduser(path)))

    def __str__(self) -> str:
        return self.url

    @property
    def name(self) -> str:
        """The last part of the path."""
        return self.url.rpartition("/")[2]

    def label(self, otherwise: str) -> str:
        """A short name, good for a folder."""
        return re.sub(r"[^A-Za-z0-9._]+", "-", Path(self.name).stem).strip("-.") or otherwise

    def entries(self, what: str = "a file or a folder") -> tuple[list[File], bool]:
        """Every file, sorted by name, and whether this is a folder. UserError if there is nothing of that name."""
        if self.remote:
            return self._remote_entries(what)
        if os.path.isdir(self.url):
            return self._walk(), True
        if not os.path.lexists(self.url):
            raise UserError(f"data.path={self.url!r} does not exist; it must be {what}")
        return [local_file(self.url, self.name)], False

    def files(self, suffixes: tuple[str, ...], what: str, packed: tuple[str, ...] = ()) -> list[File]:
        """The file, whatever its name, or those of the folder that end in one of `suffixes` (small letters).

        Or in one of these with an end of `packed` behind it. UserError if there are none; `what` names them.
        """
        found, folder = self.entries(f"a file or a folder of {what}")
        if not folder:
            return found
        ends = suffixes + tuple(end + more for end in suffixes for more in packed)
        found = [file for file in found if file.name.lower().endswith(ends)]
        if not found:
            known = ", ".join(suffixes) + (f", or these with {' or '.join(packed)}" if packed else "")
            raise UserError(f"no {what} in {self.url!r}: a folder must hold files ending in {known}")
        return found

    def _remote_entries(self, what: str) -> tuple[list[File], bool]:
        folder = Folder(self.url)
        found = folder.list()
        if found:
            return [
                File(folder.path(name), name, entry.size, int(entry.written * 1e9)) for name, entry in found.items()
            ], True
        parent, _, name = self.url.rpartition("/")
        try:
            entry = Folder(parent).entry(name)
        except (FileNotFoundError, UserError) as error:
            if isinstance(error, UserError) and parent != "s3:/":
                raise
            raise UserError(f"data.path={self.url!r} does not exist; it must be {what}") from error
        return [File(self.url, name, entry.size, int(entry.written * 1e9))], False

    def _walk(self) -> list[File]:
        def refuse(error: OSError) -> None:
            raise UserError(f"cannot read the folder {error.filename!r}: {error.strerror}") from error

        inside = _boundary(self.url)
        found = []
        for folder, _, names in os.walk(self.url, onerror=refuse):
            for name in names:
                path = os.path.join(folder, name)
                if os.path.islink(path) and not os.path.realpath(path).startswith(inside):
                    raise UserError(f"{path!r} is a link that leads out of {self.url!r}: it is not followed")
                found.append((os.path.relpath(path, self.url).replace(os.sep, "/"), path))
        return [local_file(path, name) for name, path in sorted(found)]


def _boundary(root: str) -> str:
    """The folder that links in `root` may not leave, with a slash at its end."""
    real = os.path.realpath(root)
    head, found, _ = (real + "/").rpartition("/snapshots/")
    return (head if found and os.path.isdir(head + "/blobs") else real) + "/"


def local_file(path: str | Path, name: str) -> File:
    """A file on this machine; UserError if it cannot be looked at."""
    try:
        facts = os.stat(path)
    except OSError as error:
        raise UserError(f"cannot read {str(path)!r}: {error.strerror}") from error
    return File(str(path), name, facts.st_size, facts.st_mtime_ns)


@contextmanager
def opened(place: str) -> Iterator[BinaryIO]:
    """A file of a source, to be read at any place; what goes wrong with it becomes a UserError that names it."""
    try:
        folder, name = _folder(place)
        file = folder.open(name)
        if folder.remote:  # much at once: what is read next lies mostly behind what was read
            assert isinstance(file, io.BufferedReader)
            file = io.BufferedReader(file.detach(), _READ_BYTES)
        with file:
            yield file
    except OSError as error:
        raise UserError(f"cannot read {place!r}: {error.strerror or error}") from error


def _folder(place: str) -> tuple[Folder, str]:
    parent, slash, name = place.rpartition("/")
    return Folder(parent or slash or "."), name
