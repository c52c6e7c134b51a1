"""Small prepared sets, written directly: what the tests of readers need, without a preparation."""

from typing import Any

import numpy as np

from pipelines import shards
from pipelines.manifest import FORMAT, MANIFEST, VERSION, Manifest, SourceFacts, Split
from pipelines.storage import Folder, Place

LENGTH, GROUP = 8, 10  # tokens of a row, rows of a row group


def some_rows(count: int, length: int = LENGTH, seed: int = 0) -> np.ndarray:
    """Tokens `[count, length]` of the 27, all rows different: their first five tokens spell the row's number."""
    rows = np.random.default_rng(seed).integers(0, 27, (count, length)).astype(np.uint8)
    numbers = np.arange(count)
    for digit in range(5):
        rows[:, digit] = numbers // 26**digit % 26
    return rows


def write_set(
    root: Place, files: list[np.ndarray], rows_per_group: int, split: str = "train", **facts: Any
) -> Manifest:
    """A prepared set whose split `split` consists of these files of rows `[n, L]`; `facts` of its manifest."""
    written = [
        shards.write_shard(root, f"{split}/{number:05d}-0000.parquet", rows, rows_per_group)
        for number, rows in enumerate(files)
    ]
    count = sum(len(rows) for rows in files)
    length = files[0].shape[1]
    whole = Split(
        documents=1,
        characters=count * length,
        tokens=count * length,
        dropped_tokens=0,
        rows=count,
        shards=written,
    )
    manifest = Manifest(
        format=FORMAT,
        version=VERSION,
        vocabulary="text8",
        vocabulary_size=27,
        length=length,
        rows_per_group=rows_per_group,
        source=SourceFacts(kind="text", identity="made by a test", units=1, bytes=count * length, sha256=""),
        config={},
        splits={split: whole},
        ngrams=None,
        fingerprint="",
    )
    manifest = manifest.model_copy(update=facts)
    manifest = manifest.model_copy(update={"fingerprint": manifest.content_fingerprint()})
    Folder(root).write(MANIFEST, manifest.model_dump_json().encode())
    return manifest


def in_id_order(files: list[np.ndarray], rows_per_group: int) -> np.ndarray:
    """All rows by their ids, from the definition: those of whole row groups, then those of the short ones."""
    whole = [rows[: len(rows) // rows_per_group * rows_per_group] for rows in files]
    short = [rows[len(rows) // rows_per_group * rows_per_group :] for rows in files]
    return np.concatenate(whole + short)
