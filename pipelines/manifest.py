"""What a prepared set says of itself: its manifest, from the shards' hashes to the set's fingerprint.

The folder around it, and the shards that it tells of, are described in `pipelines.shards`.
"""

import hashlib
import json
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from md4.errors import UserError
from pipelines.storage import Folder, Place

FORMAT = "md4-token-shards"
VERSION = 1
MANIFEST = "manifest.json"
SPLITS = ("train", "validation", "test")


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Shard(_Record):
    """One file of rows: parquet, or a webdataset tar (`pipelines.shard_files`)."""

    path: str  # below the set's folder
    rows: int
    bytes: int
    sha256: str  # of the file
    footer: str  # sha256 of parquet's footer, or of a tar's index: it holds the checksums of the row groups
    content: str  # sha256 of the tokens alone, row after row, then the labels: the same in either format


class Split(_Record):
    """What one split holds. tokens + padding_tokens = rows * length + dropped_tokens, unless rows are windows."""

    documents: int  # or images; of packing concat the pieces that long documents were cut to
    characters: int  # of text
    tokens: int
    dropped_tokens: int  # that are in no row: ends of parts, too short for one, and of documents that were cut
    padding_tokens: int = 0  # of rows, those that belong to no document
    rows: int  # as readers see them
    streams: list[int] = []  # where rows are windows: tokens of each part, which windows do not leave
    shards: list[Shard]

    @classmethod
    def joined(cls, parts: "list[Split]") -> "Split":
        """The split that has the shards of others, one after the other."""
        return cls(
            documents=sum(part.documents for part in parts),
            characters=sum(part.characters for part in parts),
            tokens=sum(part.tokens for part in parts),
            dropped_tokens=sum(part.dropped_tokens for part in parts),
            padding_tokens=sum(part.padding_tokens for part in parts),
            rows=sum(part.rows for part in parts),
            streams=[tokens for part in parts for tokens in part.streams],
            shards=[shard for part in parts for shard in part.shards],
        )

    @property
    def stored_rows(self) -> int:
        """Rows in the shards."""
        return sum(shard.rows for shard in self.shards)


class SourceFacts(_Record):
    """What the set was made from."""

    kind: str
    identity: str
    version: str = ""  # where the source has versions
    units: int
    bytes: int
    sha256: str  # over the hashes of the units' bytes


class NGrams(_Record):
    """Entropies of the train split in bits per token (`pipelines.ngrams`)."""

    unigram: float
    bigram: float
    trigram: float


class PixelFacts(_Record):
    """What is special about a set of images."""

    shape: tuple[int, int, int]  # H, W, C; their product is the length of a row
    levels: int
    classes: int | None  # number of classes; None: without labels
    class_names: list[str] | None
    independent_bits: float  # entropies of the train split in bits per dimension (`pipelines.pixels`)
    histogram_bits: float
    converted: dict[str, int]  # images whose colours or size were changed, by kind
    rejected: dict[str, int]  # images that were left out, by reason
    rejected_examples: list[str]


class Manifest(_Record):
    """Everything a reader needs to know of a prepared set."""

    format: str
    version: int
    vocabulary: str
    vocabulary_size: int
    vocabulary_digest: str = ""  # names what it consists of, where its name alone does not
    length: int
    rows_per_group: int
    packing: str = "concat"  # how documents became rows: `SetConfig.packing`
    stride: int = 1  # of packing windows: tokens from one training row to the next
    source: SourceFacts
    config: dict[str, Any]
    splits: dict[str, Split]
    ngrams: NGrams | None
    pixels: PixelFacts | None = None  # of images
    rejected: dict[str, int] = {}  # documents or images that gave no row, by reason
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
        if self.pixels:
            facts |= {"shape": self.pixels.shape, "labelled": self.pixels.classes is not None}
        if self.packing != "concat":
            streams = {name: split.streams for name, split in self.splits.items()}
            facts |= {"packing": self.packing, "stride": self.stride, "streams": streams}
        if self.vocabulary_digest:
            facts["vocabulary_digest"] = self.vocabulary_digest
        return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()

    @classmethod
    def load(cls, root: Place) -> "Manifest":
        """The manifest of the prepared set at `root`; UserError if there is none or it cannot be trusted."""
        file = Folder(root).path(MANIFEST)
        try:
            raw = json.loads(Folder(root).read(MANIFEST))
        except FileNotFoundError as error:
            raise UserError(
                f"{str(root)!r} is not a prepared set: it has no {MANIFEST} (unfinished or wrong path)"
            ) from error
        except UserError:  # the storage does not answer
            raise
        except (OSError, ValueError) as error:
            raise _damaged_manifest(file, f"it cannot be read: {error}") from error
        if not isinstance(raw, dict) or raw.get("format") != FORMAT:
            raise UserError(f"{file!r} is not the manifest of a prepared set: its format is not {FORMAT!r}")
        if isinstance(raw.get("version"), int) and raw["version"] > VERSION:
            raise UserError(
                f"{file!r} has format version {raw['version']}, this program reads up to {VERSION}: update it"
            )
        try:
            manifest = cls.model_validate(raw)
        except ValidationError as error:
            first = error.errors()[0]
            raise _damaged_manifest(file, f"{'.'.join(map(str, first['loc']))}: {first['msg']}") from error
        if manifest.fingerprint != manifest.content_fingerprint():
            raise _damaged_manifest(file, "its fingerprint does not match its contents")
        return manifest


def _damaged_manifest(file: str, how: str) -> UserError:
    return UserError(
        f"the manifest {file!r} is damaged: {how}. Remove it and prepare the set again: sound shards are kept"
    )
