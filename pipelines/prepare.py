"""Documents or images to shards: one Ray Data task per part of the corpus, resumable, the same on any number of CPUs.

A source's units are dealt out to *parts* by their bytes alone; a task prepares a part, unless a record says that this
is done (`pipelines.parts`). When all parts are done, the manifest is written (`pipelines.manifest`).
"""

import functools
import hashlib
import pickle
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

from md4.errors import UserError
from pipelines import images, ngrams, pixels, shards
from pipelines.config import DataConfig, config_digest, open_source, prepared_path
from pipelines.manifest import FORMAT, MANIFEST, SPLITS, VERSION, Manifest, NGrams, PixelFacts, SourceFacts, Split
from pipelines.parts import (
    ImageRecord,
    PartRecord,
    Whole,
    deal,
    load_record,
    prepare_part,
    record_file,
    same_corpus,
    summed,
)
from pipelines.storage import Folder, location
from pipelines.units import Source, Unit
from pipelines.vocabularies import Vocabulary, keep

_STALE_SECONDS = 3600.0  # temporary files older than this have no process that still writes them


def prepare(config: DataConfig, report: Callable[[str], None] = print) -> Path | Folder:
    """Prepare the corpus, or what is missing of it, and return the folder of the prepared set. Ray must be running.

    A finished set is returned at once after a look at its files and at the corpus. UserError for a corpus that is
    missing, unreadable, not UTF-8, empty, too small, or that is not the one the finished set was made from.
    """
    source = open_source(config)
    words = config.tokens
    root = Folder(prepared_path(config))
    if _is_finished(config, source, root, report):
        return location(str(root))

    source.fetch(report)
    units = source.list_units(config.part_bytes)
    parts = deal(units, config.part_bytes)
    own_splits = sorted({unit.split for unit in units if unit.split})
    whole = Whole(own_splits=own_splits, class_names=source.class_names())
    started = time.monotonic()
    total = sum(unit.size for part in parts for unit in part)
    report(f"data: preparing {source.identity} ({total / 1e6:.1f} MB in {len(parts)} parts) into {root}")
    reused = _run_parts(config, whole, whole.digest(config_digest(config, source)), root, parts)
    if reused:
        report(f"data: {reused} of {len(parts)} parts were ready from before")
    records = [record for number in range(len(parts)) if (record := load_record(root, number))]
    if len(records) < len(parts):
        raise RuntimeError(f"{len(parts) - len(records)} records of parts disappeared from {root.path('parts')!r}")
    manifest = _manifest(config, source, whole, words, root, records)
    _remove_leftovers(root, manifest, len(parts))
    keep(words, root)
    root.write(MANIFEST, manifest.model_dump_json(indent=1).encode() + b"\n")
    rows = ", ".join(f"{name} {split.rows:,} rows" for name, split in manifest.splits.items())
    if manifest.pixels and manifest.pixels.converted:
        report(f"data: converted images: {_counted(manifest.pixels.converted)}")
    if manifest.pixels and manifest.pixels.rejected:
        report(f"data: left out images: {_counted(manifest.pixels.rejected)}; some are named in {MANIFEST}")
    report(f"data: ready in {time.monotonic() - started:.1f} s: {rows} of {config.length} tokens in {root}")
    return location(str(root))


def _counted(counts: dict[str, int]) -> str:
    return ", ".join(f"{count:,} {kind}" for kind, count in counts.items())


# -- finished or not -------------------------------------------------------------------------------------------------


def _is_finished(config: DataConfig, source: Source, root: Folder, report: Callable[[str], None]) -> bool:
    """Is there a manifest, are its shards there, and is the corpus the one it was made from?"""
    if not root.exists(MANIFEST):
        return False
    manifest = Manifest.load(root)
    try:
        parts = deal(source.list_units(config.part_bytes), config.part_bytes)
    except UserError as error:
        report(f"data: using the prepared set {root}, though its corpus cannot be looked at: {error}")
    else:
        records = [load_record(root, number) for number in range(len(parts))]
        units = [unit for part in parts for unit in part]
        listed = (len(units), sum(unit.size for unit in units))
        if listed != (manifest.source.units, manifest.source.bytes) or not all(
            record is None or same_corpus(record, part) for record, part in zip(records, parts, strict=True)
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


# -- the Ray Data job ------------------------------------------------------------------------------------------------


def _run_parts(config: DataConfig, whole: Whole, digest: str, root: Folder, parts: list[list[Unit]]) -> int:
    """Have every part prepared, and return how many of them were ready before. UserError as soon as one has failed."""
    # Imported where Ray is needed: reading a configuration should not take a second longer.
    import ray.data

    from pipelines.ray_data import quiet

    work = functools.partial(_part_task, config=config, whole=whole, digest=digest, root=root.absolute())
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


def _part_task(row: dict[str, Any], *, config: DataConfig, whole: Whole, digest: str, root: Folder) -> dict[str, Any]:
    """Prepare one part unless that is done. A user's mistake comes back as text: it is not the task that failed."""
    number, units = int(row["part"]), pickle.loads(row["units"])
    try:
        ready = prepare_part(root, number, digest, units, config, whole)
    except UserError as error:
        return {"part": number, "error": str(error), "ready": False}
    return {"part": number, "error": "", "ready": ready}


# -- the manifest ----------------------------------------------------------------------------------------------------


def _manifest(
    config: DataConfig, source: Source, whole: Whole, words: Vocabulary, root: Folder, records: list[PartRecord]
) -> Manifest:
    splits = {name: Split.joined([record.splits[name] for record in records]) for name in SPLITS}
    train = splits["train"]
    if not train.rows and config.has_images:
        others = ", ".join(f"{name} {split.rows}" for name, split in splits.items())
        left_out = summed(record.images.rejected for record in records if record.images)
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
        format=FORMAT,
        version=VERSION,
        vocabulary=words.name,
        vocabulary_size=words.size,
        length=config.length,
        rows_per_group=config.rows_per_group,
        packing=config.packing,
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


def _ngrams(root: Folder, train: Split, size: int) -> NGrams | None:
    if size > ngrams.LARGEST_VOCABULARY:
        return None
    blocks = (shards.read_shard(root, shard) for shard in train.shards)
    return NGrams(**ngrams.entropies(ngrams.count_trigrams(blocks, size)))


def _pixel_facts(
    config: DataConfig, whole: Whole, root: Folder, train: Split, records: list[ImageRecord]
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
        converted=summed(record.converted for record in records),
        rejected=summed(record.rejected for record in records),
        rejected_examples=[example for record in records for example in record.examples][: images.EXAMPLES],
    )


def _remove_leftovers(root: Folder, manifest: Manifest, parts: int) -> None:
    """Delete what interrupted attempts left, perhaps on a corpus that has changed since, and the set does not need."""
    needed = {shard.path for split in manifest.splits.values() for shard in split.shards}
    needed |= {record_file(number) for number in range(parts)}
    for folder in (*SPLITS, "parts"):
        for file, entry in root.list(folder).items():
            # Another process may be at work here too, making the same files: leave those that it is writing.
            if file.endswith(".tmp") and time.time() - entry.written < _STALE_SECONDS:
                continue
            if file not in needed:
                root.remove(file)
