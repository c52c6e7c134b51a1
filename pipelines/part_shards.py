"""What text and images have in common on their way to shards: the split of an example, and the shards of a part."""

import hashlib

import numpy as np

from pipelines import shards
from pipelines.config import DataConfig
from pipelines.manifest import Shard
from pipelines.storage import Folder


def write_shards(
    root: Folder, split: str, number: int, rows: np.ndarray, config: DataConfig, labels: np.ndarray | None = None
) -> list[Shard]:
    """Write the rows `[n, L]` of part `number` that are in a split, and their labels `[n]` if there are any."""
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
