"""What is on its way through an engine: requests, texts to score, and how fast they end."""

import asyncio
import math
from collections.abc import Generator
from dataclasses import dataclass, field
from time import perf_counter
from typing import TYPE_CHECKING, Any

from md4 import samplers
from md4.samplers.rows import Rows
from orchestration.sampling import Request
from orchestration.serving.lanes import Lane, Member
from orchestration.serving.models import Score
from orchestration.serving.watching import Watch

if TYPE_CHECKING:
    from orchestration.runs import Loaded

_RATE_S = 10.0  # how far back the measured rate looks
_SHORTEST_S, _LONGEST_S = 1.0, 60.0  # waits that are advised


@dataclass(eq=False, kw_only=True)
class Waiter:
    """Who waits for something that the engine's thread does."""

    loop: asyncio.AbstractEventLoop
    result: "asyncio.Future[Any]"
    rows: int  # that count against the queue's bound
    arrived: float = field(default_factory=perf_counter)


@dataclass(eq=False, kw_only=True)
class Ticket(Member, Waiter):
    """A request on its way. Its result is an `Outcome`."""

    request: Request
    view: int  # tokens that the network sees
    watch: Watch | None = None
    begun: "asyncio.Future[Loaded] | None" = None  # of a watched request: the weights that it gets
    lane: Lane | None = None
    begun_at: float = 0.0
    first_token_at: float | None = None
    calls: int = 0
    ended: list[Rows] = field(default_factory=list)
    left: int = 0  # rows that have not ended


@dataclass(eq=False, kw_only=True)
class Scoring(Waiter):
    """Texts on their way. Their result is a list of `Score`."""

    work: Generator[int, None, list[Score]]


@dataclass(frozen=True)
class Outcome:
    """What the thread hands back of a request."""

    loaded: "Loaded"
    samples: samplers.Samples
    queue_s: float
    first_token_s: float | None


class Rate:
    """Rows that end in a second, lately."""

    def __init__(self) -> None:
        self._count = self._time = 0.0  # rows and seconds, those of long ago counting less
        self._last = perf_counter()

    def add(self, rows: int) -> None:
        now = perf_counter()
        kept = math.exp((self._last - now) / _RATE_S)
        self._count = self._count * kept + rows
        self._time = self._time * kept + _RATE_S * (1 - kept)
        self._last = now

    def seconds_for(self, rows: int) -> float:
        """How long so many rows take, as far as it makes sense to wait for them."""
        return min(max(rows * self._time / self._count, _SHORTEST_S), _LONGEST_S) if self._count else _SHORTEST_S
