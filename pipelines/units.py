"""What the sources of documents and of images have in common: a source lists its *units*, one task reads a unit.

Listing is cheap and its order is fixed; reading a unit needs nothing but the unit and the settings of the whole set. A
prepared set is therefore the same however many tasks read it.
"""

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from pipelines.roots import File

SPLIT_NAMES = {
    "train": "train", "training": "train", "test": "test", "testing": "test", "t10k": "test", "heldout": "test",
    "val": "validation", "valid": "validation", "validation": "validation", "dev": "validation",
}  # fmt: skip


@dataclass(frozen=True)
class Unit:
    """A part of a source that is read in one go: the bytes `start..stop-1` of a file.

    Bytes are those of the content where a file of images is compressed as a whole, and exclude headers of arrays. A
    reader may move them to borders that its format has: words or lines, for instance.
    """

    kind: str  # the format
    file: str  # absolute path, or s3:// url
    name: str  # path below the source's root, the same wherever the source lies
    start: int
    stop: int
    stamp: int  # the file's modification time in ns: tells that it may have changed
    split: str | None = None  # where the source itself says which split this belongs to

    @property
    def size(self) -> int:
        return self.stop - self.start


Report = Callable[[str], None]


@dataclass(frozen=True)
class Source:
    """A named collection of documents or of images.

    `identity` tells it from others of its kind, `label` is short and good for a folder's name. What has to be fetched
    first is said by `missing` (None: nothing), which asks no network, and done by `fetch`; until then `list_units`
    raises UserError.
    """

    kind: str
    label: str
    identity: str
    list_units: Callable[[int], list[Unit]]  # given the bytes above which a file is read in pieces
    class_names: Callable[[], list[str] | None] = lambda: None  # of labelled images, where the source knows them
    missing: Callable[[], str | None] = lambda: None
    fetch: Callable[[Report], None] = lambda report: None


def pieces(kind: str, file: File, piece: int, size: int | None = None, split: str | None = None) -> Iterator[Unit]:
    """Units of `piece` bytes that cover `size` bytes of a file, by default all; none for an empty one."""
    size = file.size if size is None else size
    for start in range(0, size, piece):
        yield Unit(kind, file.place, file.name, start, min(start + piece, size), file.stamp, split)


def split_in_name(name: str) -> str | None:
    """The split that a file's path tells, in its last part that has a word for one: train-00.tar, val/00.parquet."""
    for part in reversed(name.split("/")):
        for word in re.split(r"[-_.]", part.lower()):
            if word in SPLIT_NAMES:
                return SPLIT_NAMES[word]
    return None
