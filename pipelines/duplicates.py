"""Exact duplicates: which documents of a corpus are left out because an equal one comes before them.

Two passes, before parts are prepared, neither of which holds documents of more than one part, or hashes of more than
about a million documents:

    duplicates/hashes-00007.bin    a 128-bit hash of each document of part 7, cleaned and normalised, sorted (and .json)
    duplicates/bucket-003.bin      of the hashes that begin alike, in all parts: the documents to leave out, by part

Of equal documents one of the source's own test split is kept rather than one of its validation split, and that rather
than any other; among those the first in the corpus. Hence no training document equals one of a held-out split. Who
wins depends on nothing but the corpus; finished files are recognised by digests and not made again.
"""

import hashlib
from collections.abc import Sequence

import numpy as np

from pipelines.cleaning import unpickled
from pipelines.part_records import Job, Origin, listed, load, same_corpus
from pipelines.storage import Folder
from pipelines.texts import read_texts
from pipelines.units import Unit

_PREFIXES = 256  # by which hashes are found in a file; the most buckets that there can be
_BUCKET_DOCUMENTS = 2**20
_HASH = np.dtype([("high", ">u8"), ("low", ">u8"), ("number", "<u4"), ("rank", "u1")])
_LOSER = np.dtype([("number", "<u4"), ("first_part", "<u4"), ("first_number", "<u4"), ("first_rank", "u1")])
_RANKS = {"test": 0, "validation": 1}  # of the source's own splits; everything else may become training text: 2
_DIGEST_BYTES = 32


class HashRecord(Origin):
    """The file of the hashes of a part."""

    documents: int
    sha256: str  # of the file
    starts: list[int]  # of each prefix, where its hashes begin; and the number of all


def hashes_file(part: int) -> str:
    return f"duplicates/hashes-{part:05d}.bin"


def record_file(part: int) -> str:
    return f"duplicates/hashes-{part:05d}.json"


def bucket_file(bucket: int) -> str:
    return f"duplicates/bucket-{bucket:03d}.bin"


# -- first pass ------------------------------------------------------------------------------------------------------


def hash_part(job: Job, number: int, part: Sequence[Unit]) -> bool:
    """Hash the documents of a part, unless that is done; says whether it was. UserError as `texts.read_texts`."""
    record = load_record(job.root, number)
    if record is not None and record.config == job.digest and same_corpus(record, part):
        try:
            if hashlib.sha256(job.root.read(hashes_file(number))).hexdigest() == record.sha256:
                return True
        except FileNotFoundError:
            pass
    found = read_texts(part, job.config, unpickled(job.hooks))
    hashes = np.empty(len(found.texts), _HASH)
    digests = b"".join(_hash(text.text) for text in found.texts)
    hashes["high"], hashes["low"] = np.frombuffer(digests, ">u8").reshape(-1, 2).T
    hashes["number"] = [text.number for text in found.texts]
    hashes["rank"] = [_RANKS.get(text.own or "train", 2) for text in found.texts]
    hashes = hashes[np.lexsort((hashes["number"], hashes["low"], hashes["high"]))]
    data = hashes.tobytes()
    job.root.write(hashes_file(number), data)
    record = HashRecord(
        config=job.digest,
        units=listed(part),
        source_sha256=found.source_sha256,
        documents=len(hashes),
        sha256=hashlib.sha256(data).hexdigest(),
        starts=np.searchsorted(hashes["high"] >> np.uint64(56), np.arange(_PREFIXES + 1)).tolist(),
    )
    job.root.write(record_file(number), record.model_dump_json().encode() + b"\n")
    return False


def _hash(text: str) -> bytes:
    return hashlib.blake2b(text.encode(), digest_size=16, person=b"md4 equal").digest()


def load_record(root: Folder, number: int) -> HashRecord | None:
    """What was written of the hashes of a part; None if there is nothing that can be trusted."""
    return load(root, record_file(number), HashRecord)


def bucket_count(documents: int) -> int:
    """Buckets, a power of two, that hold about a million documents each."""
    count = 1
    while count < _PREFIXES and documents > count * _BUCKET_DOCUMENTS:
        count *= 2
    return count


# -- second pass -----------------------------------------------------------------------------------------------------


def compare_bucket(root: Folder, bucket: int, buckets: int, parts: int, digest: str) -> bool:
    """Find the duplicates among the hashes of a bucket, unless that is done; says whether it was.

    digest: names the hashes of all parts.
    """
    name = hashlib.sha256(f"{digest} {bucket} {buckets}".encode()).digest()
    try:
        if root.read_ranges(bucket_file(bucket), [(0, _DIGEST_BYTES)])[0] == name:
            return True
    except OSError:  # none, or a file of another kind
        pass
    width = _PREFIXES // buckets
    found, part_of = [], []
    for part in range(parts):
        record = load_record(root, part)
        if record is None:
            raise RuntimeError(f"the hashes of part {part} disappeared from {root.path('duplicates')!r}")
        start, stop = record.starts[bucket * width], record.starts[(bucket + 1) * width]
        if stop > start:
            (data,) = root.read_ranges(hashes_file(part), [(start * _HASH.itemsize, stop * _HASH.itemsize)])
            found.append(np.frombuffer(data, _HASH))
            part_of.append(np.full(stop - start, part))
    hashes = np.concatenate(found) if found else np.empty(0, _HASH)
    owner = np.concatenate(part_of) if part_of else np.empty(0, np.int64)
    order, first = losers(hashes, owner)
    rows = np.empty(len(order), _LOSER)
    rows["number"] = hashes["number"][order]
    rows["first_part"], rows["first_number"] = owner[first], hashes["number"][first]
    rows["first_rank"] = hashes["rank"][first]
    # Bytes of the file at which the rows of each part begin, and end.
    bounds = np.searchsorted(owner[order], np.arange(parts + 1)) * _LOSER.itemsize + _DIGEST_BYTES + 8 * (parts + 1)
    root.write(bucket_file(bucket), name + bounds.astype("<u8").tobytes() + rows.tobytes())
    return False


def losers(hashes: np.ndarray, part: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Of hashes `[n]` in parts `[n]`: indices `[k]` of those to leave out, by part and number; of what they equal."""
    best = np.lexsort((hashes["number"], part, hashes["rank"], hashes["low"], hashes["high"]))
    keys = hashes[["high", "low"]][best]
    new = np.ones(len(best), bool)
    new[1:] = keys[1:] != keys[:-1]
    first = best[np.maximum.accumulate(np.where(new, np.arange(len(best)), 0))]
    lost, kept = best[~new], first[~new]
    by_part = np.lexsort((hashes["number"][lost], part[lost]))
    return lost[by_part], kept[by_part]


# -- what a part asks ------------------------------------------------------------------------------------------------


def left_out(root: Folder, part: int, buckets: int) -> np.ndarray:
    """Documents `[k, 4]` of a part to leave out: number, and of the one that is kept instead part, number and whether
    the source itself holds it out (0 or 1)."""
    found = []
    for bucket in range(buckets):
        at = _DIGEST_BYTES + part * 8
        (bounds,) = root.read_ranges(bucket_file(bucket), [(at, at + 16)])
        start, stop = np.frombuffer(bounds, "<u8").tolist()
        if stop > start:
            found.append(np.frombuffer(root.read_ranges(bucket_file(bucket), [(start, stop)])[0], _LOSER))
    rows = np.concatenate(found) if found else np.empty(0, _LOSER)
    rows = rows[np.argsort(rows["number"])]
    held_out = rows["first_rank"] < max(_RANKS.values()) + 1
    columns = [rows["number"], rows["first_part"], rows["first_number"], held_out]
    return np.stack([column.astype(np.int64) for column in columns], axis=1)


def digest(left_out: np.ndarray) -> str:
    """Names what `left_out` gave; empty for nothing."""
    return hashlib.sha256(left_out.astype("<i8").tobytes()).hexdigest() if len(left_out) else ""
