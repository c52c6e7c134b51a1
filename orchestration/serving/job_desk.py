"""The requests of a job between input and output: so many under way as fill the network calls, written in their order.

What was read and not yet written stays small, however large the input is, and however long one request takes.
"""

import asyncio
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from time import perf_counter

from pydantic import ValidationError

from md4.errors import UserError
from md4.noise import key
from orchestration.sampling import LENGTH_LIMIT, SEED_LIMIT, Request
from orchestration.serving.config import ServingConfig
from orchestration.serving.engine import Engine
from orchestration.serving.errors import Refused, complaints, refusal
from orchestration.serving.job_facts import JobFacts
from orchestration.serving.job_input import FIELDS, JobInput, JobRequest, Row
from orchestration.serving.job_output import JobProblem, JobRecord, Lines
from orchestration.serving.models import Broken, Lost, ModelInfo
from orchestration.serving.sample_requests import drawn, request_of

# The limits of a service protect others; here are none, and these keep a slip from taking all of the memory.
_LIMITS = ServingConfig(max_count=2**15, max_length=LENGTH_LIMIT, max_steps=1_000_000)
ROOM = 2**16  # rows that may wait in the engine: more than there ever are, so that nothing is refused for want of it
_FULL = 4.0  # network calls that the rows under way fill: whatever their lengths, there are some for the next call
_HELD = 1 << 26  # bytes, about, of requests that are under way, or wait for one before them to be written
_REQUEST_BYTES, _TOKEN_BYTES = 1 << 12, 16  # of what there is of each beside its line
_EVERY_S = 10.0  # between two reports of progress
_NAME = "job"  # of the model, where there is only one


def seed_of(job_seed: int, index: int) -> int:
    """Of the first sample of request `index` that names no seed. The samples of two requests have seeds far apart."""
    return key(job_seed, "request", index) % (SEED_LIMIT - _LIMITS.max_count)


@dataclass(frozen=True)
class _Asked:
    """A request that was read."""

    record: JobRecord  # as yet without samples
    request: Request | None  # None if there is an error
    png: bool
    calls: float  # network calls that its rows fill
    held: int  # bytes, about, until it is written


class Desk:
    """Requests between the input and the output."""

    def __init__(self, engine: Engine, source: JobInput, facts: JobFacts, lines: Lines, report: Callable[[str], None]):
        self.engine, self.source, self.facts, self.lines, self.report = engine, source, facts, lines, report
        self.info: ModelInfo = engine.describe(_NAME)
        self.pending: deque[tuple[_Asked, asyncio.Task[JobRecord]]] = deque()  # in the order of the input
        self.calls, self.held = 0.0, 0  # sums over those under way, and over those pending
        self.changed = asyncio.Event()

    async def work(self) -> None:
        """Answer and write everything."""
        asked = self._read()
        following = next(asked, None)
        began = told = perf_counter()
        first = self.lines.count
        try:
            while following is not None or self.pending:
                while following is not None and self._has_room():
                    self._begin(following)
                    following = next(asked, None)
                self.changed.clear()
                if not self.pending[0][1].done():
                    await self.changed.wait()
                while self.pending and self.pending[0][1].done():
                    done, task = self.pending.popleft()
                    self.held -= done.held
                    self.lines.write(task.result())
                if (now := perf_counter()) - told >= _EVERY_S:
                    told = now
                    self._tell((self.lines.count - first) / (now - began))
        finally:
            for _, task in self.pending:
                task.cancel()
            await asyncio.gather(*(task for _, task in self.pending), return_exceptions=True)

    def _tell(self, rate: float) -> None:
        refused = f", {self.lines.refused:,} refused" if self.lines.refused else ""
        self.report(f"{self.lines.count:,} of {self.source.count:,} requests{refused}, {rate:.3g} a second")

    def _has_room(self) -> bool:
        return not self.pending or (self.calls < _FULL and self.held < _HELD)

    def _begin(self, asked: _Asked) -> None:
        task = asyncio.create_task(self._record(asked))
        self.pending.append((asked, task))
        self.calls += asked.calls
        self.held += asked.held

        def end(_: object) -> None:
            self.calls -= asked.calls
            self.changed.set()

        task.add_done_callback(end)

    async def _record(self, asked: _Asked) -> JobRecord:
        if asked.request is None:
            return asked.record
        try:
            answer = await self.engine.sample(asked.request)
            samples = drawn(answer, self.info, asked.png)
        except Lost:
            raise  # nothing more will be answered: that is not the request's fault
        except (UserError, Broken) as error:
            return asked.record.model_copy(update={"error": _problem(error)})
        return asked.record.model_copy(update={"samples": samples})

    def _read(self) -> Iterator[_Asked]:
        """Requests that are not written yet."""
        skipped = self.lines.count
        for index, row in enumerate(self.source.rows(skipped), skipped):
            yield self._asked(index, row)

    def _asked(self, index: int, row: Row) -> _Asked:
        record = JobRecord(index=index, model=self.facts.model)
        try:
            if isinstance(row.content, Refused):
                raise row.content
            record.id, record.metadata = row.content.get("id"), row.content.get("metadata")
            body = JobRequest.model_validate({**self.facts.defaults, **row.content}, strict=self.source.strict)
            if body.seed is None:
                body.seed = seed_of(self.facts.seed, index)
            request = request_of(body, self.info, _LIMITS)
        except (Refused, UserError, ValidationError) as error:
            record.error = _problem(error)
            return _Asked(record, None, False, 0, row.size + _REQUEST_BYTES)
        length = request.length or self.info.length
        seen = min(length, self.info.length)
        rows = request.count if request.settings.guidance == 1 else 2 * request.count
        held = row.size + _REQUEST_BYTES + _TOKEN_BYTES * request.count * length
        return _Asked(record, request, body.png, rows / self.engine.places(seen), held)


def _problem(error: Exception) -> JobProblem:
    if isinstance(error, ValidationError):
        return JobProblem(status=422, detail=Refused(422, complaints(error.errors(), FIELDS)).detail)
    found = refusal(error)
    return JobProblem(status=found.status, detail=found.detail)
