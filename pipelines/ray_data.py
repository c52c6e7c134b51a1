"""What the preparation and the stream share in their use of Ray Data.

Ray's reading processes import this module and no torch with it, which takes seconds of a core in each of them.
"""

import logging
from collections.abc import Iterator

import numpy as np
import ray.data
from ray.data.block import Block, BlockAccessor

from md4.errors import UserError
from pipelines.shards import open_set
from pipelines.storage import Folder


def quiet(dataset: ray.data.Dataset) -> ray.data.Dataset:
    """The same dataset, whose execution draws no progress bars and logs nothing below warnings."""
    logging.getLogger("ray.data").setLevel(logging.WARNING)
    logging.getLogger("ray.data._internal.progress").setLevel(logging.ERROR)  # warns that there will be no bars
    context = dataset.context
    context.enable_progress_bars = False
    context.enable_operator_progress_bars = False
    context.print_on_execution_start = False
    return dataset


def read_unit(root: Folder, split: str, fingerprint: str, start: int, rows: np.ndarray) -> Iterator[Block]:
    """One block with the rows `[steps, n]` of the steps from `start` on: columns `step`, `row`, `tokens [L]`.

    And `label`, where the set has labels.

    A user's mistake, such as a damaged shard, comes as a block with the column `error`: it is an answer, not a failure
    that Ray should try again or wrap in traces.
    """
    try:
        tokens, labels = open_set(root, split, fingerprint).read_labelled(rows.ravel())
    except UserError as error:
        yield BlockAccessor.batch_to_block({"error": np.array([str(error)])})
        return
    steps = np.repeat(np.arange(start, start + len(rows)), rows.shape[1])
    known = {} if labels is None else {"label": labels}
    yield BlockAccessor.batch_to_block({"step": steps, "row": rows.ravel(), "tokens": tokens, **known})
