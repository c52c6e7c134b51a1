"""What the sources of documents and of images have in common: a source lists its *units*, one task reads a unit.

Listing is cheap and its order is fixed; reading a unit needs nothing but the unit and the settings of the whole set. A
prepared set is therefore the same however many tasks read it.
"""

import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from md4.errors import UserError


@dataclass(frozen=True)
class Unit:
    """A part of a source that is read in one go: the bytes `start..stop-1` of a file.

    Bytes are those of the content where a file is compressed as a whole, and exclude the header of an idx file. A
    reader may move them to borders that its format has: words, for instance.
    """

    kind: str  # the source's name
    file: str  # absolute path
    name: str  # path below the source's root, the same wherever the source lies
    start: int
    stop: int
    stamp: int  # the file's modification time in ns: tells that it may have changed
    split: str | None = None  # where the source itself says which split this belongs to

    @property
    def size(self) -> int:
        return self.stop - self.start


@dataclass(frozen=True)
class Source:
    """A named collection of documents or of images.

    `identity` tells it from others of its kind, `label` is short and good for a folder's name.
    """

    kind: str
    label: str
    identity: str
    list_units: Callable[[int], list[Unit]]  # given the bytes above which a file is read in pieces
    class_names: Callable[[], list[str] | None] = lambda: None  # of labelled images, where the source knows them


def label_of(root: Path, otherwise: str) -> str:
    """A short name for a source that lies at `root`."""
    return re.sub(r"[^A-Za-z0-9._]+", "-", root.stem).strip("-.") or otherwise


def status(file: Path) -> os.stat_result:
    """Size and modification time of a file; UserError if it cannot be looked at."""
    try:
        return file.stat()
    except OSError as error:
        raise UserError(f"cannot read {str(file)!r}: {error.strerror}") from error


def pieces(
    kind: str, name: str, file: Path, piece: int, size: int | None = None, split: str | None = None
) -> Iterator[Unit]:
    """Units of `piece` bytes that cover `size` bytes of a file, by default all; none for an empty one."""
    facts = status(file)
    size = facts.st_size if size is None else size
    for start in range(0, size, piece):
        yield Unit(kind, str(file), name, start, min(start + piece, size), facts.st_mtime_ns, split)


def walk(root: Path, suffixes: tuple[str, ...]) -> list[tuple[str, Path]]:
    """Every file below a folder with one of the `suffixes` (small letters), as (path below it, path), sorted."""

    def refuse(error: OSError) -> None:
        raise UserError(f"cannot read the folder {error.filename!r}: {error.strerror}") from error

    found = []
    for folder, _, names in os.walk(root, onerror=refuse):
        for name in names:
            if name.lower().endswith(suffixes):
                file = Path(folder, name)
                found.append((file.relative_to(root).as_posix(), file))
    return sorted(found)
