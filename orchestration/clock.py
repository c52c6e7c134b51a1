"""Where a worker's time goes."""

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

CAUSES = ("train", "data", "evaluation", "checkpoint")


class Clock:
    """Seconds by cause: training steps, waiting for data, evaluation, checkpoints in the way of all that.

    spent: those of the work that this one goes on with.
    """

    def __init__(self, spent: Mapping[str, float] | None = None):
        self._spent = dict.fromkeys(CAUSES, 0.0) | dict(spent or {})
        self._now = "train"
        self._since = time.perf_counter()

    @contextmanager
    def spending(self, cause: str) -> Iterator[None]:
        """Time inside the block is of this cause."""
        before = self._switch(cause)
        try:
            yield
        finally:
            self._switch(before)

    def shift(self, seconds: float, source: str, target: str) -> None:
        """Seconds that were taken for one cause were of another."""
        self._spent[source] -= seconds
        self._spent[target] += seconds

    def spent(self) -> dict[str, float]:
        """Seconds by cause until now. From any thread."""
        found = dict(self._spent)
        found[self._now] += time.perf_counter() - self._since
        return found

    def _switch(self, cause: str) -> str:
        now, before = time.perf_counter(), self._now
        self._spent[before] += now - self._since
        self._now, self._since = cause, now
        return before
