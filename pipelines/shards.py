"""The format of a prepared set: a folder of shards and a manifest, which is written last.

    manifest.json               what is in the set (`pipelines.manifest`); without it the folder is not a prepared set
    train/00007-0001.parquet    second shard of part 7: a column `tokens`, a fixed-size list of L tokens per row, zstd,
                                and for labelled images a column `label`
    train/00007-0001.tar        or, of images, a webdataset tar: a .png and a .cls for each row (`pipelines.tar_shards`)
    validation/ test/           the other splits
    report.md, report.json      what the preparation counted (`pipelines.prepare_report`)
    rejects/00007.jsonl.zst     records of part 7 that gave no row (`pipelines.rejects`)
    parts/00007.json            how far the preparation is (`pipelines.prepare`); readers do not need it
    duplicates/                 hashes of documents, where duplicates are left out (`pipelines.duplicates`)

Any reader of parquet or of webdataset can read the shards. Readers of this module notice damage when they come to it
(`pipelines.shard_files`).

A row's *id* counts the rows of whole row groups first, shard by shard, and after them those of the short row groups
that end a part. Hence the ids `g*C .. g*C+C-1` are one row group of C rows, for all but the last ids of a split. That
makes reading in the order of `pipelines.order` cheap.

Where rows are windows (packing=windows), stored rows are numbered shard by shard, and the ids are those of
`pipelines.windows`. The last stored row of each part ends with tokens of no window.
"""

import functools
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from md4.errors import UserError
from pipelines.manifest import Manifest, Shard, Split
from pipelines.shard_files import (
    LABEL_DTYPE,
    SUFFIXES,
    Reads,
    ShardFile,
    damaged,
    has_sha256,
    is_sound,
    missing,
    read_bytes,
    read_shard,
    reading,
    write_shard,
)
from pipelines.storage import Folder, Place
from pipelines.vocabularies import Vocabulary, token_dtype, vocabulary
from pipelines.windows import Windows, filled_rows

__all__ = [
    "SUFFIXES",
    "Reads",
    "ShardSet",
    "blocks",
    "check_sizes",
    "is_sound",
    "open_set",
    "read_bytes",
    "read_shard",
    "verify",
    "write_shard",
]

_OPEN_FILES = 32
_FOOTERS = 512
_READERS = 16  # shards in S3 that are read at the same time


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
        self.stored_rows = facts.stored_rows
        self.length = self.manifest.length
        self.windows = Windows(tuple(facts.streams), self.length, self.manifest.stride) if facts.streams else None
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
        self._before = np.cumsum(counts) - counts
        self._short = counts - self._whole
        self._short_before = np.cumsum(self._short) - self._short + self._whole.sum()
        # Of a file in S3 only its footer is kept.
        keep = functools.lru_cache(_FOOTERS if self.root.remote else _OPEN_FILES)
        self._file = keep(lambda shard: ShardFile(self.root, self._shards[shard], self.reads))

    def __reduce__(self) -> tuple[type["ShardSet"], tuple[Folder, str]]:
        return ShardSet, (self.root, self.split)  # sent to another process, the set is opened there

    @property
    def vocabulary(self) -> Vocabulary:
        """The vocabulary that the set's tokens belong to."""
        return vocabulary(self.manifest.vocabulary, self.root)

    @property
    def end_of_rows(self) -> int | None:
        """The token behind whose first occurrence a row is padding; None where rows hold no padding."""
        return self.vocabulary.end_of_text if self.manifest.packing == "document" else None

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
        if self.windows is not None:
            return self.windows.read(ids, lambda stored: self.read_stored(stored)[0]), None
        return self.read_stored(ids)

    def read_stored(self, ids: np.ndarray) -> tuple[np.ndarray, np.ndarray | None]:
        """As `read_labelled`, by numbers of stored rows: other than ids only where rows are windows."""
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
        """Shard `[n]` and row within it `[n]` of stored rows `[n]`."""
        if self.windows is not None:
            shards = np.searchsorted(self._before, ids, "right") - 1
            return shards, ids - self._before[shards]
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
        with reading(self.root, self._shards[shard]):
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


def blocks(root: Place, split: Split, length: int) -> Iterator[np.ndarray]:
    """The stored rows `[n, L]` of each shard of a split, without those that end with tokens of no window."""
    before, filled = 0, filled_rows(split.streams, length)
    for shard in split.shards:
        rows = read_shard(root, shard)
        keep = [number not in filled for number in range(before, before + len(rows))] if filled else slice(None)
        before += len(rows)
        yield rows[keep]


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
            raise missing(root, shard, error.strerror) from error
        if size is None:
            raise missing(root, shard)
        if size != shard.bytes:
            raise damaged(root, shard, f"it has {size} bytes, the manifest says {shard.bytes}")


def verify(root: Place, advance: Callable[[int], object] = lambda _: None) -> Manifest:
    """Read every shard of a prepared set and compare its sha256; UserError names the first that differs.

    advance: told of the bytes of each shard that is found sound.
    """
    manifest = Manifest.load(root)
    for split in manifest.splits.values():
        check_sizes(root, split.shards)
        for shard in split.shards:
            if not has_sha256(Folder(root), shard):
                raise damaged(root, shard, "its sha256 is not the recorded one")
            advance(shard.bytes)
    return manifest
