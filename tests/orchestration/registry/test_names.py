"""Signed-off names: what may happen to them, and one history whatever happens at the same time."""

import contextlib
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from functools import partial

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from md4.errors import UserError
from orchestration.registry import Name, Registry, names
from orchestration.registry.names import Signature
from orchestration.registry.registry import Moved
from pipelines import s3 as requests
from tests.orchestration.registry.conftest import NOW


def chain(name: Name) -> list[str]:
    """The history as words; fails unless each change begins where the one before ended."""
    now = None
    for change in name.history:
        assert change.before == now
        now = change.after
    assert now == name.version
    assert len({change.id for change in name.history}) == len(name.history)
    return [f"{change.action} {change.version}" for change in name.history]


def test_a_life(three):
    three.promote("small", 1, "production", by="ada", why="the first")
    three.promote("small", 2, "production", share=0.1, by="bob")
    assert three.name("small", "production").version == 1
    assert three.name("small", "production").candidate == names.Candidate(version=2, share=0.1, since=NOW)
    three.confirm("small", "production", 2, figures={"requests": 1000})
    three.promote("small", 3, "production")
    name = three.rollback("small", "production", "it broke", by="eve")
    assert (name.version, name.previous) == (2, 1)
    name = three.rollback("small", "production", "and so did that")
    assert (name.version, name.previous) == (1, None)
    assert chain(name) == ["promote 1", "candidate 2", "confirm 2", "promote 3", "rollback 3", "rollback 2"]
    assert [change.by for change in name.history[:2]] == ["ada", "bob"]
    assert name.history[2].figures == {"requests": 1000}
    assert three.name("small", "production") == name  # as it is stored
    with pytest.raises(UserError, match="version 1 is the first production; there is none before it"):
        three.rollback("small", "production", "")


def test_a_candidate_dropped(three):
    three.promote("small", 1, "production")
    three.promote("small", 2, "production", share=0.1)
    three.promote("small", 2, "production", share=0.5)  # more of the traffic
    name = three.rollback("small", "production", "errors", version=2)
    assert (name.version, name.candidate) == (1, None)
    assert chain(name) == ["promote 1", "candidate 2", "candidate 2", "drop 2"]
    assert name.rejected(2) == name.history[-1]


def test_what_is_said_twice_happens_once(three):
    three.promote("small", 1, "production")
    three.promote("small", 1, "production")
    for _ in range(2):
        three.promote("small", 2, "production", share=0.1)
    for _ in range(2):
        three.confirm("small", "production", 2)
    for _ in range(2):
        name = three.rollback("small", "production", "why", version=2)
    assert chain(name) == ["promote 1", "candidate 2", "confirm 2", "rollback 2"]


def test_going_back_keeps_what_is_being_tried(three):
    three.promote("small", 1, "production")
    three.promote("small", 2, "production")
    three.promote("small", 3, "production", share=0.2)
    name = three.rollback("small", "production", "the present one is bad", version=2)
    assert name.version == 1
    assert name.candidate is not None
    assert name.candidate.version == 3


@pytest.mark.parametrize(
    ("ask", "expected"),
    [
        (lambda r: r.promote("small", 9, "production"), "no version 9"),
        (lambda r: r.promote("small", 1, "latest"), "'latest' is taken"),
        (lambda r: r.promote("small", 1, "7"), "with a letter among them"),
        (lambda r: r.promote("small", 3, "production"), "version 2 is being tried as production with 10%"),
        (lambda r: r.promote("small", 2, "production", share=1.5), "share is 1.5"),
        (lambda r: r.promote("small", 2, "new", share=0.1), "has no new yet"),
        (lambda r: r.confirm("small", "production", 3), r"version 3 is not being tried .*now: version 2"),
        (lambda r: r.rollback("small", "new", ""), "nothing was ever signed off as new"),
        (lambda r: r.rollback("small", "New", ""), "small letters"),
    ],
)
def test_what_cannot_be(three, ask, expected):
    three.promote("small", 1, "production")
    before = three.promote("small", 2, "production", share=0.1)
    with pytest.raises(UserError, match=expected):
        ask(three)
    assert three.name("small", "production") == before


def test_a_decision_on_an_old_state_is_not_signed(three):
    seen = three.name("small", "production")
    three.promote("small", 1, "production")
    with pytest.raises(Moved):
        three.promote("small", 2, "production", seen=seen)
    assert three.name("small", "production").version == 1


def test_who_signs(three, monkeypatch):
    monkeypatch.setenv("USER", "grace")
    assert three.promote("small", 1, "production").history[-1].by == "grace"
    assert three.promote("small", 2, "production", by="ada").history[-1].by == "ada"


def changed(registry: Registry, signed: Signature, operation: Callable[..., Name]) -> Name:
    """The one way in which `Registry` changes a name, of versions that need not be there."""
    return registry._change("small", "production", signed, lambda found: operation(found, signed=signed))


# -- at the same time ------------------------------------------------------------------------------------------------

OPERATIONS: dict[str, Callable[..., Name]] = {
    **{f"promote {version}": partial(names.promote, version=version, share=None) for version in (1, 2, 3)},
    **{f"try {version}": partial(names.promote, version=version, share=0.1) for version in (1, 2, 3)},
    **{f"confirm {version}": partial(names.confirm, version=version) for version in (1, 2, 3)},
    **{f"lose {version}": partial(names.rollback, version=version) for version in (1, 2, 3)},
    "rollback": partial(names.rollback, version=None),
}


@given(st.lists(st.sampled_from(sorted(OPERATIONS)), max_size=30))
def test_any_sequence_is_one_chain(asked):
    name = Name(model="small", name="production")
    for number, operation in enumerate(asked):
        signed = Signature(id=str(number), by="ada", at=datetime(2026, 1, 1, tzinfo=UTC))
        before = name
        with contextlib.suppress(UserError):
            name = OPERATIONS[operation](name, signed=signed)
        assert len(name.history) == len(before.history) + (name is not before)
        chain(name)
        if name.version is None:
            assert name.candidate is None
        else:
            assert name.signed[-1] == name.version  # a rollback goes back to what was there
        assert name.candidate is None or name.candidate.version != name.version
    assert Name.model_validate_json(name.model_dump_json()) == name


class Turnstile:
    """Lets one of several threads make one request at a time, in an order that is given."""

    def __init__(self, choices: list[int]):
        self._choices = iter(choices)
        self._changed = threading.Condition()
        self._waiting: set[int] = set()
        self._running: set[int] = set()
        self._turn: int | None = None

    def enter(self, number: int) -> None:
        with self._changed:
            self._running.add(number)

    def leave(self, number: int) -> None:
        with self._changed:
            self._running.discard(number)
            self._choose()

    def wait(self, number: int) -> None:
        with self._changed:
            self._running.discard(number)
            self._waiting.add(number)
            self._choose()
            assert self._changed.wait_for(lambda: self._turn == number, timeout=30)
            self._turn = None
            self._waiting.discard(number)
            self._running.add(number)

    def _choose(self) -> None:
        if not self._running and self._waiting and self._turn is None:
            waiting = sorted(self._waiting)
            self._turn = waiting[next(self._choices, 0) % len(waiting)]
            self._changed.notify_all()


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(st.lists(st.sampled_from(sorted(OPERATIONS)), min_size=1, max_size=3), min_size=2, max_size=2),
    st.lists(st.integers(0, 1), max_size=40),
)
def test_any_interleaving_of_two_promoters_leaves_one_history(s3, asked, choices):
    """Every request to the name's object waits for its turn; in between, the other one does what it likes."""
    s3.reset()
    registry = Registry("s3://bucket/registry")
    turnstile, local = Turnstile(choices), threading.local()
    made: list[str] = []

    def gated(call):
        def request(self, key, *arguments):
            turnstile.wait(local.number)
            return call(self, key, *arguments)

        return request

    def act(number: int) -> None:
        local.number = number
        try:
            for step, operation in enumerate(asked[number]):
                signed = Signature(id=f"{number}-{step}", by="ada", at=NOW)
                with contextlib.suppress(UserError):
                    if changed(registry, signed, OPERATIONS[operation]).holds(signed.id):
                        made.append(signed.id)
        finally:
            turnstile.leave(number)

    with pytest.MonkeyPatch.context() as patch:
        for name in ("tagged", "put_if"):
            patch.setattr(requests.Bucket, name, gated(getattr(requests.Bucket, name)))
        for number in (0, 1):
            turnstile.enter(number)
        threads = [threading.Thread(target=act, args=(number,)) for number in (0, 1)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
    name = registry.name("small", "production")
    chain(name)
    assert sorted(change.id for change in name.history) == sorted(made)  # what was answered is there, once


def test_a_change_whose_answer_was_lost_is_not_made_twice(exports, s3):
    """It arrived, nobody was told, and somebody else made the next change before it is tried again."""
    registry = Registry("s3://bucket/registry")
    for seed in (1, 2):
        registry.add("small", exports(seed))
    s3.fails(1.0, ("lost answer",), only="PUT .*names/production.json")
    first = s3.hold("PUT .*names/production.json")
    slow = threading.Thread(target=lambda: registry.promote("small", 1, "production"))
    slow.start()
    assert first.came.wait(20)
    again = s3.hold("PUT .*names/production.json")
    first.release()
    assert again.came.wait(20)
    s3.fails(0)
    registry.promote("small", 2, "production")
    again.release()
    slow.join(20)
    assert chain(registry.name("small", "production")) == ["promote 1", "promote 2"]


@pytest.mark.parametrize("where", ["local", "s3"])
def test_many_promoters_at_once(where, tmp_path, s3):
    registry = Registry(tmp_path / "registry" if where == "local" else "s3://bucket/registry")
    s3.fails(0.2)  # answers get lost, too: what was written is not written twice

    def act(number: int) -> None:
        for step in range(3):
            signed = Signature(id=f"{number}-{step}", by="ada", at=NOW)
            version = 10 * number + step
            changed(registry, signed, partial(names.promote, version=version, share=None))

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(act, range(1, 5)))
    name = registry.name("small", "production")
    assert sorted(chain(name)) == sorted(f"promote {10 * number + step}" for number in range(1, 5) for step in range(3))
