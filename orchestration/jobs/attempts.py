"""A command as a child process, tried again while its job's policy allows it, ended when its time is over.

Exit codes: 0 done; 2 a mistake of the user's, which is never tried again; 124 over the time limit; 143 stopped; any
other one a failure.
"""

import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from types import FrameType
from typing import Any

import tenacity

from orchestration.jobs.spec import Job

DONE, MISTAKE, OVER_TIME, STOPPED = 0, 2, 124, 143
_LOOK_SECONDS = 0.1
# Ray signals all processes of a job at once: the child has most likely heard of it already, and need not twice.
_HEARD_SECONDS = 1.0
_END_SECONDS = 45.0  # that a child has to end itself, after which it is killed

Say = Callable[[str], None]


class Attempts:
    """The attempts of one job. Use from the main thread: signals are taken here.

    command: of the next attempt; asked before each, since a run that exists is to be resumed.
    progress: of what has been done, a number that grows, or None; asked after attempts that failed. Failures before it
        has grown are forgotten.
    clock: seconds; injected.
    """

    def __init__(
        self,
        job: Job,
        command: Callable[[], Sequence[str]],
        environment: Mapping[str, str],
        say: Say,
        progress: Callable[[], int | None] = lambda: None,
        clock: Callable[[], float] = time.monotonic,
        end_seconds: float = _END_SECONDS,
    ):
        self._job, self._command, self._environment = job, command, environment
        self._say, self._progress, self._clock = say, progress, clock
        self._end_seconds = end_seconds
        self._stop = threading.Event()
        self._began = clock()
        self._failures = 0  # in a row, without progress
        self._lost = 0.0  # seconds, of failed attempts and waits
        self._reached: int | None = None

    def run(self) -> int:
        """All attempts; gives the exit code of the last."""
        before = {number: signal.signal(number, self._on_signal) for number in (signal.SIGINT, signal.SIGTERM)}
        # Ray blocks SIGINT in its processes, and what they start inherits that.
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT, signal.SIGTERM})
        waits = tenacity.wait_exponential(self._job.retry.first_s, self._job.retry.longest_s)
        retrying = tenacity.Retrying(
            retry=tenacity.retry_if_result(lambda code: code not in (DONE, MISTAKE, OVER_TIME, STOPPED)),
            wait=lambda _: seconds_after(self._failures, waits),
            stop=self._is_spent,
            sleep=self._rest,
            retry_error_callback=lambda state: state.outcome.result(),  # type: ignore[union-attr]
        )
        try:
            return retrying(self._attempt)
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self._stop.set()

    # -- one attempt ------------------------------------------------------------------------------------------------

    def _attempt(self) -> int:
        if self._stop.is_set():
            return STOPPED
        if self._left() <= 0:
            return self._over_time()
        began = self._clock()
        child = subprocess.Popen(list(self._command()), env=dict(self._environment))
        code = self._wait(child)
        if code not in (DONE, MISTAKE, OVER_TIME, STOPPED):
            self._lost += self._clock() - began
            reached = self._progress()
            if reached is not None and self._reached is not None and reached > self._reached:
                self._failures = 0
            self._reached = reached if reached is not None else self._reached
            self._failures += 1
        return code

    def _wait(self, child: subprocess.Popen[Any]) -> int:
        while (code := _poll(child, _LOOK_SECONDS)) is None:
            if self._stop.is_set():
                self._say("stopped: the command is asked to end")
                self._end(child, _HEARD_SECONDS)
                return STOPPED
            if self._left() <= 0:
                self._over_time()
                self._end(child, 0)
                return OVER_TIME
        return STOPPED if self._stop.is_set() else code if code >= 0 else 128 - code

    def _end(self, child: subprocess.Popen[Any], heard_seconds: float) -> None:
        """SIGINT, as by Ctrl-C; SIGKILL to what does not end."""
        if _poll(child, heard_seconds) is not None:
            return
        child.send_signal(signal.SIGINT)
        if _poll(child, self._end_seconds) is None:
            self._say(f"it did not end within {self._end_seconds:.0f} s, and is killed")
            child.kill()
            child.wait()

    def _left(self) -> float:
        limit = self._job.time_limit_s
        return float("inf") if limit is None else limit - (self._clock() - self._began)

    def _over_time(self) -> int:
        self._say(f"over its time limit of {self._job.time_limit_s:g} s: the command is asked to end")
        return OVER_TIME

    # -- between attempts -------------------------------------------------------------------------------------------

    def _is_spent(self, state: tenacity.RetryCallState) -> bool:
        retry, code = self._job.retry, state.outcome and state.outcome.result()
        if self._failures >= retry.attempts:
            self._say(f"attempt {state.attempt_number} failed (exit code {code}): {self._failures} in a row, no more")
            return True
        lost = self._lost + state.upcoming_sleep
        if retry.budget_s is not None and lost > retry.budget_s:
            self._say(
                f"attempt {state.attempt_number} failed (exit code {code}): another one would exceed the budget of "
                f"{retry.budget_s:g} s for failures ({self._lost:.0f} s are spent), no more"
            )
            return True
        self._say(
            f"attempt {state.attempt_number} failed (exit code {code}), failure {self._failures} of "
            f"{retry.attempts}; the next in {state.upcoming_sleep:.0f} s"
        )
        return False

    def _rest(self, seconds: float) -> None:
        """Wait before the next attempt, but for a signal or the end of the time."""
        self._stop.wait(max(0.0, min(seconds, self._left(), threading.TIMEOUT_MAX)))
        self._lost += seconds


def seconds_after(failures: int, waits: tenacity.wait.wait_base) -> float:
    """How long to wait after so many failures; tenacity itself counts attempts."""
    state = tenacity.RetryCallState(tenacity.Retrying(), None, (), {})
    state.attempt_number = failures
    return waits(state)


def _poll(child: subprocess.Popen[Any], seconds: float) -> int | None:
    try:
        return child.wait(seconds)
    except subprocess.TimeoutExpired:
        return None


def say(text: str) -> None:
    """A line of a job's log that is not the command's."""
    print(f"job: {text}", flush=True, file=sys.stderr)
