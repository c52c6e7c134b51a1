"""One part of a corpus to its shards, and the record of it; what the tasks of a preparation do (`pipelines.prepare`).

The task of a part of a text reads its units, normalises the text, cuts long documents at white space, sends each
document to a split by a hash of its text, shuffles the documents of a split, encodes them, joins them, and cuts the
tokens into rows. The task of a part of a set of images makes each image a row (`pipelines.images`), sends it to a split
by a hash of its pixels, unless the source has that split itself, and shuffles them. Both write shards, and then a
record `parts/00007.json` of what they did. A part whose units and shards are as recorded is not done again.
"""

import hashlib
from collections import Counter
from collections.abc import Iterable

import numpy as np
from pydantic import BaseModel, ConfigDict, ValidationError

from md4.errors import UserError
from pipelines import images, shards, sources
from pipelines.config import DataConfig
from pipelines.manifest import SPLITS, Shard, Split
from pipelines.storage import Folder
from pipelines.units import Unit
from pipelines.vocabularies import Vocabulary


class ImageRecord(BaseModel):
    """What a part's record says about images."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    labelled: bool | None  # None: there were no images
    top_label: int  # the highest; -1 without any
    converted: dict[str, int]
    rejected: dict[str, int]
    examples: list[str]


class PartRecord(BaseModel):
    """What the task of one part did; its presence says that the part's shards are written."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    config: str  # digest of the configuration and of what the part must know of the whole source
    units: list[tuple[str, int, int, int]]  # name, start, stop, stamp
    source_sha256: list[str]  # of each unit's bytes
    splits: dict[str, Split]
    images: ImageRecord | None = None


class Whole(BaseModel):
    """What a part must know of the whole source."""

    own_splits: list[str]  # those that the source itself has
    class_names: list[str] | None

    def digest(self, config: str) -> str:
        """Names the configuration and this together; for text, of which this says nothing, it is the former alone."""
        if not self.own_splits and self.class_names is None:
            return config
        return hashlib.sha256((config + self.model_dump_json()).encode()).hexdigest()


def deal(units: list[Unit], part_bytes: int) -> list[list[Unit]]:
    """Deal units out to parts of about `part_bytes`: runs of the list, by the bytes before each unit's middle."""
    total = max(1, sum(unit.size for unit in units))
    count = -(-total // part_bytes)
    parts: list[list[Unit]] = [[] for _ in range(count)]
    before = 0
    for unit in units:
        # An empty file at the very end still belongs to the last part.
        parts[min((2 * before + unit.size) * count // (2 * total), count - 1)].append(unit)
        before += unit.size
    return [part for part in parts if part]


def same_corpus(record: PartRecord, part: list[Unit]) -> bool:
    """Are these the units that the record is about? Their bytes are hashed only if a modification time differs."""
    now = [(unit.name, unit.start, unit.stop, unit.stamp) for unit in part]
    if now == record.units:
        return True
    if [unit[:3] for unit in now] != [unit[:3] for unit in record.units]:
        return False
    return [_source_sha256(unit) for unit in part] == record.source_sha256


def _source_sha256(unit: Unit) -> str:
    if unit.kind in images.KINDS:
        return images.digest(unit)
    return hashlib.sha256(sources.read_piece(unit)).hexdigest()


def prepare_part(root: Folder, number: int, digest: str, units: list[Unit], config: DataConfig, whole: Whole) -> bool:
    """Prepare part `number`, unless that is done already, and say whether it was.

    Args:
        root: folder of the prepared set.
        digest: names the configuration and `whole`.

    UserError for units that cannot be read or used.
    """
    if _is_done(root, number, digest, units):
        return True
    prepare_units = _prepare_images if config.has_images else _prepare_text
    record = prepare_units(root, number, digest, units, config, whole)
    root.write(record_file(number), record.model_dump_json(indent=1).encode() + b"\n")
    return False


def _is_done(root: Folder, number: int, digest: str, part: list[Unit]) -> bool:
    record = load_record(root, number)
    return (
        record is not None
        and record.config == digest
        and same_corpus(record, part)
        and all(shards.is_sound(root, shard) for split in record.splits.values() for shard in split.shards)
    )


def record_file(number: int) -> str:
    """Where the record of a part lies in the folder of a prepared set."""
    return f"parts/{number:05d}.json"


def load_record(root: Folder, number: int) -> PartRecord | None:
    """The record of a part; None if there is none that can be trusted."""
    try:
        return PartRecord.model_validate_json(root.read(record_file(number)))
    except (OSError, ValidationError):
        return None


# -- text ------------------------------------------------------------------------------------------------------------


def _prepare_text(root: Folder, number: int, digest: str, part: list[Unit], config: DataConfig, _: Whole) -> PartRecord:
    words = config.tokens
    readings = [sources.read(unit) for unit in part]
    texts: dict[str, list[tuple[bytes, str]]] = {name: [] for name in SPLITS}
    for reading in readings:
        for document in reading.documents:
            for text in cut(words.normalise(document.text), config.document_chars):
                split, place = assign(text, config.validation, config.test)
                texts[split].append((place, text))

    splits = {}
    for name, documents in texts.items():
        documents.sort()  # by hash: a shuffle that depends on nothing but the documents
        tokens = _joined(words, [text for _, text in documents])
        rows = tokens[: len(tokens) // config.length * config.length].reshape(-1, config.length)
        splits[name] = Split(
            documents=len(documents),
            characters=sum(len(text) for _, text in documents),
            tokens=len(tokens),
            dropped_tokens=len(tokens) - rows.size,
            rows=len(rows),
            shards=_write_shards(root, name, number, rows, config),
        )
    return PartRecord(
        config=digest,
        units=[(unit.name, unit.start, unit.stop, unit.stamp) for unit in part],
        source_sha256=[reading.sha256 for reading in readings],
        splits=splits,
    )


def _joined(words: Vocabulary, texts: list[str]) -> np.ndarray:
    """The tokens of documents, one behind the other. A separator that is no token of its own does not end the last."""
    if not texts:
        return words.encode("")
    tokens = np.concatenate(words.encode_documents(texts))
    return tokens if words.end_of_text is not None else tokens[:-1]


def cut(text: str, most: int) -> list[str]:
    """Pieces of a normalised document of at most `most` characters, cut at spaces (a longer word stays whole)."""
    pieces = []
    start = 0
    while len(text) - start > most:
        end = text.rfind(" ", start, start + most + 1)
        if end < 0:
            end = text.find(" ", start)
        if end < 0:
            break
        pieces.append(text[start:end])
        start = end + 1
    return [*pieces, text[start:]] if text else []


# -- images ----------------------------------------------------------------------------------------------------------


def _prepare_images(
    root: Folder, number: int, digest: str, part: list[Unit], config: DataConfig, whole: Whole
) -> PartRecord:
    recipe = config.recipe()
    readings = [images.read(unit, recipe, whole.class_names) for unit in part]
    labelled = {reading.labels is not None for reading in readings if len(reading.tokens)}
    if len(labelled) > 1:
        raise UserError(f"some images have labels and others have none: see the files {part[0].file!r} ...")
    tokens = np.concatenate([reading.tokens for reading in readings])
    labels = np.concatenate([reading.labels for reading in readings if reading.labels is not None] or [np.empty(0)])
    own = [unit.split for unit, reading in zip(part, readings, strict=True) for _ in reading.tokens]
    shares = {name: 0.0 if name in whole.own_splits else getattr(config, name) for name in ("validation", "test")}

    chosen: dict[str, list[tuple[bytes, int]]] = {name: [] for name in SPLITS}
    for row, split_of_source in enumerate(own):
        split, place = assign(tokens[row].tobytes(), **shares)
        chosen[split if split_of_source in (None, "train") else split_of_source].append((place, row))

    splits = {}
    for name, places in chosen.items():
        # By hash, as with documents. Equal images stand as their files do.
        rows = np.array([row for _, row in sorted(places)], np.int64)
        splits[name] = Split(
            documents=len(rows),
            characters=0,
            tokens=len(rows) * config.length,
            dropped_tokens=0,
            rows=len(rows),
            shards=_write_shards(root, name, number, tokens[rows], config, labels[rows] if True in labelled else None),
        )
    notes = [reading.notes for reading in readings]
    return PartRecord(
        config=digest,
        units=[(unit.name, unit.start, unit.stop, unit.stamp) for unit in part],
        source_sha256=[reading.sha256 for reading in readings],
        splits=splits,
        images=ImageRecord(
            labelled=None if not labelled else True in labelled,
            top_label=int(labels.max()) if len(labels) else images.NO_LABEL,
            converted=summed(note.converted for note in notes),
            rejected=summed(note.rejected for note in notes),
            examples=[example for note in notes for example in note.examples][: images.EXAMPLES],
        ),
    )


def summed(counts: Iterable[dict[str, int]]) -> dict[str, int]:
    """Sums by key, the keys sorted."""
    total: Counter[str] = Counter()
    for count in counts:
        total.update(count)
    return dict(sorted(total.items()))


# -- both ------------------------------------------------------------------------------------------------------------


def _write_shards(
    root: Folder, split: str, number: int, rows: np.ndarray, config: DataConfig, labels: np.ndarray | None = None
) -> list[Shard]:
    most, group = config.rows_per_shard, config.rows_per_group
    written = []
    for index, start in enumerate(range(0, len(rows), most)):
        known = None if labels is None else labels[start : start + most]
        path = f"{split}/{number:05d}-{index:04d}{shards.SUFFIXES[config.format]}"
        written.append(shards.write_shard(root, path, rows[start : start + most], group, known, config.pictures()))
    return written


def assign(content: str | bytes, validation: float, test: float) -> tuple[str, bytes]:
    """The split of a document or an image, and its place in the shuffled order: both from hashes of its content.

    Equal ones fall into the same split. A larger validation share takes from train only.
    """
    data = content.encode() if isinstance(content, str) else content
    digest = hashlib.blake2b(data, digest_size=24, person=b"md4 split").digest()
    point = int.from_bytes(digest[:8], "big") / 2**64
    split = "test" if point < test else "validation" if point < test + validation else "train"
    return split, digest[8:]
