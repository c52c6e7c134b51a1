"""One part of a corpus to its shards, and the record of it; what the tasks of a preparation do (`pipelines.prepare`).

The task of a part of a text is in `pipelines.text_part`. The task of a part of a set of images makes each image a row
(`pipelines.images`), sends it to a split by a hash of its pixels, unless the source has that split itself, and shuffles
them. Both write shards and the side file of what was left out, and then a record `parts/00007.json` of what they did. A
part whose units, shards and side file are as recorded is not done again.
"""

from collections.abc import Sequence

import numpy as np

from md4.errors import UserError
from pipelines import duplicates, images, rejects, shards
from pipelines.manifest import SPLITS, Split
from pipelines.part_records import ImageRecord, Job, PartRecord, listed, load_record, record_file, same_corpus, summed
from pipelines.part_shards import assign, write_shards
from pipelines.text_part import prepare_text
from pipelines.units import Unit


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


def prepare_part(job: Job, number: int, units: list[Unit]) -> bool:
    """Prepare part `number`, unless that is done already, and say whether it was.

    UserError for units that cannot be read or used.
    """
    if _is_done(job, number, units):
        return True
    record = (_prepare_images if job.config.has_images else prepare_text)(job, number, units)
    job.root.write(record_file(number), record.model_dump_json(indent=1).encode() + b"\n")
    return False


def _is_done(job: Job, number: int, part: Sequence[Unit]) -> bool:
    record = load_record(job.root, number)
    return (
        record is not None
        and record.config == job.digest
        and same_corpus(record, part)
        and (job.config.has_images or record.tally is not None)  # earlier versions did not write one
        and record.duplicates == duplicates.digest(duplicates.left_out(job.root, number, job.buckets))
        and rejects.is_sound(job.root, number, record.rejects)
        and all(shards.is_sound(job.root, shard) for split in record.splits.values() for shard in split.shards)
    )


def _prepare_images(job: Job, number: int, part: Sequence[Unit]) -> PartRecord:
    config, whole = job.config, job.whole
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
        known = labels[rows] if True in labelled else None
        splits[name] = Split(
            documents=len(rows),
            characters=0,
            tokens=len(rows) * config.length,
            dropped_tokens=0,
            rows=len(rows),
            shards=write_shards(job.root, name, number, tokens[rows], config, known),
        )
    notes = [reading.notes for reading in readings]
    return PartRecord(
        config=job.digest,
        units=listed(part),
        source_sha256=[reading.sha256 for reading in readings],
        splits=splits,
        images=ImageRecord(
            labelled=None if not labelled else True in labelled,
            top_label=int(labels.max()) if len(labels) else images.NO_LABEL,
            converted=summed(note.converted for note in notes),
            rejected=summed(note.rejected for note in notes),
            examples=[example for note in notes for example in note.examples][: images.EXAMPLES],
        ),
        rejects=rejects.write(job.root, number, [record for note in notes for record in note.left_out]),
    )
