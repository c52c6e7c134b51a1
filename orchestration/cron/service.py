"""Submits jobs at their times, and notes what becomes of them.

It may be ended or killed at any moment, and another one may run beside it: what it knows is in the store.
Clocks of services that share a store may differ by a minute, and a submission may take three (`plan.SETTLE_S`).
"""

import threading
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Protocol

from md4.errors import UserError
from orchestration.cron.entry import Entry
from orchestration.cron.plan import Action, Create, Situation, Stop, Submit, plan
from orchestration.cron.records import Record, Status
from orchestration.cron.store import Ledger, Store, Stored
from orchestration.jobs import Job, State

LOOK_S = 30.0
RUNNING_S = 10.0  # how soon the end of a run is noticed
_FIRST_S = 5.0  # after the cluster or the store could not be reached; doubled each time, up to the usual pause
_PROMPT_S = 30.0  # from a look at the clock to the attempt to submit that is noted with that time
_ROUNDS = 50  # of one entry in one look


class Clock(Protocol):
    """What time it is, and waiting."""

    def now(self) -> datetime:
        """With its zone."""
        ...

    def wait(self, seconds: float) -> bool:
        """Wait; True if the service is to end."""
        ...


class SystemClock:
    """This machine's. `stop.set()` ends the service that waits."""

    def __init__(self) -> None:
        self.stop = threading.Event()

    def now(self) -> datetime:
        return datetime.now(UTC)

    def wait(self, seconds: float) -> bool:
        return self.stop.wait(seconds)


class Cluster(Protocol):
    """What the service asks of `orchestration.jobs.Jobs`."""

    def submit(self, job: Job, submission_id: str) -> bool: ...

    def state(self, submission_id: str) -> State | None: ...

    def stop(self, submission_id: str) -> None: ...


class Service:
    """say: is told what happens, a line each. look_s: seconds within which it notices entries that others change."""

    def __init__(
        self, store: Store, cluster: Cluster, clock: Clock, say: Callable[[str], None] = print, look_s: float = LOOK_S
    ):
        self._store, self._cluster, self._clock, self._tell, self._look_s = store, cluster, clock, say, look_s
        self._ledgers: dict[str, Ledger] = {}
        self._entries: dict[str, Entry] = {}
        self._away = ""  # why the cluster could not be asked in this look
        self.trouble = ""  # the last that was in the way in this look
        self._said: dict[str, str] = {}  # the trouble that was said last, by where it is

    def run(self) -> None:
        """Go on until the clock says to end. UserError if the store can't be read at the beginning."""
        failures, first = 0, True
        while True:
            try:
                self.look()
                self._mention("the store", "")
                failures = failures + 1 if self.trouble else 0
            except (UserError, OSError) as error:
                if first:
                    raise
                failures += 1
                self._mention("the store", str(error))
            first = False
            if self._clock.wait(self._pause(failures)):
                return

    def look(self) -> None:
        """Do everything that is due now."""
        self._away = self.trouble = ""
        found = dict(self._store.entries())
        for name in found if self._ledgers else self._store.names():
            self._ledgers.setdefault(name, self._store.ledger(name))
        self._entries = {name: stored.entry for name, stored in found.items() if isinstance(stored, Stored)}
        for name, ledger in self._ledgers.items():
            stored = found.get(name)
            try:
                trouble = str(stored) if isinstance(stored, UserError) else self._look_at(stored, ledger)
            except (UserError, OSError) as error:  # one entry's must not stop the others
                trouble = str(error)
            self._mention(name, trouble)
            self.trouble = trouble or self.trouble
        self._mention("the cluster", self._away)

    def next(self) -> datetime | None:
        """The next time of any entry."""
        now = self._clock.now()
        times = [time for entry in self._entries.values() if not entry.paused for time in entry.times().next(now)]
        return min(times, default=None)

    def _pause(self, failures: int) -> float:
        """Seconds until the next look."""
        if failures:
            longest = min(self._look_s, _FIRST_S * 2 ** min(failures - 1, 10))
        else:
            busy = any(ledger.open for ledger in self._ledgers.values())
            longest = min(self._look_s, RUNNING_S) if busy else self._look_s
        coming = self.next()
        until = (coming - self._clock.now()).total_seconds() if coming else longest
        return max(0.0, min(longest, until))

    def _look_at(self, stored: Stored | None, ledger: Ledger) -> str:
        """Plan and act until nothing is left to do, or something is in the way: that is returned."""
        for _ in range(_ROUNDS):
            now = self._clock.now()
            seen = ledger.look(now)
            if stored is not None:
                seen = max(seen, stored.since)
            answers = self._ask(ledger.open)
            actions = plan(
                Situation(
                    entry=stored.entry if stored else None,
                    job=stored.job if stored else "",
                    seen=seen,
                    open=ledger.open,
                    answers=answers,
                    now=now,
                    trouble=self._away,
                )
            )
            if not actions:
                break
            if trouble := self._act(actions, now):
                return trouble
        return ""

    def _ask(self, records: list[Record]) -> dict[str, State | None]:
        """The cluster's answers about what may have been submitted."""
        answers: dict[str, State | None] = {}
        for record in records:
            if record.first_attempt is None or self._away:
                continue
            try:
                answers[record.submission_id] = self._cluster.state(record.submission_id)
            except UserError as error:
                self._away = self.trouble = str(error)
        return answers

    def _act(self, actions: list[Action], now: datetime) -> str:
        """Take the actions, in order, until another service was there first. What the cluster refused, if it did."""
        for action in actions:
            if isinstance(action, Create):
                if not self._store.create(action.record):
                    return ""
                self._say(action.record)
                continue
            if not self._store.change(action.old, action.new):
                return ""
            if isinstance(action, Submit) and (self._clock.now() - now).total_seconds() > _PROMPT_S:
                return ""  # the attempt that was noted is not this one: look again
            try:
                if isinstance(action, Submit):
                    self._submit(action.new)
                elif isinstance(action, Stop):
                    self._say(action.new)
                    self._cluster.stop(action.new.submission_id)
                elif action.new.status is not action.old.status:
                    self._say(action.new)
            except UserError as error:
                if isinstance(action, Submit):
                    self._store.change(action.new, action.new.model_copy(update={"reason": str(error)}))
                return str(error)
        return ""

    def _submit(self, record: Record) -> None:
        self._cluster.submit(self._store.job(record.job), record.submission_id)
        update = {"status": Status.RUNNING, "reason": "", "submitted": self._clock.now()}
        if self._store.change(record, running := record.model_copy(update=update)):
            self._say(running)

    def _say(self, record: Record) -> None:
        zone = self._entries[record.name].times().zone if record.name in self._entries else UTC
        times = f"{record.planned.astimezone(zone):%Y-%m-%d %H:%M %Z}"
        if record.count > 1:
            times += f" .. {record.last.astimezone(zone):%Y-%m-%d %H:%M %Z} ({record.count} times)"
        what = "submitted" if record.status is Status.RUNNING and record.started is None else record.status.value
        self._tell(f"{record.name} {times}: {what}{f' ({record.reason})' if record.reason else ''}")

    def _mention(self, where: str, trouble: str) -> None:
        """Say what is wrong when it begins or changes, and when it is over."""
        if trouble != self._said.get(where, ""):
            self._tell(f"{where}: {trouble or 'all right again'}")
        self._said[where] = trouble
