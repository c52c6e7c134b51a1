"""What the readers of all formats share: the image that they give, files opened, and splits told by names."""

import gzip
import io
import re
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np

from md4.errors import UserError

NO_LABEL = -1  # in a labelled set, an image that has none
SPLIT_NAMES = {
    "train": "train", "training": "train", "test": "test", "testing": "test", "t10k": "test",
    "val": "validation", "valid": "validation", "validation": "validation",
}  # fmt: skip


@dataclass(frozen=True)
class Record:
    """An image as a source gives it: file contents, or pixels uint8 [H, W, C]."""

    name: str  # for messages
    image: bytes | np.ndarray
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


def split_in_name(name: str) -> str | None:
    """The split that a file's path tells, in its last part that has a word for one: train-00.tar, val/00.parquet."""
    for part in reversed(name.split("/")):
        for word in re.split(r"[-_.]", part.lower()):
            if word in SPLIT_NAMES:
                return SPLIT_NAMES[word]
    return None
