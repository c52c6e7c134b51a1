"""A version that is tried, in one replica: the requests that it gets, and what became of them and of the others.

A request with which the candidate fails, or for which it has no room, is answered by the present version, if nothing
was sent yet. A stream's beginning is held back until there is something to follow it.
"""

import asyncio
import logging
from collections.abc import AsyncGenerator, Callable, Iterator
from contextlib import aclosing, contextmanager
from dataclasses import replace
from time import perf_counter
from typing import TypeGuard, TypeVar

from md4.errors import UserError
from orchestration.registry import Name
from orchestration.sampling import Answer, ModelFacts, Request
from orchestration.serving import canary
from orchestration.serving.canary import FAILED, Figures
from orchestration.serving.events import Begun, Done, Event, Failed
from orchestration.serving.held import Side
from orchestration.serving.models import Broken, Busy, Lost, TrialInfo
from orchestration.serving.trial_record import Part, Record, Seen

_KEPT = 1 << 20  # requests that are known to have been counted; beyond them none is counted any more
_LATE = 0.95  # of the time that a request may take: who gives up then has waited in vain
_log = logging.getLogger("ray.serve")


class Trial:
    """See above.

    Args:
        state: what the name says.
        side: the candidate.
        replica: an id of this process.
        timeout_s: time that a request may take.
    """

    def __init__(self, state: Name, side: Side, replica: str, timeout_s: float) -> None:
        self.state, self.side, self.replica, self.timeout_s = state, side, replica, timeout_s
        self.part = Part()  # what was seen here
        self.open = True  # does it get requests?
        self.failed: str | None = None  # why it can't go on, whatever the figures
        self.record: Record | None = None  # of all replicas, as it was last written
        self._seen: set[int] = set()

    @property
    def change(self) -> str:
        """The last change of the name; another one is another trial."""
        return self.state.history[-1].id

    @property
    def share(self) -> float:
        """Of the requests."""
        assert self.state.candidate is not None
        return self.state.candidate.share

    @property
    def goes_on(self) -> bool:
        """Does the candidate get requests here?"""
        return self.open and self.failed is None

    def takes(self, key: int) -> bool:
        """Does the candidate get that request?"""
        return self.goes_on and canary.chosen(key, self.share, f"{self.state.model}@{self.side.version}")

    def total(self) -> Seen:
        """What all replicas saw, as far as it is known here."""
        return self.part if self.record is None else self.record.with_part(self.replica, self.part).total()

    def anew(self, state: Name) -> None:
        """The name was changed, its candidate is the same: figures begin anew."""
        self.state, self.part, self.record, self.open = state, Part(), None, True
        self._seen.clear()

    def describe(self) -> TrialInfo:
        """The candidate's figures are those of all replicas, as far as they are known here."""
        found = self.side.engine.describe("")
        total = self.total()
        return TrialInfo(
            hash=found.hash,
            step=found.step,
            model_version=found.model_version,
            trial=True,
            share=self.share,
            answered=total.candidate.answered,
            errors=total.candidate.errors,
        )

    async def sample(self, request: Request, present: Callable[[], Side]) -> Answer:
        """The answer of the version that the request gets. present: the version beside it."""
        course = _Course(self, request)
        with course.until_late():
            if course.tried:
                try:
                    with self.side.used() as engine:
                        answer = await engine.sample(request)
                except Exception as error:
                    if not course.falls_back(error):
                        raise
                else:
                    course.answered(answer)
                    return _told(answer)
            with present().used() as engine, course.of_present():
                answer = await engine.sample(request)
            course.present_answered(answer)
            return answer

    async def stream(self, request: Request, present: Callable[[], Side]) -> AsyncGenerator[Event, None]:
        """The same as events, see `Models`."""
        course = _Course(self, request)
        with course.until_late():
            if course.tried:
                sent = False
                try:
                    with self.side.used() as engine:
                        async with aclosing(_with_more(engine.stream(request))) as events:
                            async for event in events:
                                if _is_fault(event):
                                    course.fault = event.detail
                                    if not sent:
                                        break
                                    course.ended()
                                elif isinstance(event, Done):
                                    course.answered(event.answer)
                                sent = True
                                yield _told(event)
                            else:
                                return
                except Exception as error:
                    if sent or not course.falls_back(error):
                        raise
            with present().used() as engine, course.of_present():
                async with aclosing(engine.stream(request)) as events:
                    async for event in events:
                        if isinstance(event, Done):
                            course.present_answered(event.answer)
                        elif _is_fault(event):
                            course.present_failed()
                        yield event

    def count(self, key: int, *, present: Figures | None = None, candidate: Figures | None = None) -> None:
        """What became of a request; one that is repeated counts once, in all replicas if it is an error."""
        if key in self._seen or len(self._seen) >= _KEPT:
            return
        self._seen.add(key)
        self.part = self.part.with_request(key, present or Figures(), candidate or Figures())


class _Course:
    """What becomes of one request, and how it is counted.

    A failure of the candidate counts once the present version has answered instead: what fails with both is no fault of
    the candidate's. While the candidate gets none, none is counted: those of its share would be the present version's.
    """

    def __init__(self, trial: Trial, request: Request) -> None:
        self._trial, self._key, self._change = trial, canary.key(request), trial.change
        self._began = perf_counter()
        self._counts, self.tried = trial.goes_on, trial.takes(self._key)
        self.fault: str | None = None  # what was wrong with the candidate's answer

    def falls_back(self, error: Exception) -> bool:
        """Is the present version to answer instead? Not where the request itself is wrong."""
        if isinstance(error, Busy):
            return True
        self.fault = str(error)
        return not isinstance(error, UserError)

    def answered(self, answer: Answer) -> None:
        """By the candidate."""
        self._count(candidate=Figures.of(answer, perf_counter() - self._began))

    def present_answered(self, answer: Answer) -> None:
        """By the present version, if by lot or instead."""
        if not self.tried:
            self._count(present=Figures.of(answer, perf_counter() - self._began))
        elif self.fault is not None:
            self.ended()

    def ended(self) -> None:
        """The candidate has failed, and it was its fault."""
        _log.warning("version %s, which is tried, has failed: %s", self._trial.side.version, self.fault)
        self._count(candidate=FAILED)

    def present_failed(self) -> None:
        if not self.tried:
            self._count(present=FAILED)

    @contextmanager
    def of_present(self) -> Iterator[None]:
        """Notes a failure of the present version."""
        try:
            yield
        except (Broken, Lost):
            self.present_failed()
            raise

    @contextmanager
    def until_late(self) -> Iterator[None]:
        """Who gives up because time is up has met an error; who leaves before has not."""
        try:
            yield
        except (asyncio.CancelledError, GeneratorExit):
            if perf_counter() - self._began >= _LATE * self._trial.timeout_s:
                self._count(**{"candidate" if self.tried else "present": FAILED})
            raise

    def _count(self, *, present: Figures | None = None, candidate: Figures | None = None) -> None:
        if self._counts and self._trial.change == self._change:  # else it belongs to figures of the past
            self._trial.count(self._key, present=present, candidate=candidate)


def _is_fault(event: Event) -> TypeGuard[Failed]:
    """The model's, not the request's."""
    return isinstance(event, Failed) and event.status >= 500


async def _with_more(events: AsyncGenerator[Event, None]) -> AsyncGenerator[Event, None]:
    """The beginning not before there is something to follow it, and not at all before a fault."""
    begun: Begun | None = None
    async with aclosing(events):
        async for event in events:
            if isinstance(event, Begun):
                begun = event
                continue
            if begun is not None and not _is_fault(event):
                yield begun
            begun = None
            yield event


T = TypeVar("T", Answer, Event)


def _told(found: T) -> T:
    """An answer or event of the candidate's, which says that it is."""
    if isinstance(found, Answer):
        return replace(found, model=_facts(found.model))
    if isinstance(found, Begun):
        return found.model_copy(update={"model": _facts(found.model)})
    if isinstance(found, Done):
        return found.model_copy(update={"answer": _told(found.answer)})
    return found


def _facts(model: ModelFacts) -> ModelFacts:
    return model.model_copy(update={"trial": True})
