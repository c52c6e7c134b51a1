"""The rows of a split, decoded, in a file of this machine: any row is then as cheap to reach as its neighbour.

A reading process asks `open_rows`; the first on a machine decodes the verified shards once, the others wait for it. The
file lies in a private folder below the machine's temporary folder (`TMPDIR`), under a name that has the fingerprint of
the set, and is made visible when it is complete. Whatever lies there may be deleted when no run uses it.
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
from pathlib import Path

import numpy as np

from md4.errors import UserError
from pipelines.shards import LABEL_DTYPE, ShardSet, open_set
from pipelines.storage import Place
from pipelines.windows import Windows

_CHUNK_BYTES = 2**25  # of rows decoded at a time


class Rows:
    """The rows of a split in memory-mapped files; `read_labelled` as that of `ShardSet`."""

    def __init__(self, folder: Path):
        self._tokens = np.load(folder / "tokens.npy", mmap_mode="r")
        labels = folder / "labels.npy"
        self._labels = np.load(labels, mmap_mode="r") if labels.exists() else None
        windows = folder / "windows.json"
        self._windows = Windows(**json.loads(windows.read_bytes())) if windows.exists() else None

    def read_labelled(self, ids: np.ndarray) -> tuple[np.ndarray, np.ndarray | None]:
        """Rows `[n, L]` of ids `[n]`, and their labels `[n]` int32, or None where the set has none."""
        if self._windows is not None:
            return self._windows.read(ids, lambda stored: np.asarray(self._tokens[stored])), None
        labels = None if self._labels is None else np.asarray(self._labels[ids])
        return np.asarray(self._tokens[ids]), labels


@functools.lru_cache(8)
def open_rows(root: Place, split: str, fingerprint: str) -> Rows:
    """The decoded rows of a split, made now if this machine does not have them yet.

    UserError for a damaged shard, or where there is no space for them.
    """
    home = private_folder()
    folder = home / f"{fingerprint}-{split}"
    with _alone(home / f"{folder.name}.lock"):
        if not folder.exists():
            _build(open_set(root, split, fingerprint), folder)
        return Rows(folder)


def private_folder() -> Path:
    """This user's folder for decoded rows; UserError if somebody else could have put something there."""
    folder = Path(tempfile.gettempdir(), f"md4-rows-{os.getuid()}")
    folder.mkdir(mode=0o700, exist_ok=True)
    facts = folder.lstat()
    if not stat.S_ISDIR(facts.st_mode) or facts.st_uid != os.getuid() or facts.st_mode & 0o077:
        raise UserError(f"{folder} must be a folder that its owner alone can use: remove it, or set TMPDIR")
    return folder


@contextmanager
def _alone(file: Path) -> Iterator[None]:
    """One process of this machine at a time."""
    with file.open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _build(shards: ShardSet, folder: Path) -> None:
    size = shards.stored_rows * (shards.length * shards.dtype.itemsize + LABEL_DTYPE.itemsize * shards.labelled)
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
        group = shards.rows_per_group
        chunk = max(1, _CHUNK_BYTES // (group * shards.length * shards.dtype.itemsize)) * group
        for lo in range(0, shards.stored_rows, chunk):
            hi = min(lo + chunk, shards.stored_rows)
            tokens[lo:hi], known = shards.read_stored(np.arange(lo, hi))
            if labels is not None and known is not None:
                labels[lo:hi] = known
        if shards.windows is not None:
            (temporary / "windows.json").write_text(json.dumps(dataclasses.asdict(shards.windows)))
        tokens.flush()
        if labels is not None:
            labels.flush()
        temporary.rename(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
