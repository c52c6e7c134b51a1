"""The rows of a split, decoded, in a file of this machine: any row is then as cheap to reach as its neighbour.

A reading process asks `open_rows`; the first on a machine decodes the verified shards once, the others wait for it. The
file lies in a private folder below the machine's temporary folder (`TMPDIR`), under a name that has the fingerprint of
the set, and is made visible when it is complete. Whatever lies there may be deleted when no run uses it.

Every row that is read is compared with the sum that was written beside it. Where one differs, all of them are decoded
once more, and whoever reads is told.
"""

import dataclasses
import fcntl
import functools
import json
import os
import shutil
import stat
import tempfile
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from md4.errors import UserError
from pipelines.row_sums import SUM_DTYPE, row_sums
from pipelines.shards import LABEL_DTYPE, Reads, ShardSet, open_set
from pipelines.storage import Place
from pipelines.windows import Windows

_LAYOUT = 2  # of the files in a folder of rows
_CHUNK_BYTES = 2**25  # of rows decoded at a time


class DamagedRows(Exception):
    """The decoded rows are not those that were written."""


class Rows:
    """The rows of a split in memory-mapped files, read as those of a `ShardSet`; DamagedRows if they changed."""

    def __init__(self, folder: Path):
        try:
            self._tokens = np.load(folder / "tokens.npy", mmap_mode="r")
            labels = folder / "labels.npy"
            self._labels = np.load(labels, mmap_mode="r") if labels.exists() else None
            windows = folder / "windows.json"
            self._windows = Windows(**json.loads(windows.read_bytes())) if windows.exists() else None
            self._sums = np.load(folder / "sums.npy")
            self.cost = Reads()  # what this process read of the shards to make them, until somebody has noted it
        except (OSError, ValueError, EOFError) as error:
            raise DamagedRows(str(error)) from error

    def read_labelled(self, ids: np.ndarray) -> tuple[np.ndarray, np.ndarray | None]:
        """Rows `[n, L]` of ids `[n]`, and their labels `[n]` int32, or None where the set has none."""
        if self._windows is not None:
            return self._windows.read(ids, lambda stored: self._stored(stored)[0]), None
        return self._stored(ids)

    def _stored(self, ids: np.ndarray) -> tuple[np.ndarray, np.ndarray | None]:
        labels = None if self._labels is None else np.asarray(self._labels[ids])
        tokens = np.asarray(self._tokens[ids])
        wrong = np.flatnonzero(row_sums(tokens, ids, labels) != self._sums[ids])
        if len(wrong):
            raise DamagedRows(f"{len(wrong)} of {len(ids)} rows, among them row {ids[wrong[0]]}")
        return tokens, labels


@dataclass(frozen=True)
class Found:
    """Some rows `[n, L]`, their labels `[n]` or None, what decoding took of the shards, and what had been damaged."""

    tokens: np.ndarray
    labels: np.ndarray | None
    cost: Reads
    damage: str | None


def read_rows(root: Place, split: str, fingerprint: str, ids: np.ndarray) -> Found:
    """The rows of ids `[n]`; if they are damaged, all are decoded anew, once.

    UserError for a damaged shard, where there is no space for the rows, or where they come out damaged again.
    """
    damage = None
    for _ in range(2):
        try:
            rows = open_rows(root, split, fingerprint)
            found = Found(*rows.read_labelled(ids), rows.cost, damage)
            rows.cost = Reads()
            return found
        except DamagedRows as error:
            damage = f"the decoded rows in {_folder(split, fingerprint)} were damaged ({error})"
            _discard(split, fingerprint, ids)
    raise UserError(f"{damage}, also after decoding the shards again: is this machine's disk or memory sound?")


@functools.lru_cache(8)
def open_rows(root: Place, split: str, fingerprint: str) -> Rows:
    """The decoded rows of a split, made now if this machine does not have them yet.

    UserError for a damaged shard, or where there is no space for them; DamagedRows for files that cannot be opened.
    """
    folder = _folder(split, fingerprint)
    with _alone(folder):
        if folder.exists():
            return Rows(folder)
        shards = open_set(root, split, fingerprint)
        before = shards.reads.copy()
        _build(shards, folder)
        rows = Rows(folder)
        rows.cost = shards.reads - before
        return rows


def _discard(split: str, fingerprint: str, ids: np.ndarray) -> None:
    """Delete damaged rows, unless another process has done so already."""
    open_rows.cache_clear()
    folder = _folder(split, fingerprint)
    with _alone(folder):
        try:
            Rows(folder).read_labelled(ids)
        except DamagedRows:
            shutil.rmtree(folder, ignore_errors=True)


def _folder(split: str, fingerprint: str) -> Path:
    return private_folder() / f"{fingerprint}-{split}-{_LAYOUT}"


def private_folder(what: str = "rows") -> Path:
    """This user's folder for something that is made again if it is gone, below the machine's temporary folder;
    UserError if somebody else could have put something there."""
    folder = Path(tempfile.gettempdir(), f"md4-{what}-{os.getuid()}")
    folder.mkdir(mode=0o700, exist_ok=True)
    facts = folder.lstat()
    if not stat.S_ISDIR(facts.st_mode) or facts.st_uid != os.getuid() or facts.st_mode & 0o077:
        raise UserError(f"{folder} must be a folder that its owner alone can use: remove it, or set TMPDIR")
    return folder


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """One process of this machine at a time that makes or deletes this folder."""
    with folder.with_name(f"{folder.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _build(shards: ShardSet, folder: Path) -> None:
    row = shards.length * shards.dtype.itemsize + LABEL_DTYPE.itemsize * shards.labelled + SUM_DTYPE.itemsize
    size = shards.stored_rows * row
    free = shutil.disk_usage(folder.parent).free
    if size > free:
        raise UserError(
            f"data.order=full needs {size / 1e6:,.0f} MB in {folder.parent} for the decoded rows of "
            f"{str(shards.root)!r}, {free / 1e6:,.0f} MB are free: "
            + ("take data.order=lanes, or set TMPDIR" if shards.windows is None else "set TMPDIR")
        )
    temporary = folder.with_name(f"{folder.name}.{uuid.uuid4().hex}.tmp")
    temporary.mkdir()
    try:
        shape = (shards.stored_rows, shards.length)
        tokens = np.lib.format.open_memmap(temporary / "tokens.npy", "w+", shards.dtype, shape)
        labels = None
        if shards.labelled:
            labels = np.lib.format.open_memmap(temporary / "labels.npy", "w+", LABEL_DTYPE, (shards.rows,))
        sums = np.empty(shards.stored_rows, SUM_DTYPE)
        group = shards.rows_per_group
        chunk = max(1, _CHUNK_BYTES // (group * shards.length * shards.dtype.itemsize)) * group
        for lo in range(0, shards.stored_rows, chunk):
            hi = min(lo + chunk, shards.stored_rows)
            ids = np.arange(lo, hi)
            decoded, known = shards.read_stored(ids)
            # Of what was decoded, not of what was written: writing may fail, too.
            tokens[lo:hi], sums[lo:hi] = decoded, row_sums(decoded, ids, known)
            if labels is not None and known is not None:
                labels[lo:hi] = known
        if shards.windows is not None:
            (temporary / "windows.json").write_text(json.dumps(dataclasses.asdict(shards.windows)))
        tokens.flush()
        if labels is not None:
            labels.flush()
        np.save(temporary / "sums.npy", sums)
        temporary.rename(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
