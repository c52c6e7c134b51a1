"""A world without waiting: a clock that is set, and a cluster that keeps jobs as Ray does."""

from collections.abc import Callable
from datetime import UTC, datetime, timedelta

from md4.errors import UserError
from orchestration.cron import Entry, Record, Service, Store
from orchestration.jobs import Job, State


def utc(text: str) -> datetime:
    return datetime.fromisoformat(text).replace(tzinfo=UTC)


class SetClock:
    """Time passes while somebody waits, and stops at `end`."""

    def __init__(self, now: datetime, end: datetime | None = None):
        self.time, self.end = now, end

    def now(self) -> datetime:
        return self.time

    def wait(self, seconds: float) -> bool:
        self.time += timedelta(seconds=max(seconds, 0.001))
        if self.end is None or self.time < self.end:
            return False
        self.time = self.end
        return True


class Cluster:
    """Jobs by submission id: each there once, running for as long as `lasts` says.

    ticks: is called where a request arrives and where its answer leaves; may raise.
    """

    def __init__(self, clock: SetClock, lasts: Callable[[str], float] = lambda _: 60.0):
        self.clock, self.lasts = clock, lasts
        self.begun: dict[str, datetime] = {}
        self.stopped: dict[str, datetime] = {}
        self.refused: set[str] = set()
        self.away: Callable[[datetime], bool] = lambda _: False
        self.ticks: Callable[[str], None] = lambda _: None

    def submit(self, job: Job, submission_id: str) -> bool:
        self._reach()
        self.ticks("submit arrives")
        if submission_id in self.refused:
            raise UserError("the cluster refuses it")
        new = submission_id not in self.begun
        if new:
            self.begun[submission_id] = self.clock.now()
        self.ticks("submit is answered")
        return new

    def state(self, submission_id: str) -> State | None:
        self._reach()
        self.ticks("state")
        if submission_id not in self.begun:
            return None
        if submission_id in self.stopped and self.stopped[submission_id] < self._end(submission_id):
            return State.STOPPED
        return State.SUCCEEDED if self.clock.now() >= self._end(submission_id) else State.RUNNING

    def stop(self, submission_id: str) -> None:
        self._reach()
        self.ticks("stop")
        self.stopped.setdefault(submission_id, self.clock.now())

    def spans(self) -> list[tuple[datetime, datetime]]:
        """From when to when each job ran, in order."""
        return sorted(
            (begun, min(self._end(id), self.stopped.get(id, self._end(id)))) for id, begun in self.begun.items()
        )

    def _end(self, submission_id: str) -> datetime:
        return self.begun[submission_id] + timedelta(seconds=self.lasts(submission_id))

    def _reach(self) -> None:
        if self.away(self.clock.now()):
            raise UserError("nobody answers at http://head:8265")


def entry(schedule: str, name: str = "nightly", limit: float | None = None, **facts) -> Entry:
    job = Job(verb="evaluate", arguments=("s3://bucket/runs/mine",), name=name, time_limit_s=limit)
    return Entry(name=name, schedule=schedule, job=job, **facts)


def run(store: Store, cluster: Cluster, until: datetime, look_s: float = 600) -> list[str]:
    """A service from now on until then; what it said."""
    said: list[str] = []
    cluster.clock.end = until
    Service(store, cluster, cluster.clock, said.append, look_s).run()
    return said


def outcomes(store: Store, name: str = "nightly") -> list[tuple[str, str]]:
    """(planned time, status) of each record, in order."""
    return [(f"{one.planned:%m-%d %H:%M}", one.status.value) for one in reversed(store.history(name))]


def check(store: Store, cluster: Cluster, entry: Entry, since: datetime, until: datetime) -> list[Record]:
    """The promise: every planned time has one record, and its job was at the cluster once if it ran, else never."""
    records = list(reversed(store.history(entry.name)))
    planned = list(entry.times().between(since, until))
    covered = [time for one in records for time in entry.times().between(one.planned - timedelta(seconds=1), one.last)]
    assert covered == planned
    for one in records:
        count = len(list(entry.times().between(one.planned - timedelta(seconds=1), one.last)))
        assert one.count == count
        if one.status.open:
            continue
        ran = one.status in ("succeeded", "failed", "stopped", "lost")
        assert (one.submission_id in cluster.begun) == ran, one
        assert ran or one.reason, one
    mine = {id for id in cluster.begun if id.startswith(f"cron-{entry.name}-2")}
    assert mine <= {one.submission_id for one in records}
    return records
