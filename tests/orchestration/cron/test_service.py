"""The service against the clock: what runs, what does not, and why."""

from datetime import timedelta
from itertools import pairwise

import pytest

from md4.errors import UserError
from orchestration.cron import Record, Store
from tests.orchestration.cron.world import Cluster, SetClock, check, entry, outcomes, run, utc

START = utc("2026-11-30T00:00:30")


@pytest.fixture
def store(tmp_path) -> Store:
    return Store(str(tmp_path / "cron"))


@pytest.fixture
def cluster() -> Cluster:
    return Cluster(SetClock(START))


def test_a_day_of_schedules(store, cluster):
    """Several entries, one day, each time in its zone; ids are those of the planned times."""
    entries = [
        entry("30 2 * * *", "nightly", zone="Europe/Berlin"),
        entry("0 */6 * * *", "search"),
        entry("15 9 * * mon", "weekly", zone="America/New_York"),
        entry("0 12 1 * *", "monthly"),
    ]
    for one in entries:
        store.add(one, START)
    said = run(store, cluster, utc("2026-12-01T00:00:30"))
    assert {id: f"{at:%H:%M:%S}" for id, at in cluster.begun.items()} == {
        "cron-nightly-20261130T013000Z": "01:30:00",
        "cron-search-20261130T060000Z": "06:00:00",
        "cron-search-20261130T120000Z": "12:00:00",
        "cron-search-20261130T180000Z": "18:00:00",
        "cron-search-20261201T000000Z": "00:00:00",
        "cron-weekly-20261130T141500Z": "14:15:00",
    }
    for one in entries:
        check(store, cluster, one, START, utc("2026-12-01T00:00:30"))
    last = store.history("nightly")[0]
    assert (last.status, last.seconds) == ("succeeded", 60.0)
    assert "nightly 2026-11-30 02:30 CET: submitted" in said
    assert "nightly 2026-11-30 02:30 CET: succeeded" in said


def test_nights_of_changed_clocks(store, cluster):
    one = entry("30 2 * * *", zone="Europe/Berlin")
    cluster.clock.time = utc("2026-03-27T12:00")
    store.add(one, cluster.clock.time)
    run(store, cluster, utc("2026-03-30T12:00"))
    assert outcomes(store) == [(at, "succeeded") for at in ("03-28 01:30", "03-29 01:00", "03-30 00:30")]
    cluster.clock.time = utc("2026-10-24T12:00")
    store.add(entry("30 2 * * *", zone="Europe/Berlin", catch_up_s=1), cluster.clock.time, replace=True)
    run(store, cluster, utc("2026-10-26T12:00"))
    assert outcomes(store)[-2:] == [("10-25 00:30", "succeeded"), ("10-26 01:30", "succeeded")]


def test_after_downtime_the_last_time_runs_if_it_is_not_too_late(store, cluster):
    one = entry("0 * * * *", catch_up_s=3600 * 2.5)
    store.add(one, START)
    run(store, cluster, utc("2026-11-30T02:30"))
    cluster.clock.time = utc("2026-11-30T09:20")  # the service was away
    run(store, cluster, utc("2026-11-30T09:40"))
    records = check(store, cluster, one, START, utc("2026-11-30T09:40"))
    assert [(f"{each.planned:%H}-{each.last:%H}", each.count, each.status) for each in records] == [
        ("01-01", 1, "succeeded"), ("02-02", 1, "succeeded"),
        ("03-06", 4, "missed"), ("07-08", 2, "missed"), ("09-09", 1, "succeeded"),
    ]  # fmt: skip
    assert records[2].reason == "found 3h20m later; may be run 2h30m late at most"
    assert records[3].reason == "found late; the time 2026-11-30T09:00:00Z stands for it"


def test_without_catching_up_only_a_minute_is_no_delay(store, cluster):
    one = entry("0 * * * *")
    store.add(one, START)
    cluster.clock.time = utc("2026-11-30T01:00:59")
    run(store, cluster, utc("2026-11-30T01:30"))
    cluster.clock.time = utc("2026-11-30T02:01:01")
    run(store, cluster, utc("2026-11-30T02:30"))
    assert outcomes(store) == [("11-30 01:00", "succeeded"), ("11-30 02:00", "missed")]


def test_overlap_is_skipped_and_says_why(store, cluster):
    one = entry("*/10 * * * *")
    cluster.lasts = lambda _: 1500  # 25 min
    store.add(one, START)
    run(store, cluster, utc("2026-11-30T00:45"))
    records = check(store, cluster, one, START, utc("2026-11-30T00:45"))
    assert [each.status for each in records] == ["succeeded", "skipped", "skipped", "running"]
    assert records[1].reason == "cron-nightly-20261130T001000Z has not ended"


def test_overlap_waits_for_the_end_and_one_at_most_waits(store, cluster):
    one = entry("*/10 * * * *", overlap="wait")
    cluster.lasts = lambda _: 1500
    store.add(one, START)
    run(store, cluster, utc("2026-11-30T01:09"))
    records = check(store, cluster, one, START, utc("2026-11-30T01:09"))
    assert [each.status for each in records] == ["succeeded", "skipped", "succeeded", "skipped", "skipped", "running"]
    assert records[1].reason == "the time 2026-11-30T00:30:00Z takes its place"
    assert records[2].after == "cron-nightly-20261130T001000Z"
    spans = cluster.spans()
    assert all(before[1] <= after[0] for before, after in pairwise(spans))
    assert timedelta() <= spans[1][0] - spans[0][1] <= timedelta(seconds=10)


def test_a_cluster_that_is_away_is_asked_until_the_time_is_missed(store, cluster):
    one = entry("0 * * * *", catch_up_s=1800)
    store.add(one, START)
    away = [(utc("2026-11-30T01:50"), utc("2026-11-30T02:20")), (utc("2026-11-30T02:59"), utc("2026-11-30T03:45"))]
    cluster.away = lambda now: any(begin <= now < end for begin, end in away)
    said = run(store, cluster, utc("2026-11-30T04:59"))
    records = check(store, cluster, one, START, utc("2026-11-30T04:59"))
    assert [each.status for each in records[:4]] == ["succeeded", "succeeded", "missed", "succeeded"]
    assert utc("2026-11-30T02:20") <= cluster.begun["cron-nightly-20261130T020000Z"] <= utc("2026-11-30T02:21")
    assert records[2].reason == "not submitted within 30m: nobody answers at http://head:8265"
    assert len([line for line in said if "nobody answers" in line]) <= 6  # said when it begins, not at every attempt


def test_while_the_cluster_is_away_nothing_is_given_up_that_may_have_arrived(store, cluster):
    """The submission arrives, its answer doesn't, then the cluster is away for a day."""
    one = entry("0 12 * * *")
    store.add(one, START)

    def lose(what: str) -> None:
        if what == "submit is answered":
            raise UserError("the connection was lost")

    cluster.ticks = lose
    cluster.lasts = lambda _: 3600
    cluster.away = lambda now: utc("2026-11-30T12:00:01") <= now < utc("2026-12-01T13:00")
    run(store, cluster, utc("2026-12-01T12:59"))
    assert outcomes(store) == [("11-30 12:00", "waiting"), ("12-01 12:00", "missed")]
    cluster.ticks = lambda _: None
    run(store, cluster, utc("2026-12-01T14:00"))
    assert outcomes(store) == [("11-30 12:00", "succeeded"), ("12-01 12:00", "missed")]
    check(store, cluster, one, START, utc("2026-12-01T14:00"))


def test_what_does_not_end_at_its_time_limit_is_stopped(store, cluster):
    one = entry("0 1 * * *", limit=600)
    cluster.lasts = lambda _: 1e9
    store.add(one, START)
    run(store, cluster, utc("2026-11-30T03:00"))
    (record,) = check(store, cluster, one, START, utc("2026-11-30T03:00"))
    assert (record.status, record.reason) == (
        "stopped", "stopped by the service: it did not end by itself at its time limit of 10m"
    )  # fmt: skip
    (stopped,) = cluster.stopped.values()
    assert utc("2026-11-30T01:11") < stopped < utc("2026-11-30T01:12")


def test_what_the_cluster_has_forgotten_is_lost_and_not_run_again(store, cluster):
    one = entry("0 1 * * *")
    cluster.lasts = lambda _: 3600
    store.add(one, START)
    run(store, cluster, utc("2026-11-30T01:30"))
    other = Cluster(cluster.clock)  # a new head
    run(store, other, utc("2026-11-30T02:30"))
    assert outcomes(store) == [("11-30 01:00", "lost")]
    assert not other.begun


def test_paused_times_are_recorded_as_such(store, cluster):
    one = entry("0 * * * *", catch_up_s=86400)
    store.add(one, START)
    run(store, cluster, utc("2026-11-30T01:30"))
    assert store.pause("nightly", True, cluster.clock.now())
    assert not store.pause("nightly", True, cluster.clock.now())
    run(store, cluster, utc("2026-11-30T03:30"))
    cluster.clock.time = utc("2026-11-30T06:30")  # away, still paused: resuming must not catch these up
    assert store.pause("nightly", False, cluster.clock.now())
    run(store, cluster, utc("2026-11-30T07:30"))
    records = check(store, cluster, one, START, utc("2026-11-30T07:30"))
    assert [(each.status, each.count, each.reason) for each in records] == [
        ("succeeded", 1, ""), ("skipped", 1, "paused"), ("skipped", 1, "paused"), ("skipped", 3, "paused"),
        ("succeeded", 1, ""),
    ]  # fmt: skip


def test_removed_entries_keep_their_history_and_what_runs_is_followed(store, cluster):
    one = entry("0 * * * *", overlap="wait")
    cluster.lasts = lambda _: 5400
    store.add(one, START)
    run(store, cluster, utc("2026-11-30T02:10"))  # one runs, one waits
    cluster.clock.time = utc("2026-11-30T02:20")
    store.remove("nightly", cluster.clock.now())
    run(store, cluster, utc("2026-11-30T05:00"))
    assert outcomes(store) == [("11-30 01:00", "succeeded"), ("11-30 02:00", "skipped")]
    assert store.history("nightly")[0].reason == "the entry was removed before it was submitted"
    with pytest.raises(UserError, match=r"no entry 'nightly' in .*; there are: none"):
        store.remove("nightly", cluster.clock.now())
    store.add(one, cluster.clock.now())  # again: what came between is not its concern
    run(store, cluster, utc("2026-11-30T06:30"))
    assert outcomes(store)[2:] == [("11-30 06:00", "running")]


def test_an_entry_that_can_not_be_read_does_not_stop_the_others(store, cluster):
    store.add(entry("0 * * * *", "broken"), START)
    store.add(entry("0 * * * *", "sound"), START)
    store.folder.write("entries/broken.json", b'{"entry": {"name": "broken"}}')
    said = run(store, cluster, utc("2026-11-30T01:30"))
    assert outcomes(store, "sound") == [("11-30 01:00", "succeeded")]
    assert any(line.startswith("broken: ") and "entries/broken.json" in line for line in said)
    store.remove("broken", cluster.clock.now())
    assert [name for name, _ in store.entries()] == ["sound"]


def test_a_job_that_the_cluster_refuses_does_not_hold_up_the_others(store, cluster):
    for name in ("a", "b"):
        store.add(entry("0 1 * * *", name), START)

    cluster.refused = {"cron-a-20261130T010000Z"}
    said = run(store, cluster, utc("2026-11-30T01:30"))
    assert list(cluster.begun) == ["cron-b-20261130T010000Z"]
    assert outcomes(store, "b") == [("11-30 01:00", "succeeded")]
    assert store.history("a")[0].reason == "not submitted within 1m: the cluster refuses it"
    assert "a: the cluster refuses it" in said


def test_adding(store, cluster):
    one = entry("0 1 * * *")
    assert store.add(one, START)
    assert not store.add(one, START)
    with pytest.raises(UserError, match=r"another entry 'nightly' already.*--replace"):
        store.add(entry("0 2 * * *"), START)
    assert store.add(entry("0 2 * * *"), START, replace=True)
    assert store.entry("nightly").entry.schedule == "0 2 * * *"


def test_the_same_in_s3(s3, cluster):
    store = Store("s3://bucket/cron")
    one = entry("*/20 * * * *")
    store.add(one, START)
    s3.fails(0.05, seed=3)
    run(store, cluster, utc("2026-11-30T01:10"))
    records = check(store, cluster, one, START, utc("2026-11-30T01:10"))
    assert [each.status for each in records] == ["succeeded"] * 3
    with pytest.raises(UserError, match="the bucket 'nowhere' does not exist"):
        run(Store("s3://nowhere/cron"), cluster, utc("2026-11-30T02:00"))


def test_a_year_is_not_read_again_and_again(store, cluster):
    """Closed records are let go of, and a service that starts later begins after them."""
    one = entry("*/10 * * * *")
    store.add(one, START)
    times = list(one.times().between(START, utc("2026-12-02T12:05")))
    for time in times:
        record = Record(name="nightly", planned=time, last=time, status="skipped", reason="a test", recorded=time)
        store.create(record)
    cluster.clock.time = times[-1]
    run(store, cluster, utc("2026-12-02T12:15"))
    read: list[str] = []
    real = store.folder.read
    store.folder.read = lambda file: read.append(file) or real(file)  # type: ignore[method-assign]
    run(store, cluster, utc("2026-12-02T12:25"))
    assert len({file for file in read if "/20" in file}) < 10 < len(times)
    check(store, cluster, one, START, utc("2026-12-02T12:25"))
