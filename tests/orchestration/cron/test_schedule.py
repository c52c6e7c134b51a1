"""When a cron expression's times are."""

from datetime import UTC, datetime, timedelta
from itertools import pairwise
from zoneinfo import ZoneInfo

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from md4.errors import UserError
from orchestration.cron.schedule import Schedule
from tests.orchestration.cron.world import utc


def walls(expression: str, zone: str, after: str, until: str) -> list[str]:
    """The times as clocks there show them, with their offset from UTC."""
    times = Schedule(expression, zone).between(utc(after), utc(until))
    return [f"{time.astimezone(ZoneInfo(zone)):%d %H:%M %z}" for time in times]


@pytest.mark.parametrize(
    ("expression", "days"),
    [
        ("0 3 * * 0", "Sun"), ("0 3 * * 7", "Sun"), ("0 3 * * 1", "Mon"), ("0 3 * * 6", "Sat"),
        ("0 3 * * sun", "Sun"),
        ("0 3 * * 1-5", "Mon Tue Wed Thu Fri"), ("0 3 * * 5-7", "Fri Sat Sun"), ("0 3 * * 0-2", "Sun Mon Tue"),
        ("0 3 * * mon-fri", "Mon Tue Wed Thu Fri"), ("0 3 * * Fri-Sun", "Fri Sat Sun"),
        ("0 3 * * 1-5/2", "Mon Wed Fri"), ("0 3 * * */2", "Sun Tue Thu Sat"), ("0 3 * * sat,1", "Mon Sat"),
        ("0 3 * * 0-7", "Sun Mon Tue Wed Thu Fri Sat"),
    ],
)  # fmt: skip
def test_days_of_the_week_are_those_of_crontab(expression, days):
    times = Schedule(expression).between(utc("2026-11-01"), utc("2026-11-08"))
    assert sorted({f"{time:%a}" for time in times}) == sorted(days.split())


def test_a_day_counts_that_fits_either_of_two_restrictions():
    times = list(Schedule("0 0 13 * 5").between(utc("2026-10-31"), utc("2026-11-30")))
    assert [time.day for time in times] == [6, 13, 20, 27]  # the 13th is a Friday
    times = list(Schedule("0 0 1,15 * mon").between(utc("2026-10-31"), utc("2026-11-30")))
    assert [time.day for time in times] == [1, 2, 9, 15, 16, 23, 30]
    times = list(Schedule("0 0 */10 * mon").between(utc("2025-12-31"), utc("2026-12-31")))  # begins with *: both
    assert [(time.month, time.day) for time in times if time.month < 7] == [(5, 11), (6, 1)]
    assert {f"{time:%a}" for time in times} == {"Mon"}


@given(
    st.sampled_from(["* * * * *", "*/7 */5 * * *", "13 4 * * 1-5", "0 0 29 2 *", "5,35 9-17 1-7 jan-jun sun"]),
    st.datetimes(datetime(2020, 1, 1), datetime(2030, 1, 1)),
)
@settings(max_examples=12, deadline=None)
def test_times_are_those_that_the_fields_allow(expression, start):
    """Against the definition: every minute of three days is asked."""

    def allows(time: datetime) -> bool:
        numbers = (time.minute, time.hour, time.day, time.month, time.isoweekday() % 7)
        first = [
            {"* * * * *": True}.get(expression),
            expression.startswith("*/7") and numbers[0] % 7 == 0 and numbers[1] % 5 == 0,
            expression.startswith("13") and numbers[:2] == (13, 4) and 1 <= numbers[4] <= 5,
            expression.startswith("0 0 29") and numbers[:4] == (0, 0, 29, 2),
            expression.startswith("5,35") and numbers[0] in (5, 35) and 9 <= numbers[1] <= 17 and numbers[3] <= 6
            and (numbers[2] <= 7 or numbers[4] == 0),
        ]  # fmt: skip
        return any(first)

    start = start.replace(second=0, microsecond=0, tzinfo=UTC)
    minutes = [start + timedelta(minutes=number) for number in range(1, 3 * 24 * 60 + 1)]
    assert list(Schedule(expression).between(start, minutes[-1])) == [time for time in minutes if allows(time)]


def test_a_time_that_is_leapt_over_is_taken_at_the_leap():
    berlin = ("Europe/Berlin", "2026-03-28T00:00", "2026-03-30T12:00")  # 02:00 -> 03:00 on the 29th
    assert walls("30 2 * * *", *berlin) == ["28 02:30 +0100", "29 03:00 +0200", "30 02:30 +0200"]
    assert walls("0 2 * * *", *berlin)[1] == "29 03:00 +0200"
    assert walls("30 3 * * *", *berlin)[1] == "29 03:30 +0200"
    new_york = ("America/New_York", "2026-03-08T05:00", "2026-03-09T05:00")
    assert walls("15 2 * * *", *new_york) == ["08 03:00 -0400"]
    # With times of its own it is one; nothing comes twice, nothing is out of order.
    assert walls("*/30 1-3 * * *", "Europe/Berlin", "2026-03-28T23:30", "2026-03-29T03:00") == [
        "29 01:00 +0100", "29 01:30 +0100", "29 03:00 +0200", "29 03:30 +0200",
    ]  # fmt: skip


def test_a_time_that_comes_twice_is_taken_once():
    berlin = ("Europe/Berlin", "2026-10-24T12:00", "2026-10-26T12:00")  # 03:00 -> 02:00 on the 25th
    assert walls("30 2 * * *", *berlin) == ["25 02:30 +0200", "26 02:30 +0100"]
    assert walls("30 1 * * *", "America/New_York", "2026-11-01T04:00", "2026-11-02T04:00") == ["01 01:30 -0400"]
    assert walls("0 * * * *", "Europe/Berlin", "2026-10-24T23:30", "2026-10-25T03:00") == [
        "25 02:00 +0200", "25 03:00 +0100", "25 04:00 +0100",
    ]  # fmt: skip


def test_asked_from_within_the_doubled_hour():
    schedule = Schedule("30 2 * * *", "Europe/Berlin")
    assert schedule.next(utc("2026-10-25T01:15")) == [utc("2026-10-26T01:30")]  # 02:15, the second time
    assert schedule.next(utc("2026-10-25T00:15")) == [utc("2026-10-25T00:30")]


def test_zones_with_half_hours():
    assert Schedule("0 9 * * *", "Asia/Kolkata").next(utc("2026-11-01")) == [utc("2026-11-01T03:30")]
    # Lord Howe Island changes its clocks by half an hour: 02:00 -> 02:30 on 4 October, 02:00 -> 01:30 on 5 April.
    assert walls("15 2 * * *", "Australia/Lord_Howe", "2026-10-03T12:00", "2026-10-04T14:00") == ["04 02:30 +1100"]
    assert walls("45 1 * * *", "Australia/Lord_Howe", "2026-04-04T12:00", "2026-04-05T14:00") == ["05 01:45 +1100"]


def test_a_day_that_a_zone_left_out():
    """Samoa went from 29 to 31 December 2011."""
    times = walls("0 12 * * *", "Pacific/Apia", "2011-12-28T23:00", "2012-01-01T12:00")
    assert times == ["29 12:00 -1000", "31 00:00 +1400", "31 12:00 +1400", "01 12:00 +1400"]


@given(
    st.sampled_from(["Europe/Berlin", "America/New_York", "Australia/Lord_Howe", "Asia/Kolkata", "Africa/Casablanca"]),
    st.sampled_from(["*/5 * * * *", "30 2 * * *", "0 */3 * * *", "59 1,2 * * 0"]),
    st.lists(st.floats(0, 1), min_size=1, max_size=8),
)
@settings(max_examples=15, deadline=None)
def test_cut_anywhere_the_times_are_the_same(zone, expression, cuts):
    schedule, start, end = Schedule(expression, zone), utc("2026-10-20"), utc("2026-11-03")
    whole = list(schedule.between(start, end))
    assert whole == sorted(set(whole))
    places = [start, *sorted(start + cut * (end - start) for cut in cuts), end]
    parts = [time for after, until in pairwise(places) for time in schedule.between(after, until)]
    assert parts == whole


@pytest.mark.parametrize(
    ("expression", "says"),
    [
        ("30 2 * *", "4 fields instead of 5"), ("@daily", "1 fields instead of 5"), ("0 0 30 2 *", "has no times"),
        ("60 * * * *", "60 is out of range"), ("* 24 * * *", "'24' is no hour"), ("* * 0 * *", "'0' is no day of"),
        ("* * * 13 *", "'13' is no month"), ("* * * * 8", "'8' is no day of week"), ("5/15 * * * *", "a step belongs"),
        ("* * * mon *", "'mon' is not a number"), ("*/0 * * * *", "step is 1 or more"), ("* * last * *", "is no day"),
        ("30-10 * * * *", "a range goes upwards"), ("* * * * mon/2", "a step belongs to"), ("1,,2 * * * *", "form is"),
        ("-1 * * * *", "its form is wrong"), ("0 0 31 4,6,9,11 *", "has no times"), ("٣ * * * *", "is not a number"),
    ],
)  # fmt: skip
def test_what_crontab_does_not_have_is_refused(expression, says):
    with pytest.raises(UserError) as error:
        Schedule(expression)
    assert says in str(error.value)
    assert expression in str(error.value)


@pytest.mark.parametrize("zone", ["Europe/Berln", "", "../etc/passwd", "/etc/localtime", "CEST2"])
def test_an_unknown_zone_is_refused(zone):
    with pytest.raises(UserError, match="not a time zone of the IANA list"):
        Schedule("0 0 * * *", zone)
