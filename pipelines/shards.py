"""The format of a prepared set: a folder of parquet shards and a manifest, which is written last.

    manifest.json               what is in the set (`pipelines.manifest`); without it the folder is not a prepared set
    train/00007-0001.parquet    second shard of part 7: a column `tokens`, a fixed-size list of L tokens per row, zstd,
                                and for labelled images a column `label`
    validation/ test/           the other splits
    parts/00007.json            how far the preparation is (`pipelines.prepare`); readers do not need it

Any parquet reader can read the shards. Readers of this module notice damage when they come to it: the manifest has a
hash of each shard's footer, and the footer has a checksum of the tokens and labels of each row group.

A row's *id* counts the rows of whole row groups first, shard by shard, and after them those of the short row groups
that end a part. Hence the ids `g*C .. g*C+C-1` are one row group of C rows, for all but the last ids of a split. That
makes reading in the order of `pipelines.order` cheap.
"""

import functools
import hashlib
import json
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from threading import Lock

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from md4.errors import UserError
from pipelines.manifest import Manifest, Shard
from pipelines.storage import Folder, Pieces, Place, coalesced
from pipelines.vocabularies import Vocabulary, token_dtype, vocabulary

_CHECKSUMS = "md4.crc32"  # key in a shard's metadata: CRC-32 of each row group's tokens, then labels
LABEL_DTYPE = np.dtype(np.int32)
_OPEN_FILES = 32
_FOOTERS = 512
_FOOTER_BYTES = 2**16  # read at once from the end of a file: most footers are shorter
_READERS = 16  # shards in S3 that are read at the same time


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
    with _reading(root, shard):
        file = _ShardFile(Folder(root), shard, Reads())
        return file.read(np.arange(file.groups))[0]


def read_bytes(root: Place, shard: Shard) -> bytes:
    """The file of a shard, compared with its sha256; UserError if it is missing or damaged."""
    with _reading(root, shard):
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


class _ShardFile:
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
def _reading(root: Place, shard: Shard) -> Iterator[None]:
    """Turns what pyarrow raises about a bad file into a message that names it."""
    try:
        yield
    except UserError:  # which is a ValueError: a server that does not answer is no damage
        raise
    except FileNotFoundError as error:
        raise _missing(root, shard) from error
    except (pa.ArrowException, OSError, ValueError, KeyError) as error:
        raise _damaged(root, shard, next(iter(str(error).splitlines()), type(error).__name__)) from error


class ShardSet:
    """One split of a prepared set, its rows to be read by id.

    Opening reads the manifest and looks at the sizes of the shards; UserError names what is missing or wrong.
    """

    def __init__(self, root: Place, split: str = "train"):
        self.root = Folder(root)
        self.split = split
        self.manifest = Manifest.load(self.root)
        if split not in self.manifest.splits:
            raise UserError(f"unknown split {split!r} of {str(root)!r}: it has {', '.join(self.manifest.splits)}")
        facts = self.manifest.splits[split]
        self._shards = facts.shards
        self.rows = facts.rows
        self.length = self.manifest.length
        self.fingerprint = self.manifest.fingerprint
        self.rows_per_group = self.manifest.rows_per_group
        self.dtype = token_dtype(self.manifest.vocabulary_size)
        pixels = self.manifest.pixels
        self.shape = None if pixels is None else pixels.shape  # H, W, C of images
        self.labelled = pixels is not None and pixels.classes is not None
        self.reads = Reads()  # since the set was opened
        check_sizes(self.root, self._shards)

        group = self.rows_per_group
        counts = np.array([shard.rows for shard in self._shards], np.int64)
        self._whole = counts // group * group  # of each shard: rows in whole row groups; the others have the last ids
        self._whole_before = np.cumsum(self._whole) - self._whole
        self._short = counts - self._whole
        self._short_before = np.cumsum(self._short) - self._short + self._whole.sum()
        # Of a file in S3 only its footer is kept.
        keep = functools.lru_cache(_FOOTERS if self.root.remote else _OPEN_FILES)
        self._file = keep(lambda shard: _ShardFile(self.root, self._shards[shard], self.reads))

    def __reduce__(self) -> tuple[type["ShardSet"], tuple[Folder, str]]:
        return ShardSet, (self.root, self.split)  # sent to another process, the set is opened there

    @property
    def vocabulary(self) -> Vocabulary:
        """The vocabulary that the set's tokens belong to."""
        return vocabulary(self.manifest.vocabulary)

    def read(self, ids: np.ndarray) -> np.ndarray:
        """Rows `[n, L]` of ids `[n]` in `0..rows-1`, in the stored dtype (`.dtype`: unsigned, small).

        Every row group is read once per call. UserError names a shard that is missing or damaged.
        """
        return self.read_labelled(ids)[0]

    def read_labelled(self, ids: np.ndarray) -> tuple[np.ndarray, np.ndarray | None]:
        """As `read`, and the rows' labels `[n]` int32, -1 where a row has none; None where the whole set has none."""
        ids = np.asarray(ids, np.int64)
        if ids.size and not 0 <= ids.min() <= ids.max() < self.rows:
            raise IndexError(f"row ids must be in 0..{self.rows - 1}, got {ids.min()}..{ids.max()}")
        out = np.empty((len(ids), self.length), self.dtype)
        known = np.empty(len(ids), LABEL_DTYPE) if self.labelled else None
        shards, places = self._locate(ids)

        def fill(shard: int) -> None:
            mine = np.flatnonzero(shards == shard)
            groups, which = np.unique(places[mine] // self.rows_per_group, return_inverse=True)
            rows, labels = self._read_groups(shard, groups)
            which = which * self.rows_per_group + places[mine] % self.rows_per_group
            out[mine] = rows[which]
            if known is not None:
                known[mine] = labels[which]

        wanted = np.unique(shards).tolist()
        if self.root.remote and len(wanted) > 1:
            with ThreadPoolExecutor(min(len(wanted), _READERS)) as pool:  # what takes time is waiting for answers
                list(pool.map(fill, wanted))
        else:
            for shard in wanted:
                fill(shard)
        self.reads.add(rows_given=len(ids))
        return out, known

    def _locate(self, ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Shard `[n]` and row within it `[n]` of ids `[n]`."""
        whole = ids < self._whole.sum()
        # An empty run shares its start with the next one; the rightmost of those is the one that has the row.
        shards = np.where(
            whole,
            np.searchsorted(self._whole_before, ids, "right") - 1,
            np.searchsorted(self._short_before, ids, "right") - 1,
        )
        before = np.where(whole, self._whole_before[shards], self._short_before[shards] - self._whole[shards])
        return shards, ids - before

    def _read_groups(self, shard: int, groups: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Rows `[len(groups) * C or less, L]` of some row groups of a shard, the short one last, and their labels."""
        with _reading(self.root, self._shards[shard]):
            return self._file(shard).read(groups)


@functools.lru_cache(8)
def open_set(root: Folder, split: str, fingerprint: str) -> ShardSet:
    """A split kept open for the life of the process (Ray's workers read many units of one set)."""
    shards = ShardSet(root, split)
    if shards.fingerprint != fingerprint:
        raise UserError(
            f"the prepared set {str(root)!r} changed: its fingerprint was {fingerprint}, is {shards.fingerprint}"
        )
    return shards


def check_sizes(root: Place, shards: list[Shard]) -> None:
    """UserError unless every shard is there with its recorded size. Cheap: reads nothing."""
    folder = Folder(root)
    # In S3 one answer lists a thousand files.
    listed = (
        {}
        if not folder.remote
        else {
            path: entry.size
            for top in {shard.path.split("/")[0] for shard in shards}
            for path, entry in folder.list(top).items()
        }
    )
    for shard in shards:
        try:
            size = listed.get(shard.path) if folder.remote else folder.size(shard.path)
        except OSError as error:
            raise _missing(root, shard, error.strerror) from error
        if size is None:
            raise _missing(root, shard)
        if size != shard.bytes:
            raise _damaged(root, shard, f"it has {size} bytes, the manifest says {shard.bytes}")


def is_sound(root: Place, shard: Shard) -> bool:
    """Is the shard the recorded one? On this machine all of it is read, for a crash may have torn it.

    In S3, where a shard was read back when it was written, its size and its footer decide, which holds the checksums.
    """
    folder = Folder(root)
    if not folder.remote:
        return _has_sha256(folder, shard)
    try:
        return (
            folder.size(shard.path) == shard.bytes
            and hashlib.sha256(_read_footer(folder, shard)).hexdigest() == shard.footer
        )
    except UserError:
        raise
    except (OSError, ValueError):
        return False


def _has_sha256(folder: Folder, shard: Shard) -> bool:
    try:
        if folder.remote:
            return hashlib.sha256(folder.read(shard.path)).hexdigest() == shard.sha256
        with open(folder.path(shard.path), "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest() == shard.sha256
    except OSError:
        return False


def verify(root: Place, advance: Callable[[int], object] = lambda _: None) -> Manifest:
    """Read every shard of a prepared set and compare its sha256; UserError names the first that differs.

    advance: told of the bytes of each shard that is found sound.
    """
    manifest = Manifest.load(root)
    for split in manifest.splits.values():
        check_sizes(root, split.shards)
        for shard in split.shards:
            if not _has_sha256(Folder(root), shard):
                raise _damaged(root, shard, "its sha256 is not the recorded one")
            advance(shard.bytes)
    return manifest


def _missing(root: Place, shard: Shard, why: str | None = None) -> UserError:
    return UserError(f"shard {shard.path!r} of the prepared set {str(root)!r} is missing" + (f": {why}" if why else ""))


def _damaged(root: Place, shard: Shard, how: str) -> UserError:
    return UserError(
        f"shard {shard.path!r} of the prepared set {str(root)!r} is damaged: {how}. "
        "Remove it and prepare the set again: sound shards are kept"
    )
