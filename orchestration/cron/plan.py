"""What is to be done now for one entry: a pure function of its records, what the cluster says, and the time.

What may already be at the cluster is never given up before the cluster has said that it isn't there, some time after
the last attempt: an answer that was lost is not a submission that failed.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta

from orchestration.cron.durations import duration
from orchestration.cron.entry import Entry
from orchestration.cron.records import Record, Status
from orchestration.jobs import State

SETTLE_S = 300  # after an attempt to submit, an unknown id may still turn up so long (slow upload, another service)
STOP_S = 60  # a job that ends itself at its time limit has so long for it, before the service stops it, and again
_ENDS = {State.SUCCEEDED: Status.SUCCEEDED, State.FAILED: Status.FAILED, State.STOPPED: Status.STOPPED}


@dataclass(frozen=True)
class Create:
    """Make a record, if its time has none."""

    record: Record


@dataclass(frozen=True)
class Change:
    """Replace a record, if it is still that one."""

    old: Record
    new: Record


@dataclass(frozen=True)
class Submit(Change):
    """The same, then submit its job."""


@dataclass(frozen=True)
class Stop(Change):
    """The same, then stop its job."""


Action = Create | Change


@dataclass(frozen=True)
class Situation:
    """What is known of an entry.

    entry: None when it was removed.
    job: digest of the entry's job.
    seen: every planned time up to it has a record.
    open: the records that are not closed, in order.
    answers: what the cluster says to their submission ids, None if it doesn't know one; without those that it could not
        be asked about, or that were never submitted.
    trouble: why it could not be asked.
    """

    entry: Entry | None
    job: str
    seen: datetime
    open: Sequence[Record]
    answers: Mapping[str, State | None]
    now: datetime
    trouble: str = ""


def plan(situation: Situation) -> list[Action]:
    """The actions that are due, in the order in which they are to be taken; none when nothing is left to do."""
    actions: list[Action] = []
    running: list[Record] = []
    unclear: list[Record] = []  # may be at the cluster
    waiting: list[Record] = []  # not at the cluster, for certain
    for record in situation.open:
        following = _follow(record, situation)
        if following is not None:
            actions.append(following)
        elif record.status is Status.RUNNING:
            running.append(record)
        elif _is_elsewhere(record, situation):
            waiting.append(record)
        else:
            unclear.append(record)
        if isinstance(following, Change) and following.new.status is Status.RUNNING:
            running.append(following.new)
    actions += _account(situation)
    if any(isinstance(action, Create) for action in actions):
        return actions  # the rest when these are made
    return actions + _decide(situation, running, unclear, waiting)


def account(entry: Entry, seen: datetime, now: datetime, status: Status, reason: str) -> Record | None:
    """One record for all times after `seen` up to now; None if there are none."""
    times = list(entry.times().between(seen, now))
    return _block(entry.name, times, now, status, reason) if times else None


def _follow(record: Record, situation: Situation) -> Change | None:
    """What the cluster's answer makes of a record."""
    now = situation.now
    if record.submission_id not in situation.answers:
        return None
    state = situation.answers[record.submission_id]
    if state is None:
        if record.status is not Status.RUNNING:
            return None
        return _close(record, Status.LOST, "the cluster no longer knows it", now, ended=now)
    submitted = record.submitted or now
    if state.over:
        return _close(
            record, _ENDS[state], record.reason if record.stopping else "", now, submitted=submitted, ended=now
        )
    started = record.started or (now if state is State.RUNNING else None)
    if record.status is not Status.RUNNING or started != record.started:
        update = {"status": Status.RUNNING, "reason": "", "submitted": submitted, "started": started}
        return Change(record, record.model_copy(update=update))
    limit = record.time_limit_s
    if limit is None or started is None:
        return None
    asked, patience = record.stopping or started, timedelta(seconds=STOP_S + (0 if record.stopping else limit))
    if now - asked <= patience:
        return None
    reason = f"stopped by the service: it did not end by itself at its time limit of {duration(limit)}"
    return Stop(record, record.model_copy(update={"stopping": now, "reason": reason}))


def _is_elsewhere(record: Record, situation: Situation) -> bool:
    """Is a waiting record's job not at the cluster, and not on its way there?"""
    if record.last_attempt is None:
        return True
    if record.submission_id not in situation.answers:
        return False
    return situation.now - record.last_attempt > timedelta(seconds=SETTLE_S)


def _account(situation: Situation) -> list[Action]:
    """Records for the times that have come since the last look. The last one runs, if it is not too late for that."""
    entry, now = situation.entry, situation.now
    if entry is None:
        return []
    if entry.paused:
        record = account(entry, situation.seen, now, Status.SKIPPED, "paused")
        return [Create(record)] if record else []
    times = list(entry.times().between(situation.seen, now))
    oldest = now - timedelta(seconds=entry.window_s)
    late = [time for time in times if time < oldest]
    timely = [time for time in times if time >= oldest]
    chosen, passed = (timely[-1], timely[:-1]) if timely else (None, [])
    actions: list[Action] = []
    if late:
        reason = f"found {duration(now - late[-1])} later; may be run {duration(entry.window_s)} late at most"
        actions.append(Create(_block(entry.name, late, now, Status.MISSED, reason)))
    if passed and chosen:
        reason = f"found late; the time {chosen:%Y-%m-%dT%H:%M:%SZ} stands for it"
        actions.append(Create(_block(entry.name, passed, now, Status.MISSED, reason)))
    if chosen:
        record = _block(entry.name, [chosen], now, Status.WAITING, "")
        facts = {"job": situation.job, "time_limit_s": entry.job.time_limit_s}
        actions.append(Create(record.model_copy(update=facts)))
    return actions


def _decide(situation: Situation, running: list[Record], unclear: list[Record], waiting: list[Record]) -> list[Action]:
    """What becomes of the records that wait."""
    entry, now = situation.entry, situation.now
    if entry is None or entry.paused:
        why = "the entry was removed" if entry is None else "paused"
        return [_close(record, Status.SKIPPED, f"{why} before it was submitted", now) for record in waiting]
    actions: list[Action] = []
    candidates = sorted(waiting + unclear, key=lambda record: record.planned)
    if not candidates:
        return []
    newest = candidates[-1]
    for record in waiting:
        if record is not newest:
            status = Status.SKIPPED if running or record.after else Status.MISSED
            reason = f"the time {newest.planned:%Y-%m-%dT%H:%M:%SZ} takes its place{_because(record, situation)}"
            actions.append(_close(record, status, reason, now))
    certain = newest in waiting
    begun = newest.first_attempt if newest.after else newest.planned  # its own waiting makes no run late
    if begun is not None and now - begun > timedelta(seconds=entry.window_s):
        if certain:
            reason = f"not submitted within {duration(entry.window_s)}{_because(newest, situation)}"
            actions.append(_close(newest, Status.MISSED, reason, now))
    elif running:
        before = running[-1].submission_id
        if certain and entry.overlap == "skip":
            actions.append(_close(newest, Status.SKIPPED, f"{before} has not ended", now))
        elif certain and newest.after is None:
            update = {"after": before, "reason": f"waits for the end of {before}"}
            actions.append(Change(newest, newest.model_copy(update=update)))
    elif all(record is newest for record in unclear) and not situation.trouble:
        update = {"first_attempt": newest.first_attempt or now, "last_attempt": now}
        actions.append(Submit(newest, newest.model_copy(update=update)))
    return actions


def _because(record: Record, situation: Situation) -> str:
    why = (record.reason if record.first_attempt else "") or situation.trouble
    return f": {why}" if why else ""


def _close(record: Record, status: Status, reason: str, now: datetime, **times: datetime) -> Change:
    return Change(record, record.model_copy(update={"status": status, "reason": reason, **times}))


def _block(name: str, times: list[datetime], now: datetime, status: Status, reason: str) -> Record:
    return Record(
        name=name, planned=times[0], last=times[-1], count=len(times), status=status, reason=reason, recorded=now
    )
