"""What the preparation and the stream share in their use of Ray Data.

Ray's reading processes import this module and no torch with it, which takes seconds of a core in each of them.
"""

import logging
from collections.abc import Iterator

import numpy as np
import ray.data
from ray._private.ray_constants import WORKER_PROCESS_SETUP_HOOK_ENV_VAR
from ray.data.block import Block, BlockAccessor

from md4.errors import UserError
from pipelines.row_cache import Found, read_rows
from pipelines.shards import open_set
from pipelines.storage import Folder

# Processes that read don't import at their start what those import that they read for.
PLAIN_PROCESS = {"env_vars": {WORKER_PROCESS_SETUP_HOOK_ENV_VAR: ""}}


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

    And `label`, where the set has labels; `rows_read` and `bytes_read`, if something was read of the shards: what that
    was for the whole unit stands in the first row; `damage`, if decoded rows had to be made anew. cached: from the
    decoded rows of this machine (`pipelines.row_cache`).

    A user's mistake, such as a damaged shard, comes as a block with the column `error`: it is an answer, not a failure
    that Ray should try again or wrap in traces.
    """
    try:
        if cached:
            found = read_rows(root, split, fingerprint, rows)
        else:
            shards = open_set(root, split, fingerprint)
            before = shards.reads.copy()
            found = Found(*shards.read_labelled(rows), shards.reads - before, None)
    except UserError as error:
        yield BlockAccessor.batch_to_block({"error": np.array([str(error)])})
        return
    more: dict[str, np.ndarray] = {} if found.labels is None else {"label": found.labels}
    if found.cost.rows_read and len(rows):
        more |= {
            "rows_read": _first(found.cost.rows_read, len(rows)),
            "bytes_read": _first(found.cost.bytes, len(rows)),
        }
    if found.damage:
        more["damage"] = np.full(len(rows), found.damage)
    yield BlockAccessor.batch_to_block({"step": steps, "row": rows, "tokens": found.tokens, **more})


def _first(value: int, length: int) -> np.ndarray:
    """A column `[length]` that has the value in its first row, and zeros below."""
    column = np.zeros(length, np.int64)
    column[0] = value
    return column
