"""The evaluation between two steps: a bound of some validation rows, dealt out over the workers of a run."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from md4 import documents, noise
from md4.likelihood import mean_and_error, nelbo, ratio_and_error
from md4.objectives import MaskedDiffusion, bits_per_token
from orchestration.config import EvaluationConfig
from orchestration.zero import EngineState
from pipelines.shards import ShardSet


class Bound(NamedTuple):
    """Bits per token, of real ones, and the standard error over rows."""

    mean: float
    error: float


@torch.no_grad()
def validate(
    model: MaskedDiffusion,
    state: EngineState,
    validation: ShardSet,
    options: EvaluationConfig,
    size: int,
    seed: int,
    device: torch.device,
    labels_of: Callable[[np.ndarray | None], Tensor | None],
    at_pass: Callable[[], object],
) -> Bound:
    """Negative ELBO of `options.rows` rows, evenly spaced over the split, under the averaged weights. *Collective.*

    Args:
        size: rows of a pass.
        seed: of the run; the same rows get the same times and masks each time.
        labels_of: from labels `[n]` of rows to the classes `[n]` that the model wants, if any.
        at_pass: is called before each pass.
    """
    rank, world, end_of_rows = dist.get_rank(), dist.get_world_size(), validation.end_of_rows
    rows = min(options.rows, validation.rows)
    # Every worker makes the same number of passes (ZeRO-3 gathers weights in each): short shares are filled up with
    # rows that are not counted.
    places = torch.arange(math.ceil(rows / world)) * world + rank
    counted = places < rows
    ids = places.clamp(max=rows - 1) * validation.rows // rows
    bits, weights = [], []
    with state.averaged():
        for part in ids.split(size):
            at_pass()
            rows_of_part, labels = validation.read_labelled(part.numpy())
            tokens = torch.as_tensor(rows_of_part, dtype=torch.int64, device=device)
            real = None if end_of_rows is None else documents.no_padding(tokens, end_of_rows)
            nats = nelbo(
                model,
                tokens,
                draws=options.draws,
                seed=noise.key(seed, "evaluation"),
                ids=part.to(device),
                estimator=options.estimator,
                labels=labels_of(labels),
                real=real,
            )
            # Of padded rows bits and tokens apart: the figure is the ratio of their sums.
            bits.append(bits_per_token(nats.mean(1), tokens.shape[1] if real is None else 1).cpu())
            weights.append(torch.ones(len(part)) if real is None else real.sum(1).cpu())
    everyone: list[Any] = [None] * world
    dist.all_gather_object(everyone, (torch.cat(bits)[counted], torch.cat(weights)[counted]))
    values, tokens = (torch.cat(column) for column in zip(*everyone, strict=True))
    if end_of_rows is None:
        return Bound(*mean_and_error(values))
    return Bound(*ratio_and_error(values, tokens, torch.arange(rows)))
