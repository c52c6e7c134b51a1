"""One parquet file of a prepared set: written, read by row groups, compared with what its manifest says of it.

A reader notices damage when it comes to it: the manifest has a hash of each file's footer, and the footer has a
checksum of the tokens and labels of each row group. In S3 the footer is read once, and of the rest nothing but the
bytes of the row groups that are wanted.
"""

import hashlib
import json
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from threading import Lock

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from md4.errors import UserError
from pipelines.manifest import Shard
from pipelines.storage import Folder, Pieces, Place, coalesced

_CHECKSUMS = "md4.crc32"  # key in a shard's metadata: CRC-32 of each row group's tokens, then labels
LABEL_DTYPE = np.dtype(np.int32)
_FOOTER_BYTES = 2**16  # read at once from the end of a file: most footers are shorter


def write_shard(
    root: Place, path: str, tokens: np.ndarray, rows_per_group: int, labels: np.ndarray | None = None
) -> Shard:
    """Write rows of tokens `[n, L]`, and labels `[n]` if there are any, to `root/path`, completely or not at all.

    The same rows give the same bytes.
    """
    rows, length = tokens.shape
    tokens = np.ascontiguousarray(tokens)
    labels = np.empty(0, LABEL_DTYPE) if labels is None else np.ascontiguousarray(labels, LABEL_DTYPE)
    kind = pa.list_(pa.field("item", pa.from_numpy_dtype(tokens.dtype), nullable=False), length)
    column = pa.FixedSizeListArray.from_arrays(pa.array(tokens.ravel()), type=kind)
    groups = range(0, rows, rows_per_group)
    checksums = [
        _checksum(tokens[start : start + rows_per_group], labels[start : start + rows_per_group]) for start in groups
    ]
    fields, columns = [pa.field("tokens", kind, nullable=False)], [column]
    if len(labels):
        fields.append(pa.field("label", pa.from_numpy_dtype(LABEL_DTYPE), nullable=False))
        columns.append(pa.array(labels))
    table = pa.Table.from_arrays(columns, schema=pa.schema(fields, {_CHECKSUMS: json.dumps(checksums)}))
    buffer = pa.BufferOutputStream()
    pq.write_table(
        table,
        buffer,
        row_group_size=rows_per_group,
        compression="zstd",
        use_dictionary=False,
        column_encoding={"tokens.list.element": "BYTE_STREAM_SPLIT"},  # parquet stores small integers in 4 bytes each
        write_statistics=False,
        write_page_checksum=True,
    )
    data = buffer.getvalue().to_pybytes()
    Folder(root).write(path, data)
    return Shard(
        path=path,
        rows=rows,
        bytes=len(data),
        sha256=hashlib.sha256(data).hexdigest(),
        footer=hashlib.sha256(data[-8 - int.from_bytes(data[-8:-4], "little") :]).hexdigest(),
        content=hashlib.sha256(tokens.tobytes() + labels.tobytes()).hexdigest(),
    )


def _checksum(tokens: np.ndarray, labels: np.ndarray) -> int:
    return zlib.crc32(labels.tobytes(), zlib.crc32(tokens.tobytes()))


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


class ShardFile:
    """An open shard, which gives away no rows other than those that were written."""

    def __init__(self, folder: Folder, shard: Shard, reads: Reads):
        self._folder, self._shard, self._reads = folder, shard, reads
        footer = _read_footer(folder, shard)
        if hashlib.sha256(footer).hexdigest() != shard.footer:
            raise ValueError("its footer is not the recorded one")
        self._metadata = pq.read_metadata(pa.BufferReader(b"PAR1" + footer))
        self._columns = [name for name in ("tokens", "label") if name in self._metadata.schema.to_arrow_schema().names]
        self._checksums: list[int] = json.loads((self._metadata.metadata or {})[_CHECKSUMS.encode()])
        groups = [self._metadata.row_group(i) for i in range(self._metadata.num_row_groups)]
        self._counts = np.array([group.num_rows for group in groups], np.int64)
        self._spans = [_span(group) for group in groups]
        # No memory map: a file truncated under one ends the process by a signal instead of an error.
        self._local = None if folder.remote else self._parquet(folder.path(shard.path))

    @property
    def groups(self) -> int:
        return len(self._counts)

    def read(self, groups: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The rows `[n, L]` of row groups, one group after the other, and their labels `[n]`, or `[0]` without any."""
        spans = coalesced(self._spans[group] for group in groups.tolist())
        self._reads.add(len(spans), sum(stop - start for start, stop in spans), int(self._counts[groups].sum()))
        parquet = self._local
        if parquet is None:
            parts = self._folder.read_ranges(self._shard.path, spans)
            parquet = self._parquet(pa.PythonFile(Pieces(self._shard.bytes, spans, parts), "r"))
        table = parquet.read_row_groups(groups.tolist(), columns=self._columns, use_threads=False)
        column = table["tokens"].combine_chunks()
        rows = column.flatten().to_numpy().reshape(len(column), -1)
        labels = table["label"].to_numpy() if "label" in self._columns else np.empty(0, LABEL_DTYPE)
        stop = 0
        for group in groups.tolist():
            start, stop = stop, stop + self._counts[group]
            if stop > len(rows) or _checksum(rows[start:stop], labels[start:stop]) != self._checksums[group]:
                raise ValueError(f"the tokens of its row group {group} are not those that were written")
        return rows, labels

    def _parquet(self, source: str | pa.NativeFile) -> pq.ParquetFile:
        return pq.ParquetFile(source, metadata=self._metadata, page_checksum_verification=True, pre_buffer=False)


def _span(group: pq.RowGroupMetaData) -> tuple[int, int]:
    """The bytes `start..stop-1` of a row group."""
    columns = [group.column(i) for i in range(group.num_columns)]
    starts = [column.dictionary_page_offset or column.data_page_offset for column in columns]
    sizes = [column.total_compressed_size for column in columns]
    return min(starts), max(start + size for start, size in zip(starts, sizes, strict=True))


def _read_footer(folder: Folder, shard: Shard) -> bytes:
    """What describes the pages of a parquet file: thrift, its length in 4 bytes, and the letters PAR1."""
    size = shard.bytes if folder.remote else folder.size(shard.path)
    start = max(0, size - _FOOTER_BYTES)
    (tail,) = folder.read_ranges(shard.path, [(start, size)])
    length = int.from_bytes(tail[-8:-4], "little") + 8
    if length > size:
        raise ValueError("its footer is not the recorded one")
    if length > len(tail):
        (before,) = folder.read_ranges(shard.path, [(size - length, start)])
        tail = before + tail
    return tail[-length:]


@contextmanager
def reading(root: Place, shard: Shard) -> Iterator[None]:
    """Turns what pyarrow raises about a bad file into a message that names it."""
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
