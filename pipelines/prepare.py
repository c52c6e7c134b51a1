"""Documents or images to shards: one Ray Data task per part of the corpus, resumable, the same on any number of CPUs.

A source's units are dealt out to *parts* by their bytes alone. The task of a part of a text reads its units, normalises
the text, cuts long documents at white space, sends each document to a split by a hash of its text, shuffles the
documents of a split, encodes them, joins them, and cuts the tokens into rows. The task of a part of a set of images
makes each image a row (`pipelines.images`), sends it to a split by a hash of its pixels, unless the source has that
split itself, and shuffles them. It writes its shards, and then a record `parts/00007.json` of what it did. A part with
a record whose units and shards are as recorded is not done again. When all parts are done, the manifest is written
(`pipelines.shards`).
"""

import difflib
import functools
import hashlib
import json
import math
import pickle
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

from md4.errors import UserError
from pipelines import images, ngrams, pixels, shards, sources
from pipelines.shards import Manifest, PixelFacts, Shard, SourceFacts, Split
from pipelines.units import Source, Unit
from pipelines.vocabularies import Vocabulary, vocabulary

PIXELS = "pixels"  # the vocabulary of images
_FOR_TEXT = ("document_chars",)  # settings that only text has
_FOR_IMAGES = ("shape", "levels", "fit", "damaged", "image_column", "label_column")
_IMAGE_PART_BYTES = 2**26
_STALE_SECONDS = 3600.0  # temporary files older than this have no process that still writes them


class DataConfig(BaseModel):
    """What to prepare, and how. Everything but `directory` has a part in the result."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    source: str = Field(
        default="pydocs",
        description="where the data come from: text (files) or pydocs (Python's own docs); of images digits (ship with "
        "scikit-learn), idx (MNIST), cifar, images (a folder), webdataset or image-parquet",
    )
    path: str | None = Field(
        default=None, description="where the source lies: for text a file, or a folder of .txt and .md files"
    )
    vocabulary: str = Field(
        default="text8",
        description="how documents become tokens: text8 (the 27 symbols a-z and space), gpt2, or pixels",
    )
    length: int = Field(
        default=256, ge=8, le=65536, description="tokens of a row; for images height * width * channels, by default"
    )
    shape: tuple[int, int, int] | None = Field(
        default=None, description="height, width and channels (1 = grey, 3 = RGB) of images; digits, idx, cifar know it"
    )
    levels: int | None = Field(
        default=None, ge=2, le=256, description="brightness levels of images; by default all: 256, of digits 17"
    )
    fit: Literal["exact", "crop"] = Field(
        default="exact", description="images of another size: exact = refused, crop = cut around the centre and resized"
    )
    damaged: Literal["refuse", "skip"] = Field(
        default="refuse", description="images that cannot be used: refuse = stop with a message, skip = count them"
    )
    image_column: str | None = Field(default=None, description="of image-parquet; null = image, or the only one")
    label_column: str | None = Field(default=None, description="of image-parquet; null = label, if there is one")
    validation: float = Field(
        default=0.05, ge=0, lt=1, description="share that goes to the split validation, unless the source has its own"
    )
    test: float = Field(
        default=0.05, ge=0, lt=1, description="share that goes to the split test, unless the source has its own"
    )
    document_chars: int = Field(
        default=20_000, ge=100, description="longer documents are cut at white space, in characters"
    )
    part_bytes: int = Field(
        default=2**22,
        ge=1000,
        description="bytes of the corpus that one task prepares; each part drops the end of its last row",
    )
    rows_per_group: int = Field(
        default=64, ge=1, le=65536, description="rows of a row group: what is read, and shuffled, at once"
    )
    rows_per_shard: int = Field(
        default=4096, ge=1, description="rows of a parquet file at most; a multiple of rows_per_group"
    )
    directory: str = Field(default="data", description="folder that the prepared set is put into")

    @model_validator(mode="before")
    @classmethod
    def _fill_in(cls, tree: Any) -> Any:
        return cls.filled_in(tree) if isinstance(tree, dict) else tree

    @staticmethod
    def filled_in(tree: dict[str, Any]) -> dict[str, Any]:
        """The settings with what follows from others of them: a set of images knows its vocabulary and its length."""
        kind = tree.get("source")
        if kind not in images.KINDS:
            return tree
        shape = tree.get("shape") or images.SHAPES.get(kind)
        defaults: dict[str, Any] = {"vocabulary": PIXELS, "part_bytes": _IMAGE_PART_BYTES}
        if isinstance(shape, list | tuple) and len(shape) == 3 and all(isinstance(size, int) for size in shape):
            defaults["length"] = math.prod(shape)
        filled = defaults | tree
        filled["shape"] = shape
        if filled.get("levels") is None:
            filled["levels"] = images.native_levels(kind)
        return filled

    @model_validator(mode="after")
    def _fits(self) -> "DataConfig":
        if self.source in images.KINDS:
            self._check_images()
        elif self.vocabulary.startswith(PIXELS):
            raise ValueError(f"vocabulary={self.vocabulary} is for images, but source={self.source} is text")
        elif self.shape is not None or self.levels is not None:
            raise ValueError(f"shape and levels are for images, but source={self.source} is text")
        if self.validation + self.test >= 1:
            raise ValueError(f"validation + test must be below 1, got {self.validation} + {self.test}")
        if self.rows_per_shard % self.rows_per_group:
            raise ValueError(
                f"rows_per_shard must be a multiple of rows_per_group {self.rows_per_group}, got {self.rows_per_shard}"
            )
        return self

    def _check_images(self) -> None:
        if self.vocabulary != PIXELS:
            raise ValueError(
                f"vocabulary={self.vocabulary} is for text, but source={self.source} has images: say pixels"
            )
        if self.shape is None:
            raise ValueError(f"shape must be given for source={self.source}: [height, width, channels]")
        if min(self.shape) < 1 or self.shape[2] not in (1, 3):
            raise ValueError(f"shape={list(self.shape)} must be [height, width, channels] with 1 or 3 channels")
        if self.length != math.prod(self.shape):
            raise ValueError(
                f"length={self.length} must be height * width * channels = {math.prod(self.shape)} of the shape; "
                "leave it out"
            )
        if self.levels is None or self.levels > images.native_levels(self.source):
            raise ValueError(f"levels={self.levels}: source={self.source} has {images.native_levels(self.source)}")

    @property
    def has_images(self) -> bool:
        """Is an example an image, not text?"""
        return self.source in images.KINDS

    @property
    def tokens(self) -> Vocabulary:
        """The vocabulary of the set; UserError for an unknown one."""
        return vocabulary(self.vocabulary if self.levels in (None, 256) else f"{self.vocabulary}{self.levels}")

    def recipe(self) -> images.Recipe:
        """How images become tokens."""
        assert self.shape is not None
        assert self.levels is not None
        return images.Recipe(
            self.source, self.shape, self.levels, self.fit, self.damaged, self.image_column, self.label_column
        )

    def content(self) -> dict[str, Any]:
        """The configuration as far as it decides the result."""
        return self.model_dump(exclude={"directory", *(_FOR_TEXT if self.has_images else _FOR_IMAGES)})


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


def open_source(config: DataConfig) -> Source:
    """The source that a configuration names; UserError for one that is unknown or whose path makes no sense."""
    if config.has_images:
        return images.open_source(config.source, config.path, config.image_column, config.label_column)
    if config.source in sources.KINDS:
        return sources.open_source(config.source, config.path)
    known = (*sources.KINDS, *images.KINDS)
    nearest = difflib.get_close_matches(config.source, known, n=1, cutoff=0)[0]
    raise UserError(f"unknown data source {config.source!r}: known are {', '.join(known)}; did you mean {nearest!r}?")


def prepared_path(config: DataConfig) -> Path:
    """The folder of the prepared set of this configuration, whether or not it exists."""
    source = open_source(config)
    name = f"{source.label}-{config.vocabulary}-{config.length}-{_digest(config, source)[:8]}"
    return Path(config.directory, name)


def check(config: DataConfig) -> None:
    """UserError if there is neither a prepared set nor a corpus to make it from. Needs no Ray, reads no text."""
    if not (prepared_path(config) / shards.MANIFEST).exists():
        open_source(config).list_units(config.part_bytes)


def prepare(config: DataConfig, report: Callable[[str], None] = print) -> Path:
    """Prepare the corpus, or what is missing of it, and return the folder of the prepared set. Ray must be running.

    A finished set is returned at once after a look at its files and at the corpus. UserError for a corpus that is
    missing, unreadable, not UTF-8, empty, too small, or that is not the one the finished set was made from.
    """
    source = open_source(config)
    words = config.tokens
    root = prepared_path(config)
    if _is_finished(config, source, root, report):
        return root

    units = source.list_units(config.part_bytes)
    parts = _parts(units, config.part_bytes)
    own_splits = sorted({unit.split for unit in units if unit.split})
    whole = _Whole(own_splits=own_splits, class_names=source.class_names())
    started = time.monotonic()
    total = sum(unit.size for part in parts for unit in part)
    report(f"data: preparing {source.identity} ({total / 1e6:.1f} MB in {len(parts)} parts) into {root}")
    reused = _run_parts(config, whole, whole.digest(_digest(config, source)), root, parts)
    if reused:
        report(f"data: {reused} of {len(parts)} parts were ready from before")
    records = [record for number in range(len(parts)) if (record := _load_record(root, number))]
    if len(records) < len(parts):
        raise RuntimeError(f"{len(parts) - len(records)} records of parts disappeared from {str(root / 'parts')!r}")
    manifest = _manifest(config, source, whole, words, root, records)
    _remove_leftovers(root, manifest, len(parts))
    shards.write_atomically(root / shards.MANIFEST, manifest.model_dump_json(indent=1).encode() + b"\n")
    rows = ", ".join(f"{name} {split.rows:,} rows" for name, split in manifest.splits.items())
    if manifest.pixels and manifest.pixels.converted:
        report(f"data: converted images: {_counted(manifest.pixels.converted)}")
    if manifest.pixels and manifest.pixels.rejected:
        report(f"data: left out images: {_counted(manifest.pixels.rejected)}; some are named in {shards.MANIFEST}")
    report(f"data: ready in {time.monotonic() - started:.1f} s: {rows} of {config.length} tokens in {root}")
    return root


def _counted(counts: dict[str, int]) -> str:
    return ", ".join(f"{count:,} {kind}" for kind, count in counts.items())


def _digest(config: DataConfig, source: Source) -> str:
    facts = {**config.content(), "path": None, "identity": source.identity}
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


class _Whole(BaseModel):
    """What a part must know of the whole source."""

    own_splits: list[str]  # those that the source itself has
    class_names: list[str] | None

    def digest(self, config: str) -> str:
        """Names the configuration and this together; for text, of which this says nothing, it is the former alone."""
        if not self.own_splits and self.class_names is None:
            return config
        return hashlib.sha256((config + self.model_dump_json()).encode()).hexdigest()


# -- finished or not -------------------------------------------------------------------------------------------------


def _is_finished(config: DataConfig, source: Source, root: Path, report: Callable[[str], None]) -> bool:
    """Is there a manifest, are its shards there, and is the corpus the one it was made from?"""
    if not (root / shards.MANIFEST).exists():
        return False
    manifest = Manifest.load(root)
    try:
        parts = _parts(source.list_units(config.part_bytes), config.part_bytes)
    except UserError as error:
        report(f"data: using the prepared set {root}, though its corpus cannot be looked at: {error}")
    else:
        records = [_load_record(root, number) for number in range(len(parts))]
        units = [unit for part in parts for unit in part]
        listed = (len(units), sum(unit.size for unit in units))
        if listed != (manifest.source.units, manifest.source.bytes) or not all(
            record is None or _same_corpus(record, part) for record, part in zip(records, parts, strict=True)
        ):
            raise UserError(
                f"the corpus {source.identity} has changed since {str(root)!r} was prepared from it. "
                "Remove that folder to prepare it again, or set another data directory"
            )
    try:
        for split in manifest.splits.values():
            shards.check_sizes(root, split.shards)
    except UserError as error:
        report(f"data: {error}; preparing what is missing")
        return False
    report(f"data: {root} is ready")
    return True


def _same_corpus(record: PartRecord, part: list[Unit]) -> bool:
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


def _parts(units: list[Unit], part_bytes: int) -> list[list[Unit]]:
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


# -- the Ray Data job ------------------------------------------------------------------------------------------------


def _run_parts(config: DataConfig, whole: _Whole, digest: str, root: Path, parts: list[list[Unit]]) -> int:
    """Have every part prepared, and return how many of them were ready before. UserError as soon as one has failed."""
    # Imported where Ray is needed: reading a configuration should not take a second longer.
    import ray.data

    from pipelines.ray_data import quiet

    work = functools.partial(_part_task, config=config, whole=whole, digest=digest, root=str(root.absolute()))
    # A task gets the units of its own part only: a set of images may have a million of them.
    items = [{"part": number, "units": pickle.dumps(part)} for number, part in enumerate(parts)]
    dataset = ray.data.from_items(items, override_num_blocks=len(parts))
    reused = 0
    with _progress(sum(unit.size for part in parts for unit in part)) as advance:
        for done in quiet(dataset.map(work)).iter_batches(batch_size=None, prefetch_batches=0):
            for number, error, ready in zip(done["part"], done["error"], done["ready"], strict=True):
                if error:
                    raise UserError(str(error))
                reused += bool(ready)
                advance(sum(unit.size for unit in parts[number]))
    return reused


@contextmanager
def _progress(total: int) -> Iterator[Callable[[int], None]]:
    """A progress bar with rate and ETA on a terminal, nothing elsewhere; gives the function that advances it."""
    console = Console(stderr=True)
    columns = (TextColumn("data"), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal, transient=True) as progress:
        task = progress.add_task("data", total=total)
        yield lambda amount: progress.advance(task, amount)


def _part_task(row: dict[str, Any], *, config: DataConfig, whole: _Whole, digest: str, root: str) -> dict[str, Any]:
    """Prepare one part unless that is done. A user's mistake comes back as text: it is not the task that failed."""
    number, units = int(row["part"]), pickle.loads(row["units"])
    try:
        ready = _is_done(Path(root), number, digest, units)
        if not ready:
            prepare_units = _prepare_images if config.has_images else _prepare_text
            record = prepare_units(Path(root), number, digest, units, config, whole)
            shards.write_atomically(_record_file(Path(root), number), record.model_dump_json(indent=1).encode() + b"\n")
    except UserError as error:
        return {"part": number, "error": str(error), "ready": False}
    return {"part": number, "error": "", "ready": ready}


def _is_done(root: Path, number: int, digest: str, part: list[Unit]) -> bool:
    record = _load_record(root, number)
    return (
        record is not None
        and record.config == digest
        and _same_corpus(record, part)
        and all(shards.is_sound(root, shard) for split in record.splits.values() for shard in split.shards)
    )


def _record_file(root: Path, number: int) -> Path:
    return root / "parts" / f"{number:05d}.json"


def _load_record(root: Path, number: int) -> PartRecord | None:
    """The record of a part; None if there is none that can be trusted."""
    try:
        return PartRecord.model_validate_json(_record_file(root, number).read_bytes())
    except (OSError, ValidationError):
        return None


def _prepare_text(root: Path, number: int, digest: str, part: list[Unit], config: DataConfig, _: _Whole) -> PartRecord:
    words = config.tokens
    readings = [sources.read(unit) for unit in part]
    texts: dict[str, list[tuple[bytes, str]]] = {name: [] for name in shards.SPLITS}
    for reading in readings:
        for document in reading.documents:
            for text in cut(words.normalise(document), config.document_chars):
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


def _prepare_images(
    root: Path, number: int, digest: str, part: list[Unit], config: DataConfig, whole: _Whole
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

    chosen: dict[str, list[tuple[bytes, int]]] = {name: [] for name in shards.SPLITS}
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
            converted=_summed(note.converted for note in notes),
            rejected=_summed(note.rejected for note in notes),
            examples=[example for note in notes for example in note.examples][: images.EXAMPLES],
        ),
    )


def _summed(counts: Iterable[dict[str, int]]) -> dict[str, int]:
    """Sums by key, the keys sorted."""
    total: Counter[str] = Counter()
    for count in counts:
        total.update(count)
    return dict(sorted(total.items()))


def _write_shards(
    root: Path, split: str, number: int, rows: np.ndarray, config: DataConfig, labels: np.ndarray | None = None
) -> list[Shard]:
    most, group = config.rows_per_shard, config.rows_per_group
    written = []
    for index, start in enumerate(range(0, len(rows), most)):
        known = None if labels is None else labels[start : start + most]
        path = f"{split}/{number:05d}-{index:04d}.parquet"
        written.append(shards.write_shard(root, path, rows[start : start + most], group, known))
    return written


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


def assign(content: str | bytes, validation: float, test: float) -> tuple[str, bytes]:
    """The split of a document or an image, and its place in the shuffled order: both from hashes of its content.

    Equal ones fall into the same split. A larger validation share takes from train only.
    """
    data = content.encode() if isinstance(content, str) else content
    digest = hashlib.blake2b(data, digest_size=24, person=b"md4 split").digest()
    point = int.from_bytes(digest[:8], "big") / 2**64
    split = "test" if point < test else "validation" if point < test + validation else "train"
    return split, digest[8:]


# -- the manifest ----------------------------------------------------------------------------------------------------


def _manifest(
    config: DataConfig, source: Source, whole: _Whole, words: Vocabulary, root: Path, records: list[PartRecord]
) -> Manifest:
    splits = {name: _join([record.splits[name] for record in records]) for name in shards.SPLITS}
    train = splits["train"]
    if not train.rows and config.has_images:
        others = ", ".join(f"{name} {split.rows}" for name, split in splits.items())
        left_out = _summed(record.images.rejected for record in records if record.images)
        raise UserError(
            f"no images of {source.identity} are for training: {others}; left out: {_counted(left_out) or 'none'}"
        )
    if not train.rows:
        raise UserError(
            f"the corpus {source.identity} is too small: its train split has {train.tokens} tokens in {len(records)} "
            f"part(s), and one row needs {config.length} in one part"
        )
    hashes = "".join(sha256 for record in records for sha256 in record.source_sha256)
    units = [unit for record in records for unit in record.units]
    manifest = Manifest(
        format=shards.FORMAT,
        version=shards.VERSION,
        vocabulary=words.name,
        vocabulary_size=words.size,
        length=config.length,
        rows_per_group=config.rows_per_group,
        source=SourceFacts(
            kind=source.kind,
            identity=source.identity,
            units=len(units),
            bytes=sum(stop - start for _, start, stop, _ in units),
            sha256=hashlib.sha256(hashes.encode()).hexdigest(),
        ),
        config=config.content(),
        splits=splits,
        ngrams=None if config.has_images else _ngrams(root, train, words.size),
        pixels=_pixel_facts(config, whole, root, train, [record.images for record in records if record.images]),
        fingerprint="",
    )
    return manifest.model_copy(update={"fingerprint": manifest.content_fingerprint()})


def _join(parts: list[Split]) -> Split:
    return Split(
        documents=sum(part.documents for part in parts),
        characters=sum(part.characters for part in parts),
        tokens=sum(part.tokens for part in parts),
        dropped_tokens=sum(part.dropped_tokens for part in parts),
        rows=sum(part.rows for part in parts),
        shards=[shard for part in parts for shard in part.shards],
    )


def _ngrams(root: Path, train: Split, size: int) -> shards.NGrams | None:
    if size > ngrams.LARGEST_VOCABULARY:
        return None
    blocks = (shards.read_shard(root, shard) for shard in train.shards)
    return shards.NGrams(**ngrams.entropies(ngrams.count_trigrams(blocks, size)))


def _pixel_facts(
    config: DataConfig, whole: _Whole, root: Path, train: Split, records: list[ImageRecord]
) -> PixelFacts | None:
    """What the manifest says of images. UserError if labels are missing in some parts, or are more than classes."""
    if config.shape is None or config.levels is None:
        return None
    labelled = {record.labelled for record in records} - {None}
    if len(labelled) > 1:
        raise UserError("some files of the set have labels and others have none")
    classes = None
    if True in labelled:
        classes = 1 + max(record.top_label for record in records)
        if whole.class_names is not None:
            if classes > len(whole.class_names):
                raise UserError(f"an image has the label {classes - 1}, but there are {len(whole.class_names)} classes")
            classes = len(whole.class_names)
    blocks = (shards.read_shard(root, shard) for shard in train.shards)
    return PixelFacts(
        shape=config.shape,
        levels=config.levels,
        classes=classes,
        class_names=whole.class_names if classes is not None else None,
        **pixels.entropies(pixels.count_positions(blocks, config.length, config.levels)),
        converted=_summed(record.converted for record in records),
        rejected=_summed(record.rejected for record in records),
        rejected_examples=[example for record in records for example in record.examples][: images.EXAMPLES],
    )


def _remove_leftovers(root: Path, manifest: Manifest, parts: int) -> None:
    """Delete what interrupted attempts left, perhaps on a corpus that has changed since, and the set does not need."""
    needed = {root / shard.path for split in manifest.splits.values() for shard in split.shards}
    needed |= {_record_file(root, number) for number in range(parts)}
    for folder in (*shards.SPLITS, "parts"):
        for file in (root / folder).glob("*"):
            # Another process may be at work here too, making the same files: leave those that it is writing.
            if file.suffix == ".tmp" and time.time() - file.stat().st_mtime < _STALE_SECONDS:
                continue
            if file not in needed:
                file.unlink(missing_ok=True)
