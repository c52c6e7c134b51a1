"""Documents to shards: one Ray Data task per part of the corpus, resumable, the same result on any number of CPUs.

A source's units are dealt out to *parts* by their bytes alone. The task of a part reads its units, normalises the text,
cuts long documents at white space, sends each document to a split by a hash of its text, shuffles the documents of a
split, joins them by single spaces, encodes them, and cuts the tokens into rows. It writes its shards, and then a record
`parts/00007.json` of what it did. A part with a record whose units and shards are as recorded is not done again. When
all parts are done, the manifest is written (`pipelines.shards`).
"""

import functools
import hashlib
import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

from md4.errors import UserError
from pipelines import ngrams, shards, sources
from pipelines.shards import Manifest, Shard, SourceFacts, Split
from pipelines.vocabularies import Vocabulary, vocabulary

_STALE_SECONDS = 3600.0  # temporary files older than this have no process that still writes them


class DataConfig(BaseModel):
    """What to prepare, and how. Everything but `directory` has a part in the result."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    source: str = Field(
        default="pydocs", description="where the text comes from: text (files) or pydocs (Python's own docs)"
    )
    path: str | None = Field(
        default=None, description="for the source text: a text file, or a folder of .txt and .md files"
    )
    vocabulary: str = Field(
        default="text8", description="how text becomes tokens: text8 (the 27 symbols a-z and space)"
    )
    length: int = Field(default=256, ge=8, le=65536, description="tokens of a row")
    validation: float = Field(
        default=0.05, ge=0, lt=1, description="share of the documents that go to the split validation"
    )
    test: float = Field(default=0.05, ge=0, lt=1, description="share of the documents that go to the split test")
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

    @model_validator(mode="after")
    def _fits(self) -> "DataConfig":
        if self.validation + self.test >= 1:
            raise ValueError(f"validation + test must be below 1, got {self.validation} + {self.test}")
        if self.rows_per_shard % self.rows_per_group:
            raise ValueError(
                f"rows_per_shard must be a multiple of rows_per_group {self.rows_per_group}, got {self.rows_per_shard}"
            )
        return self

    def content(self) -> dict[str, Any]:
        """The configuration as far as it decides the result."""
        return self.model_dump(exclude={"directory"})


class PartRecord(BaseModel):
    """What the task of one part did; its presence says that the part's shards are written."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    config: str  # digest of the configuration
    units: list[tuple[str, int, int, int]]  # name, start, stop, stamp
    source_sha256: list[str]  # of each unit's bytes
    splits: dict[str, Split]


def prepared_path(config: DataConfig) -> Path:
    """The folder of the prepared set of this configuration, whether or not it exists."""
    source = sources.open_source(config.source, config.path)
    name = f"{source.label}-{config.vocabulary}-{config.length}-{_digest(config, source)[:8]}"
    return Path(config.directory, name)


def check(config: DataConfig) -> None:
    """UserError if there is neither a prepared set nor a corpus to make it from. Needs no Ray, reads no text."""
    if not (prepared_path(config) / shards.MANIFEST).exists():
        sources.open_source(config.source, config.path).list_units(config.part_bytes)


def prepare(config: DataConfig, report: Callable[[str], None] = print) -> Path:
    """Prepare the corpus, or what is missing of it, and return the folder of the prepared set. Ray must be running.

    A finished set is returned at once after a look at its files and at the corpus. UserError for a corpus that is
    missing, unreadable, not UTF-8, empty, too small, or that is not the one the finished set was made from.
    """
    source = sources.open_source(config.source, config.path)
    words = vocabulary(config.vocabulary)
    root = prepared_path(config)
    if _is_finished(config, source, root, report):
        return root

    parts = _parts(source.list_units(config.part_bytes), config.part_bytes)
    started = time.monotonic()
    total = sum(unit.size for part in parts for unit in part)
    report(f"data: preparing {source.identity} ({total / 1e6:.1f} MB in {len(parts)} parts) into {root}")
    reused = _run_parts(config, _digest(config, source), root, parts, report)
    if reused:
        report(f"data: {reused} of {len(parts)} parts were ready from before")
    records = [record for number in range(len(parts)) if (record := _load_record(root, number))]
    if len(records) < len(parts):
        raise RuntimeError(f"{len(parts) - len(records)} records of parts disappeared from {str(root / 'parts')!r}")
    manifest = _manifest(config, source, words, root, records)
    _remove_leftovers(root, manifest, len(parts))
    shards.write_atomically(root / shards.MANIFEST, manifest.model_dump_json(indent=1).encode() + b"\n")
    rows = ", ".join(f"{name} {split.rows:,} rows" for name, split in manifest.splits.items())
    report(f"data: ready in {time.monotonic() - started:.1f} s: {rows} of {config.length} tokens in {root}")
    return root


def _digest(config: DataConfig, source: sources.Source) -> str:
    facts = {**config.content(), "path": None, "identity": source.identity}
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


# -- finished or not -------------------------------------------------------------------------------------------------


def _is_finished(config: DataConfig, source: sources.Source, root: Path, report: Callable[[str], None]) -> bool:
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


def _same_corpus(record: PartRecord, part: list[sources.Unit]) -> bool:
    """Are these the units that the record is about? Their bytes are hashed only if a modification time differs."""
    now = [(unit.name, unit.start, unit.stop, unit.stamp) for unit in part]
    if now == record.units:
        return True
    if [unit[:3] for unit in now] != [unit[:3] for unit in record.units]:
        return False
    return [hashlib.sha256(sources.read_piece(unit)).hexdigest() for unit in part] == record.source_sha256


def _parts(units: list[sources.Unit], part_bytes: int) -> list[list[sources.Unit]]:
    """Deal units out to parts of about `part_bytes`: runs of the list, by the bytes before each unit's middle."""
    total = sum(unit.size for unit in units)
    count = -(-total // part_bytes)
    parts: list[list[sources.Unit]] = [[] for _ in range(count)]
    before = 0
    for unit in units:
        parts[(2 * before + unit.size) * count // (2 * total)].append(unit)
        before += unit.size
    return [part for part in parts if part]


# -- the Ray Data job ------------------------------------------------------------------------------------------------


def _run_parts(
    config: DataConfig, digest: str, root: Path, parts: list[list[sources.Unit]], report: Callable[[str], None]
) -> int:
    """Have every part prepared, and return how many of them were ready before. UserError as soon as one has failed."""
    work = functools.partial(_part_task, config=config, digest=digest, root=str(root.absolute()), parts=parts)
    # Imported where Ray is needed: reading a configuration should not take a second longer.
    import ray.data

    from pipelines.ray_data import quiet

    dataset = ray.data.from_items([{"part": number} for number in range(len(parts))], override_num_blocks=len(parts))
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


def _part_task(
    row: dict[str, Any], *, config: DataConfig, digest: str, root: str, parts: list[list[sources.Unit]]
) -> dict[str, Any]:
    """Prepare one part unless that is done. A user's mistake comes back as text: it is not the task that failed."""
    number = int(row["part"])
    try:
        ready = _is_done(Path(root), number, digest, parts[number])
        if not ready:
            _prepare_part(Path(root), number, digest, parts[number], config)
    except UserError as error:
        return {"part": number, "error": str(error), "ready": False}
    return {"part": number, "error": "", "ready": ready}


def _is_done(root: Path, number: int, digest: str, part: list[sources.Unit]) -> bool:
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


def _prepare_part(root: Path, number: int, digest: str, part: list[sources.Unit], config: DataConfig) -> None:
    words = vocabulary(config.vocabulary)
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
        tokens = words.encode(" ".join(text for _, text in documents))
        rows = tokens[: len(tokens) // config.length * config.length].reshape(-1, config.length)
        splits[name] = Split(
            documents=len(documents),
            characters=sum(len(text) for _, text in documents),
            tokens=len(tokens),
            dropped_tokens=len(tokens) - rows.size,
            rows=len(rows),
            shards=_write_shards(root, name, number, rows, config),
        )
    record = PartRecord(
        config=digest,
        units=[(unit.name, unit.start, unit.stop, unit.stamp) for unit in part],
        source_sha256=[reading.sha256 for reading in readings],
        splits=splits,
    )
    shards.write_atomically(_record_file(root, number), record.model_dump_json(indent=1).encode() + b"\n")


def _write_shards(root: Path, split: str, number: int, rows: np.ndarray, config: DataConfig) -> list[Shard]:
    most = config.rows_per_shard
    return [
        shards.write_shard(
            root, f"{split}/{number:05d}-{index:04d}.parquet", rows[start : start + most], config.rows_per_group
        )
        for index, start in enumerate(range(0, len(rows), most))
    ]


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


def assign(text: str, validation: float, test: float) -> tuple[str, bytes]:
    """The split of a document, and its place in the shuffled order: both from hashes of its text.

    Equal documents fall into the same split. A larger validation share takes documents from train only.
    """
    digest = hashlib.blake2b(text.encode(), digest_size=24, person=b"md4 split").digest()
    point = int.from_bytes(digest[:8], "big") / 2**64
    split = "test" if point < test else "validation" if point < test + validation else "train"
    return split, digest[8:]


# -- the manifest ----------------------------------------------------------------------------------------------------


def _manifest(
    config: DataConfig, source: sources.Source, words: Vocabulary, root: Path, records: list[PartRecord]
) -> Manifest:
    splits = {name: _join([record.splits[name] for record in records]) for name in shards.SPLITS}
    train = splits["train"]
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
        ngrams=_ngrams(root, train, words.size),
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
