"""Times of a cron expression in a time zone.

The expression means what crontab(5) says, in its five fields: 0 and 7 are Sunday, and if day of month and day of week
are both restricted (neither begins with `*`), a day counts that fits either. What crontab(5) doesn't have is refused.

Where the clocks are changed:
- a time that doesn't exist that day is taken at the moment of the leap: 02:30 at 03:00, when 02:00 became 03:00. If
  several fall together there, with each other or with a time of its own, it is one;
- a time that exists twice is taken once, the first time. A schedule of every hour pauses in the second of the doubled
  ones.
"""

import functools
import re
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

from apscheduler.triggers.cron import CronTrigger

from md4.errors import UserError

_DAYS = ("sun", "mon", "tue", "wed", "thu", "fri", "sat")  # numbered as crontab(5) does; APScheduler begins with Monday
_MONTHS = ("jan", "feb", "mar", "apr", "may", "jun", "jul", "aug", "sep", "oct", "nov", "dec")
_FIELDS = {
    "minute": (0, 59, {}),
    "hour": (0, 23, {}),
    "day of month": (1, 31, {}),
    "month": (1, 12, {name: number for number, name in enumerate(_MONTHS, 1)}),
    "day of week": (0, 7, {name: number for number, name in enumerate(_DAYS)}),
}
_ITEM = re.compile(r"(?:\*|(?P<first>\w+)(?:-(?P<last>\w+))?)(?:/(?P<step>[0-9]+))?")
_YEARS = datetime(2001, 1, 1, tzinfo=UTC), datetime(2061, 1, 1, tzinfo=UTC)  # every date falls on every day of the week


class Schedule:
    """The times of `expression` in `zone`. UserError for an expression that crontab(5) doesn't have, or without times,
    and for an unknown zone."""

    def __init__(self, expression: str, zone: str = "UTC"):
        self.expression, self.zone = expression, _zone(zone)
        self._triggers = _triggers(expression)

    def between(self, after: datetime, until: datetime) -> Iterator[datetime]:
        """The times `after < time <= until`, in UTC, in order, each once."""
        last = after
        for time in self._since(after):
            if time > until:
                return
            if time > last:
                last = time
                yield time

    def next(self, after: datetime, count: int = 1) -> list[datetime]:
        """The next times after one, in UTC: `count` of them."""
        found: list[datetime] = []
        for time in self._since(after):
            if time > (found[-1] if found else after):
                found.append(time)
                if len(found) == count:
                    break
        return found

    def _since(self, after: datetime) -> Iterator[datetime]:
        """Times in UTC that do not go back; those up to `after` and repeated ones may be among them."""
        wall = after.astimezone(self.zone).replace(tzinfo=None, fold=0)
        while True:
            # On the wall every day has its 24 hours: the trigger is asked as if that were UTC.
            asked = wall.replace(tzinfo=UTC) + timedelta(microseconds=1)
            following = [time for each in self._triggers if (time := each.get_next_fire_time(None, asked))]
            if not following:  # the year 9999
                return
            wall = min(following).replace(tzinfo=None)
            yield _instant(wall, self.zone)


def _instant(wall: datetime, zone: ZoneInfo) -> datetime:
    """When clocks show that first; if they never do, when they leap over it."""
    first, second = (wall.replace(tzinfo=zone, fold=fold).astimezone(UTC) for fold in (0, 1))
    if second >= first:  # it is shown once or twice
        return first
    low, high = int(second.timestamp()), int(first.timestamp())  # the leap lies in low < leap <= high

    def offset(seconds: int) -> timedelta | None:
        return datetime.fromtimestamp(seconds, zone).utcoffset()

    before = offset(low)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if offset(middle) == before else (low, middle)
    return datetime.fromtimestamp(high, UTC)


def _zone(name: str) -> ZoneInfo:
    try:
        return ZoneInfo(name)
    except (ZoneInfoNotFoundError, ValueError, OSError):
        raise UserError(f"zone {name!r} is not a time zone of the IANA list: e.g. UTC or Europe/Berlin") from None


@functools.lru_cache(256)
def _triggers(expression: str) -> tuple[CronTrigger, ...]:
    fields = expression.split()
    if len(fields) != len(_FIELDS):
        raise UserError(
            f"schedule {expression!r} has {len(fields)} fields instead of 5: minute, hour, day of month, month, day of "
            "week, e.g. '30 2 * * 1-5'"
        )
    parsed = [_spans(text, field, expression) for text, field in zip(fields, _FIELDS, strict=True)]
    minute, hour, day, month, _ = (",".join(map(_written, spans)) for spans in parsed)
    found = {number % 7 for spans in parsed[4] for number in spans}
    weekdays = "*" if len(found) == 7 else ",".join(_DAYS[number] for number in sorted(found))
    if not fields[2].startswith("*") and not fields[4].startswith("*"):
        days = [(day, "*"), ("*", weekdays)]
    else:
        days = [(day, weekdays)]
    triggers = tuple(
        CronTrigger.from_crontab(f"{minute} {hour} {monthday} {month} {weekday}", timezone=UTC)
        for monthday, weekday in days
    )
    if all(_is_empty(each) for each in triggers):
        raise UserError(f"schedule {expression!r} has no times: there is no such day in any year")
    return triggers


def _is_empty(trigger: CronTrigger) -> bool:
    start, trigger.end_date = _YEARS
    first = trigger.get_next_fire_time(None, start)
    trigger.end_date = None
    return first is None


def _written(span: range) -> str:
    """As APScheduler reads it: its steps are not longer than their range."""
    if len(span) == 1:
        return str(span[0])
    return f"{span[0]}-{span[-1]}" + (f"/{span.step}" if span.step > 1 else "")


def _spans(text: str, field: str, expression: str) -> list[range]:
    """The numbers of a field. APScheduler would take more than crontab(5), and drop what it doesn't know."""
    lowest, highest, names = _FIELDS[field]

    def wrong(item: str, why: str) -> UserError:
        named = f" or {', '.join(names)}" if names else ""
        return UserError(
            f"schedule {expression!r}: {item!r} is no {field} ({why}): *, N, N-M, */STEP or N-M/STEP, with commas, "
            f"where numbers are {lowest} to {highest}{named}"
        )

    def number(word: str, item: str) -> int:
        if word.isascii() and word.isdigit():
            found = int(word)
        elif word.lower() in names:
            found = names[word.lower()]
        else:
            raise wrong(item, f"{word!r} is not a number")
        if not lowest <= found <= highest:
            raise wrong(item, f"{found} is out of range")
        return found

    spans = []
    for item in text.split(","):
        match = _ITEM.fullmatch(item)
        if match is None:
            raise wrong(item, "its form is wrong")
        step = int(match["step"] or 1)
        if step < 1:
            raise wrong(item, "a step is 1 or more")
        if match["first"] is None:
            first, last = lowest, 6 if field == "day of week" else highest
        else:
            first = number(match["first"], item)
            last = number(match["last"], item) if match["last"] else first
            if match["step"] and not match["last"]:
                raise wrong(item, "a step belongs to * or to a range")
            if last == 0 and first and match["last"] and field == "day of week" and not match["last"].isdigit():
                last = 7  # fri-sun
            if last < first:
                raise wrong(item, "a range goes upwards")
        spans.append(range(first, last + 1, step))
    return spans
