"""Ending a run from outside, in order: its workers, their place in the cluster, its controller.

A process that is merely killed leaves the place of its workers taken: Ray gives a placement group back with the whole
job, or by a helper that needs the dashboard, which private clusters don't have.
"""

import threading
from collections.abc import Callable


class Stop:
    """Given to `orchestration.train.train`; from any thread `ask` ends the run that it was given to."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._abort: Callable[[], object] | None = None
        self.asked = False

    def ask(self) -> None:
        """End the run, now or as soon as it has a controller. Returns when the controller has been told."""
        with self._lock:
            self.asked = True
            abort = self._abort
        if abort is not None:
            abort()

    def arrange(self, abort: Callable[[], object]) -> None:
        """What ends the run from now on; of the trainer."""
        with self._lock:
            self._abort = abort
            asked = self.asked
        if asked:
            abort()


class Stopped(Exception):
    """The run was ended from outside; it can be resumed."""
