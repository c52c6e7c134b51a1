"""What is written down of each part of a corpus when its task is done, and what all parts must know of the whole.

A record `parts/00007.json` is written last: its presence says that the part's shards and side file are there.
"""

import base64
import hashlib
import zlib
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
from pydantic import BaseModel, ConfigDict, ValidationError

from pipelines import images, sources
from pipelines.config import DataConfig
from pipelines.manifest import Split
from pipelines.rejects import Rejects
from pipelines.storage import Folder
from pipelines.units import Unit

LONGEST = 10  # documents that reports name
LARGEST_HISTOGRAM = 65536  # tokens of a vocabulary that are counted one by one


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Origin(_Record):
    """What a task worked on."""

    config: str  # digest of the configuration and of what the part must know of the whole source
    units: list[tuple[str, int, int, int]]  # name, start, stop, stamp
    source_sha256: list[str]  # of each unit's bytes


class ImageRecord(_Record):
    """What a part's record says about images."""

    labelled: bool | None  # None: there were no images
    top_label: int  # the highest; -1 without any
    converted: dict[str, int]
    rejected: dict[str, int]
    examples: list[str]


class Tally(_Record):
    """What a report tells of documents, of all splits together but for `tokens`."""

    lengths: list[int]  # documents whose number of tokens has k binary digits, for k = 0, 1, ...
    longest: list[tuple[int, str]]  # tokens and name
    truncated: int  # documents cut to max_chars
    tokens: str  # how often each token is in the train split, packed by `packed_counts`; empty for large vocabularies


class PartRecord(Origin):
    """What the task of one part did."""

    splits: dict[str, Split]
    images: ImageRecord | None = None
    rejects: Rejects = Rejects()
    tally: Tally | None = None  # of text
    duplicates: str = ""  # digest of which of its documents were to be left out as duplicates


class Whole(BaseModel):
    """What a part must know of the whole source."""

    own_splits: list[str]  # those that the source itself has
    class_names: list[str] | None

    def digest(self, config: str) -> str:
        """Names the configuration and this together; where this says nothing, it is the former alone."""
        if not self.own_splits and self.class_names is None:
            return config
        return hashlib.sha256((config + self.model_dump_json()).encode()).hexdigest()


@dataclass(frozen=True)
class Job:
    """What every task of a preparation gets."""

    root: Folder  # of the prepared set
    digest: str  # names the configuration and `whole`
    config: DataConfig
    whole: Whole
    hooks: bytes  # `cleaning.pickled`
    buckets: int = 0  # of hashes of documents (`pipelines.duplicates`); 0: duplicates are kept


def listed(units: Sequence[Unit]) -> list[tuple[str, int, int, int]]:
    """Units as an `Origin` has them."""
    return [(unit.name, unit.start, unit.stop, unit.stamp) for unit in units]


def same_corpus(record: Origin, part: Sequence[Unit]) -> bool:
    """Are these the units that the record is about? Their bytes are hashed only if a modification time differs."""
    now = listed(part)
    if now == record.units:
        return True
    if [unit[:3] for unit in now] != [unit[:3] for unit in record.units]:
        return False
    return [_source_sha256(unit) for unit in part] == record.source_sha256


def _source_sha256(unit: Unit) -> str:
    if unit.kind in images.KINDS:
        return images.digest(unit)
    return hashlib.sha256(sources.read_piece(unit)).hexdigest()


def record_file(number: int) -> str:
    """Where the record of a part lies in the folder of a prepared set."""
    return f"parts/{number:05d}.json"


def load_record(root: Folder, number: int) -> PartRecord | None:
    """The record of a part; None if there is none that can be trusted."""
    return load(root, record_file(number), PartRecord)


Kind = TypeVar("Kind", bound=BaseModel)


def load(root: Folder, file: str, kind: type[Kind]) -> Kind | None:
    """A record; None if there is none that can be trusted."""
    try:
        return kind.model_validate_json(root.read(file))
    except (OSError, ValidationError):
        return None


def summed(counts: Iterable[dict[str, int]]) -> dict[str, int]:
    """Sums by key, the keys sorted."""
    total: Counter[str] = Counter()
    for count in counts:
        total.update(count)
    return dict(sorted(total.items()))


def packed_counts(counts: np.ndarray) -> str:
    """Counts `[V]` as text: most are small."""
    return base64.b64encode(zlib.compress(counts.astype("<u4").tobytes())).decode()


def unpacked_counts(text: str) -> np.ndarray:
    """Counts `[V]` int64 of `packed_counts`."""
    return np.frombuffer(zlib.decompress(base64.b64decode(text)), "<u4").astype(np.int64)
