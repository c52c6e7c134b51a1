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
import io
import json
import os
import uuid
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from md4.errors import UserError
from pipelines.manifest import Manifest, Shard
from pipelines.vocabularies import Vocabulary, token_dtype, vocabulary

_CHECKSUMS = "md4.crc32"  # key in a shard's metadata: CRC-32 of each row group's tokens, then labels
LABEL_DTYPE = np.dtype(np.int32)
_OPEN_FILES = 32


def write_atomically(file: Path, data: bytes) -> None:
    """A file that exists completely or not at all, whenever the process or the machine dies."""
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = file.with_name(f"{file.name}.{uuid.uuid4().hex}.tmp")
    try:
        with open(temporary, "wb") as out:
            out.write(data)
            out.flush()
            os.fsync(out.fileno())
        os.replace(temporary, file)
    finally:
        temporary.unlink(missing_ok=True)


def write_shard(
    root: Path, path: str, tokens: np.ndarray, rows_per_group: int, labels: np.ndarray | None = None
) -> Shard:
    """Write rows of tokens `[n, L]`, and labels `[n]` if there are any, to `root/path`, atomically.

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
    write_atomically(root / path, data)
    return Shard(
        path=path,
        rows=rows,
        bytes=len(data),
        sha256=hashlib.sha256(data).hexdigest(),
        footer=_footer_sha256(io.BytesIO(data)),
        content=hashlib.sha256(tokens.tobytes() + labels.tobytes()).hexdigest(),
    )


def _checksum(tokens: np.ndarray, labels: np.ndarray) -> int:
    return zlib.crc32(labels.tobytes(), zlib.crc32(tokens.tobytes()))


def read_shard(root: Path, shard: Shard) -> np.ndarray:
    """All rows `[n, L]` of a shard; UserError if it is missing or damaged."""
    with _reading(root, shard):
        file = _ShardFile(root, shard)
        return file.read(np.arange(file.groups))[0]


class _ShardFile:
    """An open shard, which gives away no rows other than those that were written."""

    def __init__(self, root: Path, shard: Shard):
        with open(root / shard.path, "rb") as file:
            if _footer_sha256(file) != shard.footer:
                raise ValueError("its footer is not the recorded one")
        # No memory map: a file truncated under one ends the process by a signal instead of an error.
        self._parquet = pq.ParquetFile(root / shard.path, page_checksum_verification=True)
        self._columns = [name for name in ("tokens", "label") if name in self._parquet.schema_arrow.names]
        metadata = self._parquet.metadata
        self._checksums: list[int] = json.loads((metadata.metadata or {})[_CHECKSUMS.encode()])
        self._counts = np.array([metadata.row_group(i).num_rows for i in range(metadata.num_row_groups)], np.int64)

    @property
    def groups(self) -> int:
        return len(self._counts)

    def read(self, groups: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The rows `[n, L]` of row groups, one group after the other, and their labels `[n]`, or `[0]` without any."""
        table = self._parquet.read_row_groups(groups.tolist(), columns=self._columns, use_threads=False)
        column = table["tokens"].combine_chunks()
        rows = column.flatten().to_numpy().reshape(len(column), -1)
        labels = table["label"].to_numpy() if "label" in self._columns else np.empty(0, LABEL_DTYPE)
        stop = 0
        for group in groups.tolist():
            start, stop = stop, stop + self._counts[group]
            if stop > len(rows) or _checksum(rows[start:stop], labels[start:stop]) != self._checksums[group]:
                raise ValueError(f"the tokens of its row group {group} are not those that were written")
        return rows, labels


def _footer_sha256(file: BinaryIO) -> str:
    """Hash of what describes the pages of a parquet file: thrift, its length in 4 bytes, and the letters PAR1."""
    file.seek(-8, os.SEEK_END)
    length = int.from_bytes(file.read(4), "little")
    file.seek(-8 - length, os.SEEK_END)
    return hashlib.sha256(file.read()).hexdigest()


@contextmanager
def _reading(root: Path, shard: Shard) -> Iterator[None]:
    """Turns what pyarrow raises about a bad file into a message that names it."""
    try:
        yield
    except FileNotFoundError as error:
        raise UserError(f"shard {shard.path!r} of the prepared set {str(root)!r} is missing") from error
    except (pa.ArrowException, OSError, ValueError, KeyError) as error:
        raise _damaged(root, shard, next(iter(str(error).splitlines()), type(error).__name__)) from error


class ShardSet:
    """One split of a prepared set, its rows to be read by id.

    Opening reads the manifest and looks at the sizes of the shards; UserError names what is missing or wrong.
    """

    def __init__(self, root: str | Path, split: str = "train"):
        self.root = Path(root)
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
        check_sizes(self.root, self._shards)

        group = self.rows_per_group
        counts = np.array([shard.rows for shard in self._shards], np.int64)
        self._whole = counts // group * group  # of each shard: rows in whole row groups; the others have the last ids
        self._whole_before = np.cumsum(self._whole) - self._whole
        self._short = counts - self._whole
        self._short_before = np.cumsum(self._short) - self._short + self._whole.sum()
        self._file = functools.lru_cache(_OPEN_FILES)(lambda shard: _ShardFile(self.root, self._shards[shard]))

    def __reduce__(self) -> tuple[type["ShardSet"], tuple[Path, str]]:
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
        for shard in np.unique(shards):
            mine = np.flatnonzero(shards == shard)
            groups, which = np.unique(places[mine] // self.rows_per_group, return_inverse=True)
            rows, labels = self._read_groups(int(shard), groups)
            which = which * self.rows_per_group + places[mine] % self.rows_per_group
            out[mine] = rows[which]
            if known is not None:
                known[mine] = labels[which]
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
def open_set(root: str, split: str, fingerprint: str) -> ShardSet:
    """A split kept open for the life of the process (Ray's workers read many units of one set)."""
    shards = ShardSet(root, split)
    if shards.fingerprint != fingerprint:
        raise UserError(
            f"the prepared set {root!r} changed: its fingerprint was {fingerprint}, is {shards.fingerprint}"
        )
    return shards


def check_sizes(root: Path, shards: list[Shard]) -> None:
    """UserError unless every shard is there with its recorded size. Cheap: reads nothing."""
    for shard in shards:
        try:
            size = os.stat(root / shard.path).st_size
        except OSError as error:
            raise UserError(
                f"shard {shard.path!r} of the prepared set {str(root)!r} is missing: {error.strerror}"
            ) from error
        if size != shard.bytes:
            raise _damaged(root, shard, f"it has {size} bytes, the manifest says {shard.bytes}")


def is_sound(root: Path, shard: Shard) -> bool:
    """Does the shard on disk have the recorded sha256? Reads all of it."""
    try:
        with open(root / shard.path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest() == shard.sha256
    except OSError:
        return False


def verify(root: str | Path) -> Manifest:
    """Read every shard of a prepared set and compare its sha256; UserError names the first that differs."""
    manifest = Manifest.load(root)
    for split in manifest.splits.values():
        check_sizes(Path(root), split.shards)
        for shard in split.shards:
            if not is_sound(Path(root), shard):
                raise _damaged(Path(root), shard, "its sha256 is not the recorded one")
    return manifest


def _damaged(root: Path, shard: Shard, how: str) -> UserError:
    return UserError(
        f"shard {shard.path!r} of the prepared set {str(root)!r} is damaged: {how}. "
        "Remove it and prepare the set again: sound shards are kept"
    )
