"""Entries and what became of their times, as tables for people and as trees for JSON."""

from collections.abc import Iterable, Sequence
from datetime import datetime, tzinfo
from typing import Any

from rich.table import Table

from md4.errors import UserError
from orchestration.cron.durations import duration
from orchestration.cron.records import Record, Status
from orchestration.cron.store import Stored

_STYLES = {
    Status.RUNNING: "cyan", Status.SUCCEEDED: "green", Status.FAILED: "red", Status.LOST: "red",
    Status.STOPPED: "yellow", Status.SKIPPED: "yellow", Status.MISSED: "red",
}  # fmt: skip
Listed = Iterable[tuple[str, Stored | UserError, Record | None]]


def entries(found: Listed, now: datetime) -> Table:
    """A row an entry, its next two times in its zone."""
    table = _table("name", "at", "zone", "next", "last", "command")
    for name, stored, last in found:
        if isinstance(stored, UserError):
            table.add_row(name, "can't be read", "", "", "", str(stored), style="red")
            continue
        entry = stored.entry
        zone = entry.times().zone
        coming = "\n".join(f"{time.astimezone(zone):%Y-%m-%d %H:%M %Z}" for time in entry.times().next(now, 2))
        table.add_row(
            name,
            entry.schedule,
            entry.zone,
            "paused" if entry.paused else coming,
            f"{last.status} {_span(last, zone)}" if last else "-",
            entry.job.typed or entry.job.command,
            style=_STYLES.get(last.status) if last and not last.status.open else None,
        )
    return table


def entries_tree(found: Listed, now: datetime) -> list[dict[str, Any]]:
    """The same for JSON; times in UTC."""
    trees = []
    for name, stored, last in found:
        if isinstance(stored, UserError):
            trees.append({"name": name, "error": str(stored)})
            continue
        times = [] if stored.entry.paused else stored.entry.times().next(now, 2)
        facts = {"next": [time.isoformat() for time in times], "last": last and record_tree(last)}
        trees.append(stored.entry.model_dump(mode="json") | {"since": stored.since.isoformat()} | facts)
    return trees


def history(records: Sequence[Record], zone: tzinfo) -> Table:
    """A row a record, times in a zone."""
    table = _table("planned", "outcome", "took", "began", "job or reason")
    for one in records:
        begun = one.started or one.submitted
        what = [*([one.submission_id] if begun else []), *([one.reason] if one.reason else [])]
        table.add_row(
            _span(one, zone),
            one.status.value,
            "" if one.seconds is None else duration(one.seconds),
            f"{begun.astimezone(zone):%Y-%m-%d %H:%M:%S}" if begun else "",
            "; ".join(what),
            style=_STYLES.get(one.status),
        )
    return table


def record_tree(record: Record) -> dict[str, Any]:
    """A record for JSON."""
    begun = record.submitted is not None
    return record.model_dump(mode="json") | {
        "submission_id": record.submission_id if begun else None,
        "seconds": record.seconds,
    }


def _span(record: Record, zone: tzinfo) -> str:
    first = f"{record.planned.astimezone(zone):%Y-%m-%d %H:%M %Z}"
    if record.count == 1:
        return first
    return f"{first} .. {record.last.astimezone(zone):%Y-%m-%d %H:%M %Z} ({record.count})"


def _table(*titles: str) -> Table:
    table = Table(box=None, pad_edge=False)
    for title in titles:
        table.add_column(title, overflow="fold", no_wrap=title in ("name", "at", "next", "planned", "began"))
    return table
