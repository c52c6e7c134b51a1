"""What the readers of all formats share: the image that they give, files opened, and splits told by names."""

import gzip
import io
import re
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from md4.errors import UserError
from pipelines.units import walk

NO_LABEL = -1  # in a labelled set, an image that has none
SPLIT_NAMES = {
    "train": "train", "training": "train", "test": "test", "testing": "test", "t10k": "test",
    "val": "validation", "valid": "validation", "validation": "validation",
}  # fmt: skip


IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm")
FILE_BYTES = 2**26  # of the file of one image: larger ones are not read


class Rejected(Exception):
    """One image that cannot be used: why, in general and in particular."""

    def __init__(self, reason: str, detail: str):
        super().__init__(detail)
        self.reason = reason


@dataclass(frozen=True)
class Record:
    """An image as a source gives it: file contents, or pixels uint8 [H, W, C], or why there are none."""

    name: str  # for messages
    image: bytes | np.ndarray | Rejected
    label: int | None


@contextmanager
def opened(name: str) -> Iterator[gzip.GzipFile | io.BufferedReader]:
    """A file, decompressed if it ends in .gz; what goes wrong with it becomes a UserError that names it."""
    try:
        with gzip.open(name) if name.endswith("ubyte.gz") else open(name, "rb") as file:
            yield file
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise UserError(f"{name!r} is damaged: {error}") from error
    except OSError as error:
        raise UserError(f"cannot read {name!r}: {error.strerror or error}") from error


def checked(size: int) -> Rejected | None:
    """Why the file of an image, of `size` bytes, is not read; None if it is small enough."""
    if size <= FILE_BYTES:
        return None
    return Rejected("too large", f"its file has {size:,} bytes; at most {FILE_BYTES:,} are read")


def files_below(root: Path, suffixes: tuple[str, ...], what: str) -> list[tuple[str, Path, str | None]]:
    """The file `root`, or those below it, as (name, path, the split that it belongs to)."""
    if not root.is_dir():
        return [(root.name, root, None)]
    found = [(name, file, split_in_name(name)) for name, file in walk(root, suffixes)]
    if not found:
        raise UserError(f"no {what} in {str(root)!r}: a folder must hold files ending in {' or '.join(suffixes)}")
    return found


def split_in_name(name: str) -> str | None:
    """The split that a file's path tells, in its last part that has a word for one: train-00.tar, val/00.parquet."""
    for part in reversed(name.split("/")):
        for word in re.split(r"[-_.]", part.lower()):
            if word in SPLIT_NAMES:
                return SPLIT_NAMES[word]
    return None
