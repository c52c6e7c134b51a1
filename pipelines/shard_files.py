"""One file of a prepared set, parquet or tar: written, read by row groups, compared with what its manifest says of it.

A reader notices damage when it comes to it: the manifest has a hash of each file's footer, and the footer has a
checksum of each row group. In S3 the footer is read once, and of the rest nothing but the bytes of the row groups that
are wanted. What is in the file itself is said by `pipelines.parquet_shards` and `pipelines.tar_shards`.
"""

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from threading import Lock
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa

from md4.errors import UserError
from pipelines import parquet_shards
from pipelines.manifest import Shard
from pipelines.parquet_shards import LABEL_DTYPE, ParquetContent
from pipelines.storage import Folder, Pieces, Place, coalesced

if TYPE_CHECKING:
    from pipelines.tar_shards import Pictures

SUFFIXES = {"parquet": ".parquet", "webdataset": ".tar"}  # of a shard's file, by `data.format`
_FOOTER_BYTES = 2**16  # read at once from the end of a file: most footers are shorter


def write_shard(
    root: Place,
    path: str,
    tokens: np.ndarray,
    rows_per_group: int,
    labels: np.ndarray | None = None,
    pictures: "Pictures | None" = None,
) -> Shard:
    """Write rows of tokens `[n, L]`, and labels `[n]` if there are any, to `root/path`, completely or not at all.

    A path that ends in .tar needs `pictures`, which say how a row is seen. The same rows give the same bytes.
    """
    tokens = np.ascontiguousarray(tokens)
    labels = np.empty(0, LABEL_DTYPE) if labels is None else np.ascontiguousarray(labels, LABEL_DTYPE)
    if _is_tar(path):
        from pipelines import tar_shards

        assert pictures is not None
        stem = path.rpartition("/")[2].removesuffix(tar_shards.SUFFIX)
        data = tar_shards.pack(tokens, labels, rows_per_group, pictures, stem)
        footer = data[-tar_shards.footer_size(data[-_FOOTER_BYTES:]) :]
    else:
        data = parquet_shards.pack(tokens, labels, rows_per_group)
        footer = data[-parquet_shards.footer_size(data[-_FOOTER_BYTES:]) :]
    Folder(root).write(path, data)
    return Shard(
        path=path,
        rows=len(tokens),
        bytes=len(data),
        sha256=hashlib.sha256(data).hexdigest(),
        footer=hashlib.sha256(footer).hexdigest(),
        content=hashlib.sha256(tokens.tobytes() + labels.tobytes()).hexdigest(),
    )


def _is_tar(path: str) -> bool:
    return path.endswith(SUFFIXES["webdataset"])


def read_shard(root: Place, shard: Shard) -> np.ndarray:
    """All rows `[n, L]` of a shard; UserError if it is missing or damaged."""
    with reading(root, shard):
        file = ShardFile(Folder(root), shard, Reads())
        return file.read(np.arange(file.groups))[0]


def read_bytes(root: Place, shard: Shard) -> bytes:
    """The file of a shard, compared with its sha256; UserError if it is missing or damaged."""
    with reading(root, shard):
        data = Folder(root).read(shard.path)
        if hashlib.sha256(data).hexdigest() != shard.sha256:
            raise ValueError("its sha256 is not the recorded one")
        return data


@dataclass
class Reads:
    """What was read of shards, and what for. Footers, which stay in memory, are left out."""

    requests: int = 0  # runs of bytes that were asked for
    bytes: int = 0
    rows_read: int = 0  # of the row groups that were read
    rows_given: int = 0
    _lock: Lock = field(default_factory=Lock, repr=False, compare=False)

    def add(self, requests: int = 0, bytes: int = 0, rows_read: int = 0, rows_given: int = 0) -> None:
        """Count. May be called by several threads."""
        with self._lock:
            self.requests += requests
            self.bytes += bytes
            self.rows_read += rows_read
            self.rows_given += rows_given

    def copy(self) -> "Reads":
        """The counts as they are now."""
        return Reads(self.requests, self.bytes, self.rows_read, self.rows_given)

    def __sub__(self, before: "Reads") -> "Reads":
        """What came since `before`, a copy of these counts."""
        return Reads(
            self.requests - before.requests,
            self.bytes - before.bytes,
            self.rows_read - before.rows_read,
            self.rows_given - before.rows_given,
        )


class ShardFile:
    """An open shard, which gives away no rows other than those that were written."""

    def __init__(self, folder: Folder, shard: Shard, reads: Reads):
        self._folder, self._shard, self._reads = folder, shard, reads
        footer = _read_footer(folder, shard)
        if hashlib.sha256(footer).hexdigest() != shard.footer:
            raise ValueError("its footer is not the recorded one")
        # Of parquet on this machine, the library itself opens the file.
        self._local = not (folder.remote or _is_tar(shard.path))
        if _is_tar(shard.path):
            from pipelines.tar_shards import TarContent  # decoders of pictures, which text does not need

            self._content: ParquetContent | TarContent = TarContent(footer, shard.bytes)
        else:
            self._content = ParquetContent(footer, shard.bytes, folder.path(shard.path) if self._local else None)

    @property
    def groups(self) -> int:
        return len(self._content.counts)

    def read(self, groups: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The rows `[n, L]` of row groups, one group after the other, and their labels `[n]`, or `[0]` without any."""
        content = self._content
        spans = coalesced(content.spans[group] for group in groups.tolist())
        self._reads.add(len(spans), sum(stop - start for start, stop in spans), int(content.counts[groups].sum()))
        if self._local and isinstance(content, ParquetContent):
            return content.read(groups.tolist(), None)
        parts = self._folder.read_ranges(self._shard.path, spans)
        return content.read(groups.tolist(), Pieces(self._shard.bytes, spans, parts))


def _read_footer(folder: Folder, shard: Shard) -> bytes:
    """What ends a file and describes the rest of it: parquet's footer, or the index of a tar."""
    size = shard.bytes if folder.remote else folder.size(shard.path)
    start = max(0, size - _FOOTER_BYTES)
    (tail,) = folder.read_ranges(shard.path, [(start, size)])
    if _is_tar(shard.path):
        from pipelines.tar_shards import footer_size
    else:
        from pipelines.parquet_shards import footer_size
    length = footer_size(tail)
    if length > size:
        raise ValueError("its footer is not the recorded one")
    if length > len(tail):
        (before,) = folder.read_ranges(shard.path, [(size - length, start)])
        tail = before + tail
    return tail[-length:]


@contextmanager
def reading(root: Place, shard: Shard) -> Iterator[None]:
    """Turns what is raised about a bad file into a message that names it."""
    try:
        yield
    except UserError:  # which is a ValueError: a server that does not answer is no damage
        raise
    except FileNotFoundError as error:
        raise missing(root, shard) from error
    except (pa.ArrowException, OSError, ValueError, KeyError) as error:
        raise damaged(root, shard, next(iter(str(error).splitlines()), type(error).__name__)) from error


def is_sound(root: Place, shard: Shard) -> bool:
    """Is the shard the recorded one? On this machine all of it is read, for a crash may have torn it.

    In S3, where a shard was read back when it was written, its size and its footer decide, which holds the checksums.
    """
    folder = Folder(root)
    if not folder.remote:
        return has_sha256(folder, shard)
    try:
        return (
            folder.size(shard.path) == shard.bytes
            and hashlib.sha256(_read_footer(folder, shard)).hexdigest() == shard.footer
        )
    except UserError:
        raise
    except (OSError, ValueError):
        return False


def has_sha256(folder: Folder, shard: Shard) -> bool:
    """Does the file have the recorded sha256? Reads all of it."""
    try:
        if folder.remote:
            return hashlib.sha256(folder.read(shard.path)).hexdigest() == shard.sha256
        with open(folder.path(shard.path), "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest() == shard.sha256
    except OSError:
        return False


def missing(root: Place, shard: Shard, why: str | None = None) -> UserError:
    """The error of a shard that is not there."""
    return UserError(f"shard {shard.path!r} of the prepared set {str(root)!r} is missing" + (f": {why}" if why else ""))


def damaged(root: Place, shard: Shard, how: str) -> UserError:
    """The error of a shard that is not the recorded one."""
    return UserError(
        f"shard {shard.path!r} of the prepared set {str(root)!r} is damaged: {how}. "
        "Remove it and prepare the set again: sound shards are kept"
    )
