"""What the preparation and the stream share in their use of Ray Data.

Ray's reading processes import this module and no torch with it, which takes seconds of a core in each of them.
"""

import logging
from collections.abc import Iterator

import numpy as np
import ray.data
from ray.data.block import Block, BlockAccessor

from md4.errors import UserError
from pipelines.row_cache import open_rows
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


def read_unit(
    root: Folder, split: str, fingerprint: str, cached: bool, steps: np.ndarray, rows: np.ndarray
) -> Iterator[Block]:
    """One block with these rows `[k]` of these steps `[k]`: columns `step`, `row`, `tokens [L]`.

    And `label`, where the set has labels. cached: from the decoded rows of this machine (`pipelines.row_cache`).

    A user's mistake, such as a damaged shard, comes as a block with the column `error`: it is an answer, not a failure
    that Ray should try again or wrap in traces.
    """
    try:
        source = (open_rows if cached else open_set)(root, split, fingerprint)
        tokens, labels = source.read_labelled(rows)
    except UserError as error:
        yield BlockAccessor.batch_to_block({"error": np.array([str(error)])})
        return
    known = {} if labels is None else {"label": labels}
    yield BlockAccessor.batch_to_block({"step": steps, "row": rows, "tokens": tokens, **known})
