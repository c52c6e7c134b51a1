"""Documents or images to shards: one Ray Data task per part of the corpus, resumable, the same on any number of CPUs.

A source's units are dealt out to *parts* by their bytes alone; a task prepares a part, unless a record says that this
is done (`pipelines.parts`). Where duplicates are left out, two passes come before (`pipelines.duplicates`). When all
parts are done, a report is written (`pipelines.prepare_report`), and then the manifest (`pipelines.manifest`).
"""

import functools
import hashlib
import pickle
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from md4.errors import UserError
from pipelines import cleaning, duplicates, images, ngrams, pixels, prepare_report, rejects, shards
from pipelines.config import (
    DataConfig,
    check_packing,
    config_digest,
    open_source,
    prepared_path,
    vocabulary_digest,
)
from pipelines.manifest import FORMAT, MANIFEST, SPLITS, VERSION, Manifest, NGrams, PixelFacts, SourceFacts, Split
from pipelines.part_records import ImageRecord, Job, PartRecord, Whole, load_record, record_file, same_corpus, summed
from pipelines.parts import deal, prepare_part
from pipelines.progress import progress
from pipelines.storage import Folder, location
from pipelines.units import Source, Unit
from pipelines.vocabularies import Vocabulary, keep

_STALE_SECONDS = 3600.0  # temporary files older than this have no process that still writes them

Say = Callable[[str], None]


def prepare(config: DataConfig, report: Say = print) -> Path | Folder:
    """Prepare the corpus, or what is missing of it, and return the folder of the prepared set. Ray must be running.

    A finished set is returned at once after a look at its files and at the corpus. UserError for a corpus that is
    missing, unreadable, not UTF-8, empty, too small, or that is not the one the finished set was made from, and for a
    cleaning hook that is missing or fails.
    """
    check_packing(config)
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
    hooks = b"" if config.has_images else cleaning.pickled(cleaning.find(config.clean))
    job = Job(root.absolute(), whole.digest(config_digest(config, source)), config, whole, hooks)
    if config.deduplicate and not config.has_images:
        job = replace(job, buckets=_find_duplicates(job, parts, report))
    reused = _run("data", functools.partial(prepare_part, job), parts, report)
    if reused:
        report(f"data: {reused} of {len(parts)} parts were ready from before")
    records = [record for number in range(len(parts)) if (record := load_record(root, number))]
    if len(records) < len(parts):
        raise RuntimeError(f"{len(parts) - len(records)} records of parts disappeared from {root.path('parts')!r}")
    _check_unchanged(job, records)
    manifest = _manifest(config, source, whole, words, root, records)
    _remove_leftovers(job, manifest, records)
    seconds = time.monotonic() - started
    counted = prepare_report.gather(manifest, words, records, seconds)
    prepare_report.write(root, counted)
    keep(words, root)
    root.write(MANIFEST, manifest.model_dump_json(indent=1).encode() + b"\n")
    rows = ", ".join(f"{name} {split.rows:,} rows" for name, split in manifest.splits.items())
    if manifest.pixels and manifest.pixels.converted:
        report(f"data: converted images: {_counted(manifest.pixels.converted)}")
    if manifest.rejected:
        what = "images" if config.has_images else "records"
        report(f"data: left out {what}: {_counted(manifest.rejected)}; they are in {root.path('rejects')}")
    for line in prepare_report.brief(counted):
        report(f"data: {line}")
    speed = "" if config.has_images else f", {counted['tokens_per_second']:,.0f} tokens/s"
    report(f"data: ready in {seconds:.1f} s{speed}: {rows} of {config.length} tokens in {root}")
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


def _run(what: str, task: Callable[[int, Any], bool], items: Sequence[Any], say: Say) -> int:
    """Have `task(number, item)` done for every item, and return how many were done before. UserError as soon as one has
    failed. Items are parts, or None for those that have no size."""
    # Imported where Ray is needed: reading a configuration should not take a second longer.
    import ray.data

    from pipelines.ray_data import quiet

    # A task gets its own item only: a set of images may have a million of units.
    rows = [{"number": number, "item": pickle.dumps(item)} for number, item in enumerate(items)]
    dataset = ray.data.from_items(rows, override_num_blocks=len(rows))
    sizes = [sum(unit.size for unit in item) if item else 0 for item in items]
    reused = 0
    with progress(what, sum(sizes), say) as advance:
        done_rows = quiet(dataset.map(functools.partial(_task, task=task)))
        for done in done_rows.iter_batches(batch_size=None, prefetch_batches=0):
            for number, error, ready in zip(done["number"], done["error"], done["ready"], strict=True):
                if error:
                    raise UserError(str(error))
                reused += bool(ready)
                advance(sizes[number])
    return reused


def _task(row: dict[str, Any], *, task: Callable[[int, Any], bool]) -> dict[str, Any]:
    """Do one item unless that is done. A user's mistake comes back as text: it is not the task that failed."""
    number = int(row["number"])
    try:
        ready = task(number, pickle.loads(row["item"]))
    except UserError as error:
        return {"number": number, "error": str(error), "ready": False}
    return {"number": number, "error": "", "ready": ready}


def _find_duplicates(job: Job, parts: list[list[Unit]], say: Say) -> int:
    """Have the documents to leave out written down; the number of buckets that they are in."""
    reused = _run("data: hashing", functools.partial(duplicates.hash_part, job), parts, say)
    if reused:
        say(f"data: the documents of {reused} of {len(parts)} parts were hashed before")
    records = [record for number in range(len(parts)) if (record := duplicates.load_record(job.root, number))]
    if len(records) < len(parts):
        raise RuntimeError(f"hashes of documents disappeared from {job.root.path('duplicates')!r}")
    documents = sum(record.documents for record in records)
    buckets = duplicates.bucket_count(documents)
    digest = hashlib.sha256("".join(record.sha256 for record in records).encode()).hexdigest()
    task = functools.partial(_bucket_task, root=job.root, buckets=buckets, parts=len(parts), digest=digest)
    _run("data: comparing", task, [None] * buckets, say)
    return buckets


def _bucket_task(bucket: int, _: None, *, root: Folder, buckets: int, parts: int, digest: str) -> bool:
    return duplicates.compare_bucket(root, bucket, buckets, parts, digest)


def _check_unchanged(job: Job, records: list[PartRecord]) -> None:
    """UserError if a part has other bytes than when its documents were compared with those of others."""
    for number, record in enumerate(records if job.buckets else ()):
        hashed = duplicates.load_record(job.root, number)
        if hashed is None or hashed.source_sha256 != record.source_sha256:
            raise UserError(f"the corpus changed while it was being prepared: {record.units[0][0]!r} ...; start again")


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
        vocabulary_digest="" if config.has_images else vocabulary_digest(words),
        length=config.length,
        rows_per_group=config.rows_per_group,
        packing=config.packing,
        stride=config.stride,
        source=SourceFacts(
            kind=source.kind,
            identity=source.identity,
            version=getattr(source, "version", ""),
            units=len(units),
            bytes=sum(stop - start for _, start, stop, _ in units),
            sha256=hashlib.sha256(hashes.encode()).hexdigest(),
        ),
        config=config.content(),
        splits=splits,
        ngrams=None if config.has_images else _ngrams(root, train, words.size, config.length),
        pixels=_pixel_facts(config, whole, root, train, [record.images for record in records if record.images]),
        rejected=summed(record.rejects.counts for record in records),
        fingerprint="",
    )
    return manifest.model_copy(update={"fingerprint": manifest.content_fingerprint()})


def _ngrams(root: Folder, train: Split, size: int, length: int) -> NGrams | None:
    if size > ngrams.LARGEST_VOCABULARY:
        return None
    blocks = shards.blocks(root, train, length)
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


def _remove_leftovers(job: Job, manifest: Manifest, records: list[PartRecord]) -> None:
    """Delete what interrupted attempts left, perhaps on a corpus that has changed since, and the set does not need."""
    root = job.root
    needed = {shard.path for split in manifest.splits.values() for shard in split.shards}
    needed |= {record_file(number) for number in range(len(records))}
    needed |= {rejects.path(number) for number, record in enumerate(records) if record.rejects.sha256}
    if job.buckets:
        needed |= {file(n) for file in (duplicates.hashes_file, duplicates.record_file) for n in range(len(records))}
        needed |= {duplicates.bucket_file(bucket) for bucket in range(job.buckets)}
    for folder in (*SPLITS, "parts", "rejects", "duplicates"):
        for file, entry in root.list(folder).items():
            # Another process may be at work here too, making the same files: leave those that it is writing.
            if file.endswith(".tmp") and time.time() - entry.written < _STALE_SECONDS:
                continue
            if file not in needed:
                root.remove(file)
