"""The format of a prepared set: a folder of parquet shards and a manifest, which is written last.

    manifest.json               what is in the set (`Manifest`); without it the folder is not a prepared set
    train/00007-0001.parquet    second shard of part 7: one column `tokens`, a fixed-size list of L tokens per row, zstd
    validation/ test/           the other splits
    parts/00007.json            how far the preparation is (`pipelines.prepare`); readers do not need it

Any parquet reader can read the shards. Pages carry checksums, so a damaged one is noticed when it is read.

A row's *id* counts the rows of whole row groups first, shard by shard, and after them those of the short row groups
that end a part. Hence the ids `g*C .. g*C+C-1` are one row group of C rows, for all but the last ids of a split. That is
what makes reading in the order of `pipelines.order` cheap.
"""

import functools
import hashlib
import json
import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import BaseModel, ConfigDict, ValidationError

from md4.errors import UserError
from pipelines.vocabularies import Vocabulary, token_dtype, vocabulary

FORMAT = "md4-token-shards"
VERSION = 1
MANIFEST = "manifest.json"
SPLITS = ("train", "validation", "test")
_OPEN_FILES = 32


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Shard(_Record):
    """One parquet file."""

    path: str  # below the set's folder
    rows: int
    bytes: int
    sha256: str  # of the file
    content: str  # sha256 of the tokens alone, row after row: the same whatever wrote the parquet


class Split(_Record):
    """What one split holds. tokens = rows * length + dropped_tokens."""

    documents: int
    characters: int
    tokens: int
    dropped_tokens: int  # ends of parts, too short for a row
    rows: int
    shards: list[Shard]


class SourceFacts(_Record):
    """What the set was made from."""

    kind: str
    identity: str
    units: int
    bytes: int
    sha256: str  # over the hashes of the units' bytes


class NGrams(_Record):
    """Entropies of the train split in bits per token (`pipelines.ngrams`)."""

    unigram: float
    bigram: float
    trigram: float


class Manifest(_Record):
    """Everything a reader needs to know of a prepared set."""

    format: str
    version: int
    vocabulary: str
    vocabulary_size: int
    length: int
    rows_per_group: int
    source: SourceFacts
    config: dict[str, Any]
    splits: dict[str, Split]
    ngrams: NGrams | None
    fingerprint: str

    def content_fingerprint(self) -> str:
        """sha256 over what defines the rows and their ids, hence the batches made of them (contract C3)."""
        facts = {
            "version": self.version,
            "vocabulary": [self.vocabulary, self.vocabulary_size],
            "length": self.length,
            "rows_per_group": self.rows_per_group,
            "splits": {name: [[s.rows, s.content] for s in split.shards] for name, split in self.splits.items()},
        }
        return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()

    @classmethod
    def load(cls, root: str | Path) -> "Manifest":
        """The manifest of the prepared set at `root`; UserError if there is none or it cannot be trusted."""
        file = Path(root, MANIFEST)
        try:
            raw = json.loads(file.read_bytes())
        except FileNotFoundError as error:
            raise UserError(
                f"{str(root)!r} is not a prepared set: it has no {MANIFEST} (unfinished or wrong path)"
            ) from error
        except (OSError, ValueError) as error:
            raise UserError(f"the manifest {str(file)!r} is damaged or unreadable: {error}") from error
        if not isinstance(raw, dict) or raw.get("format") != FORMAT:
            raise UserError(f"{str(file)!r} is not the manifest of a prepared set: its format is not {FORMAT!r}")
        if isinstance(raw.get("version"), int) and raw["version"] > VERSION:
            raise UserError(
                f"{str(file)!r} has format version {raw['version']}, this program reads up to {VERSION}: update it"
            )
        try:
            manifest = cls.model_validate(raw)
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(map(str, first["loc"]))
            raise UserError(f"the manifest {str(file)!r} is damaged: {where}: {first['msg']}") from error
        if manifest.fingerprint != manifest.content_fingerprint():
            raise UserError(f"the manifest {str(file)!r} is damaged: its fingerprint does not match its contents")
        return manifest


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


def write_shard(root: Path, path: str, tokens: np.ndarray, rows_per_group: int) -> Shard:
    """Write rows of tokens `[n, L]` to `root/path`, atomically. The same rows give the same bytes."""
    rows, length = tokens.shape
    tokens = np.ascontiguousarray(tokens)
    kind = pa.list_(pa.field("item", pa.from_numpy_dtype(tokens.dtype), nullable=False), length)
    column = pa.FixedSizeListArray.from_arrays(pa.array(tokens.ravel()), type=kind)
    table = pa.Table.from_arrays([column], schema=pa.schema([pa.field("tokens", kind, nullable=False)]))
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
        content=hashlib.sha256(tokens.tobytes()).hexdigest(),
    )


def read_shard(root: Path, shard: Shard) -> np.ndarray:
    """All rows `[n, L]` of a shard; UserError if it is missing or damaged."""
    with _reading(root, shard):
        file = pq.ParquetFile(root / shard.path, page_checksum_verification=True)
        return _rows(file.read(columns=["tokens"], use_threads=False))


def _rows(table: pa.Table) -> np.ndarray:
    column = table["tokens"].combine_chunks()
    return column.flatten().to_numpy().reshape(len(column), -1)


@contextmanager
def _reading(root: Path, shard: Shard) -> Iterator[None]:
    """Turns what pyarrow raises about a bad file into a message that names it."""
    try:
        yield
    except FileNotFoundError as error:
        raise UserError(f"shard {shard.path!r} of the prepared set {str(root)!r} is missing") from error
    except (pa.ArrowException, OSError, ValueError) as error:
        raise _damaged(root, shard, str(error).splitlines()[0]) from error


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
        check_sizes(self.root, self._shards)

        group = self.rows_per_group
        counts = np.array([shard.rows for shard in self._shards], np.int64)
        self._whole = counts // group * group  # of each shard: rows in whole row groups; the others have the last ids
        self._whole_before = np.cumsum(self._whole) - self._whole
        self._short = counts - self._whole
        self._short_before = np.cumsum(self._short) - self._short + self._whole.sum()
        self._open = functools.lru_cache(_OPEN_FILES)(self._open_file)

    @property
    def vocabulary(self) -> Vocabulary:
        """The vocabulary that the set's tokens belong to."""
        return vocabulary(self.manifest.vocabulary)

    def read(self, ids: np.ndarray) -> np.ndarray:
        """Rows `[n, L]` of ids `[n]` in `0..rows-1`, in the stored dtype (`.dtype`: unsigned, small).

        Every row group is read once per call. UserError names a shard that is missing or damaged.
        """
        ids = np.asarray(ids, np.int64)
        if ids.size and not 0 <= ids.min() <= ids.max() < self.rows:
            raise IndexError(f"row ids must be in 0..{self.rows - 1}, got {ids.min()}..{ids.max()}")
        out = np.empty((len(ids), self.length), self.dtype)
        shards, places = self._locate(ids)
        for shard in np.unique(shards):
            mine = np.flatnonzero(shards == shard)
            groups, which = np.unique(places[mine] // self.rows_per_group, return_inverse=True)
            rows = self._read_groups(int(shard), groups)
            out[mine] = rows[which * self.rows_per_group + places[mine] % self.rows_per_group]
        return out

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

    def _read_groups(self, shard: int, groups: np.ndarray) -> np.ndarray:
        """Rows `[len(groups) * C or less, L]` of some row groups of a shard, the short one last."""
        with _reading(self.root, self._shards[shard]):
            rows = _rows(self._open(shard).read_row_groups(groups.tolist(), columns=["tokens"], use_threads=False))
        if rows.dtype != self.dtype or rows.shape[1] != self.length:
            found = f"its rows are {rows.shape[1]} x {rows.dtype}, not {self.length} x {self.dtype}"
            raise _damaged(self.root, self._shards[shard], found)
        return rows

    def _open_file(self, shard: int) -> pq.ParquetFile:
        # No memory map: a file truncated under one ends the process by a signal instead of an error.
        return pq.ParquetFile(self.root / self._shards[shard].path, page_checksum_verification=True)


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
