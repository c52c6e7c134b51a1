"""What the readers of all formats share: the image that they give, and files opened."""

import gzip
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import BinaryIO

import numpy as np

from md4.errors import UserError
from pipelines.archives import FILE_BYTES
from pipelines.roots import File, Root
from pipelines.roots import opened as opened_raw
from pipelines.units import split_in_name

NO_LABEL = -1  # in a labelled set, an image that has none
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm")


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
def opened(name: str) -> Iterator[BinaryIO]:
    """A file, decompressed if it is one of idx that ends in .gz; what goes wrong becomes a UserError that names it."""
    with opened_raw(name) as file:
        try:
            yield gzip.GzipFile(fileobj=file) if name.endswith("ubyte.gz") else file  # type: ignore[misc]
        except (EOFError, gzip.BadGzipFile, zlib.error) as error:
            raise UserError(f"{name!r} is damaged: {error}") from error


def checked(size: int) -> Rejected | None:
    """Why the file of an image, of `size` bytes, is not read; None if it is small enough."""
    if size <= FILE_BYTES:
        return None
    return Rejected("too large", f"its file has {size:,} bytes; at most {FILE_BYTES:,} are read")


def files_below(root: Root, suffixes: tuple[str, ...], what: str) -> list[tuple[File, str | None]]:
    """The file `root`, or those below it, each with the split that it belongs to; UserError if there are none."""
    found, folder = root.entries("a folder or a file")
    if not folder:
        return [(file, None) for file in found]
    found = [file for file in found if file.name.lower().endswith(suffixes)]
    if not found:
        raise UserError(f"no {what} in {str(root)!r}: a folder must hold files ending in {' or '.join(suffixes)}")
    return [(file, split_in_name(file.name)) for file in found]
