"""Whatever breaks, each planned time runs once, or has a reason why not."""

import threading
from collections.abc import Callable
from datetime import timedelta
from functools import partial
from itertools import chain, count, pairwise, repeat
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from orchestration.cron import Record, Service, Store, service
from orchestration.cron.plan import Change, Situation, plan
from tests.orchestration.cron.world import Cluster, SetClock, check, entry, outcomes, run, utc

START = utc("2026-11-30T00:00:30")


class Crash(Exception):
    """The process is gone."""


class Ticking(Store):
    """A store that calls `ticks` before and after each thing that others can see."""

    def __init__(self, place: str, ticks: Callable[[str], None]):
        super().__init__(place)
        self.ticks = ticks

    def create(self, record: Record) -> bool:
        self.ticks("create")
        made = super().create(record)
        self.ticks("created")
        return made

    def change(self, old: Record, new: Record) -> bool:
        self.ticks("change")
        made = super().change(old, new)
        self.ticks("changed")
        return made


class CrashAt:
    """Ends the process at one tick."""

    def __init__(self, place: int | None):
        self._left = count() if place is None else iter(range(place, -1, -1))
        self.seen = 0

    def __call__(self, what: str) -> None:
        self.seen += 1
        if next(self._left, None) == 0 and self.seen > 1:
            raise Crash(what)


@pytest.fixture(autouse=True)
def _seldom(monkeypatch):
    monkeypatch.setattr(service, "RUNNING_S", 120.0)  # looks at runs: fewer are enough here


@pytest.mark.parametrize("overlap", ["skip", "wait"])
def test_a_crash_anywhere_changes_nothing(tmp_path, overlap):
    """The service dies at every place, once each, and begins anew at once: the records are those without a crash."""
    end, one = utc("2026-11-30T00:38"), entry("*/10 * * * *", overlap=overlap)

    def night(crash: CrashAt, place: Path) -> tuple[list[tuple[str, str]], bool]:
        cluster = Cluster(SetClock(START), lambda id: 900 if id.endswith("1000Z") else 240)
        store = Ticking(str(place), crash)
        store.add(one, START)
        cluster.ticks = crash
        crashed = False
        try:
            run(store, cluster, end)
        except Crash:
            crashed, cluster.ticks = True, lambda _: None
            run(Store(str(place)), cluster, end)
        check(store, cluster, one, START, end)
        return outcomes(store), crashed

    undisturbed, _ = night(whole := CrashAt(None), tmp_path / "whole")
    assert [status for _, status in undisturbed] == [
        "succeeded",
        "skipped" if overlap == "skip" else "succeeded",
        "succeeded",
    ]
    for place in range(1, whole.seen):
        assert night(CrashAt(place), tmp_path / str(place)) == (undisturbed, True), place


@given(
    overlap=st.sampled_from(["skip", "wait"]),
    catch_up=st.sampled_from([0, 600, 3600]),
    lasts=st.sampled_from([0, 240, 1500]),
    script=st.lists(
        st.tuples(
            st.integers(0, 40),  # minutes without a service
            st.integers(1, 40),  # minutes with one
            st.one_of(st.none(), st.integers(1, 30)),  # it dies at this tick
            st.booleans(),  # the cluster is away
        ),
        max_size=5,
    ),
)
@settings(max_examples=30, deadline=None)
def test_each_time_has_one_outcome(overlap, catch_up, lasts, script):
    """Any sequence of downtimes, crashes and clusters that are away."""
    one = entry("*/10 * * * *", overlap=overlap, catch_up_s=catch_up)
    with TemporaryDirectory() as place:
        clock = SetClock(START)
        cluster = Cluster(clock, lambda _: lasts)
        Store(place).add(one, START)
        for down, up, dies, away in script:
            clock.time += timedelta(minutes=down)
            cluster.away = lambda _, away=away: away
            cluster.ticks = crash = CrashAt(dies)
            until = clock.time + timedelta(minutes=up)
            try:
                run(Ticking(place, crash), cluster, until)
            except Crash:
                clock.time = max(clock.time, until)
        cluster.away, cluster.ticks = lambda _: False, lambda _: None
        run(Store(place), cluster, clock.time + timedelta(minutes=9))  # what is open is settled
        records = check(Store(place), cluster, one, START, clock.time)
        assert all(one.status != "waiting" or one.after or one is records[-1] for one in records)
        assert all(before[1] <= after[0] for before, after in pairwise(cluster.spans()))
        for record in records:
            if record.submission_id in cluster.begun and record.after is None:
                late = (cluster.begun[record.submission_id] - record.planned).total_seconds()
                assert 0 <= late <= one.window_s


class Turns:
    """Threads that go on one at a time, from tick to tick, as a script says: whose turn it is, and how many seconds
    pass before. None pass while a submission is on its way: that it takes no minutes is what the service relies on.
    """

    def __init__(self, clock: SetClock, script: list[tuple[int, int]]):
        self._clock, self._script = clock, script
        self._here = threading.local()
        self._paused = threading.Semaphore(0)
        self._at: dict[int, str] = {}

    def tick(self, what: str) -> None:
        if (number := getattr(self._here, "number", None)) is None:  # the test itself
            return
        self._at[number] = what
        self._paused.release()
        self._here.turn.acquire()

    def take(self, *tasks: Callable[[], None]) -> None:
        """Do these at the same time."""
        turns = [threading.Semaphore(0) for _ in tasks]
        failures: list[BaseException] = []
        alive = set(range(len(tasks)))

        def go(number: int) -> None:
            self._here.number, self._here.turn = number, turns[number]
            turns[number].acquire()
            try:
                tasks[number]()
            except BaseException as error:
                failures.append(error)
            alive.discard(number)
            self._at.pop(number, None)
            self._paused.release()

        threads = [threading.Thread(target=go, args=(number,), daemon=True) for number in range(len(tasks))]
        for thread in threads:
            thread.start()
        for whose, seconds in chain(self._script, repeat((0, 0))):
            if not alive:
                break
            if not {"changed", "submit arrives"} & set(self._at.values()):
                self._clock.time += timedelta(seconds=seconds)
            turns[sorted(alive)[whose % len(alive)]].release()
            self._paused.acquire()
        for thread in threads:
            thread.join()
        if failures:
            raise failures[0]


@given(
    overlap=st.sampled_from(["skip", "wait"]),
    lasts=st.sampled_from([0, 240, 900]),
    script=st.lists(
        st.tuples(st.integers(0, 1), st.sampled_from([0, 0, 0, 0, 0, 60, 300, 900])), min_size=40, max_size=150
    ),
)
@settings(max_examples=40, deadline=None)
def test_two_services_at_once(overlap, lasts, script):
    """They take turns between any two steps; one may go on with what it knew an hour ago."""
    one = entry("*/10 * * * *", overlap=overlap, catch_up_s=1800)
    clock = SetClock(START)
    turns = Turns(clock, script)
    cluster = Cluster(clock, lambda _: lasts)
    cluster.ticks = turns.tick
    with TemporaryDirectory() as place:
        Store(place).add(one, START)
        both = [Service(Ticking(place, turns.tick), cluster, clock, lambda _: None) for _ in range(2)]

        def work(mine: Service) -> None:
            for _ in range(12):
                turns.tick("look")
                mine.look()

        turns.take(*(partial(work, each) for each in both))
        run(Store(place), cluster, clock.time + timedelta(minutes=9))
        check(Store(place), cluster, one, START, clock.time)
        assert all(before[1] <= after[0] for before, after in pairwise(cluster.spans()))


def test_an_answer_that_it_is_not_there_counts_after_a_while_only():
    """The job may still turn up after a slow upload, or by another service: nothing takes its place too soon."""
    one, planned = entry("*/10 * * * *", catch_up_s=3600), utc("2026-11-30T00:10")
    facts = {"status": "waiting", "recorded": planned, "first_attempt": planned}
    before = Record.model_validate({"name": "nightly", "planned": planned, "last": planned, **facts})
    later = before.model_copy(update={"planned": utc("2026-11-30T00:20"), "last": utc("2026-11-30T00:20")})
    later = later.model_copy(update={"first_attempt": None})

    def actions(seconds_ago: int) -> list[tuple[str, str]]:
        now = utc("2026-11-30T00:20:30")
        tried = before.model_copy(update={"last_attempt": now - timedelta(seconds=seconds_ago)})
        asked = {before.submission_id: None}
        found = plan(Situation(entry=one, job="", seen=later.last, open=[tried, later], answers=asked, now=now))
        return [(type(each).__name__, each.new.status.value) for each in found if isinstance(each, Change)]

    assert actions(290) == []
    assert actions(310) == [("Change", "missed"), ("Submit", "waiting")]
