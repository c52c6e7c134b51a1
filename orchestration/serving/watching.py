"""Between the thread that samples and the one who watches: what a sample looks like now, and what has changed.

The engine's thread leaves snapshots, the event loop takes them and tells the differences. Of each sample a few
snapshots are kept. When a slow reader leaves more to lie, the oldest are thrown away: a difference then tells of
several calls, and nothing grows.
"""

import asyncio
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

from torch import Tensor

from md4.samplers import Job
from orchestration.sampling import ModelFacts, Request, text_end
from orchestration.serving.events import Begun, Canvas, Step

KEPT = 16  # snapshots of a sample


class Snapshot(NamedTuple):
    """A row after one of its calls, on the CPU."""

    calls: int
    tokens: Tensor  # [T]
    ended: bool = False


@dataclass(eq=False)
class Watch:
    """Snapshots of the rows of one request. `put` is for the engine's thread, all else for the event loop."""

    rows: int
    changed: asyncio.Event = field(default_factory=asyncio.Event)
    _snapshots: list[deque[Snapshot]] = field(init=False)

    def __post_init__(self) -> None:
        self._snapshots = [deque(maxlen=KEPT) for _ in range(self.rows)]

    def put(self, row: int, snapshot: Snapshot) -> None:
        self._snapshots[row].append(snapshot)  # atomic, and so is popleft

    def take(self) -> list[tuple[int, Snapshot]]:
        """The oldest snapshot of each row that has any."""
        return [(row, waiting.popleft()) for row, waiting in enumerate(self._snapshots) if waiting]


class Canvases:
    """What the reader knows of the samples of one request.

    piece: the words of a token.
    """

    def __init__(
        self,
        request: Request,
        job: Job,
        mask: int,
        shape: tuple[int, int, int] | None,
        piece: Callable[[int], str],
    ):
        self.request, self.job, self.mask, self.shape, self.piece = request, job, mask, shape, piece
        shown = min(job.canvas.shape[1], request.length or job.canvas.shape[1])  # behind it there is padding
        self._told = [row[:shown].clone() for row in job.canvas.cpu()]

    def begun(self, model: ModelFacts) -> Begun:
        samples = []
        for row, tokens in enumerate(self._told):
            known = [None if token == self.mask else token for token in tokens.tolist()]
            words = known if self.shape else [None if token is None else self.piece(token) for token in known]
            samples.append(Canvas(seed=self.request.seed + row, canvas=words))
        return Begun(model=model, samples=samples, shape=self.shape)

    def step(self, row: int, snapshot: Snapshot) -> Step | None:
        """What the reader is to be told of a row; None if nothing has changed."""
        told, tokens = self._told[row], snapshot.tokens
        end = len(told)
        if snapshot.ended:  # behind the stop token nothing but stop tokens
            end = text_end(self.request, self.job, tokens, self.job.canvas[row] == self.mask)[0]
        tokens = tokens[:end]
        changed = (tokens != told[: len(tokens)]).nonzero()[:, 0]
        if len(changed) == 0:
            return None
        told[changed] = tokens[changed]
        now = told[changed]
        hidden = now == self.mask
        positions, values = changed[~hidden].tolist(), now[~hidden].tolist()
        return Step(
            sample=row,
            call=snapshot.calls - 1,
            positions=positions,
            pieces=None if self.shape else [self.piece(token) for token in values],
            levels=values if self.shape else None,
            hidden=changed[hidden].tolist(),
        )
