"""A file of requests, answered by an engine in this process: `md4 sample RUN --input FILE --output FILE`.

Records come in the order of the input, and each as soon as it and those before it are known. So many requests are under
way as fill the network calls; what is read and not yet written stays small, however large the file is.

A request without a seed gets one that follows from the job's seed and its index (`seed_of`): the same job gives the
same records, and one that was interrupted goes on with what it would have given. What a job is stands in
OUTPUT.job.json; it is resumed only as the job that it was.
"""

import asyncio
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from md4.errors import UserError
from md4.noise import key
from md4.samplers import SamplingConfig
from orchestration import sampling
from orchestration.sampling import LENGTH_LIMIT, SEED_LIMIT, ModelFacts, Request
from orchestration.serving.config import ServingConfig
from orchestration.serving.engine import Engine
from orchestration.serving.errors import Refused, complaints, refusal
from orchestration.serving.job_input import FIELDS, LINES, JobInput, JobRequest, Row, kind_of, open_input
from orchestration.serving.job_output import JobProblem, JobRecord, Lines, write_table
from orchestration.serving.models import Broken, Lost, ModelInfo
from orchestration.serving.sample_requests import drawn, request_of
from pipelines.storage import write_atomically

if TYPE_CHECKING:
    from orchestration.runs import Loaded

# The limits of a service protect others; here are none, and these keep a slip from taking all of the memory.
_LIMITS = ServingConfig(max_count=2**15, max_length=LENGTH_LIMIT, max_steps=1_000_000)
_ROOM = 2**16  # rows that may wait in the engine: more than there ever are, so that nothing is refused for want of it
_FULL = 4.0  # network calls that the rows under way fill: whatever their lengths, there are some for the next call
_HELD = 1 << 26  # bytes, about, of requests that are under way, or wait for one before them to be written
_REQUEST_BYTES, _TOKEN_BYTES = 1 << 12, 16  # of what there is of each beside its line
_EVERY_S = 10.0  # between two reports of progress
_NAME = "job"  # of the model, where there is only one


@dataclass(frozen=True)
class BatchJob:
    """What is to be done.

    input, output: files, .jsonl or .parquet; resume: go on with an output that is there.
    count, length, label, stop: of requests that don't say; settings: of requests that name none.
    seed: of the job; None: a random one, or that of the job that is resumed.
    """

    input: Path
    output: Path
    resume: bool = False
    count: int = 1
    length: int | None = None
    label: int | None = None
    stop: str | None = None
    seed: int | None = None
    settings: SamplingConfig = field(default_factory=SamplingConfig)

    @property
    def defaults(self) -> dict[str, Any]:
        """Fields of requests that don't have them. UserError for what no request could have."""
        given = {"count": self.count, "length": self.length, "label": self.label, "stop": self.stop}
        given = {name: value for name, value in given.items() if value is not None}
        try:
            JobRequest.model_validate({**given, "seed": self.seed})
        except ValidationError as error:
            raise UserError(complaints(error.errors(), FIELDS)) from None
        return given


class Outcome(BaseModel):
    """How a job ended."""

    answered: int
    refused: int
    problem: str | None = Field(None, description="of the first request that was refused")


class InputFacts(BaseModel):
    """The file of requests."""

    bytes: int
    sha256: str


class JobFacts(BaseModel):
    """What a job is, as it stands in OUTPUT.job.json."""

    model_config = ConfigDict(extra="forbid")

    version: str = Field(description="of the program")
    run: str
    model: ModelFacts
    input: InputFacts
    settings: SamplingConfig = Field(description="of requests that name none")
    defaults: dict[str, Any] = Field(description="other fields of requests that don't have them")
    seed: int
    outcome: Outcome | None = None


def seed_of(job_seed: int, index: int) -> int:
    """Of the first sample of request `index` that names no seed. The samples of two requests have seeds far apart."""
    return key(job_seed, "request", index) % (SEED_LIMIT - _LIMITS.max_count)


def run(job: BatchJob, load: "Callable[[], Loaded]", report: Callable[[str], None]) -> Outcome:
    """Do the job. `load` gives the model, once everything else was checked.

    Raises `UserError` for an output that is there already or is another job's, and for a file that can't be read or
    written, or if the engine fails. What was written before stays.
    """
    place = _Place(job.output)
    before = place.facts(job.resume)
    source, defaults = open_input(job.input), job.defaults
    if before is not None and before.outcome is not None and job.output.exists():
        place.compare(before, _facts(job, source, defaults, before.run, before.model, before.seed))
        report(f"{job.output} is complete")
        place.clear()
        return before.outcome
    loaded = load()
    _check(loaded, job)
    seed = sampling.random_seed() if before is None else before.seed
    facts = _facts(job, source, defaults, loaded.config.name, sampling.facts(loaded), seed)
    if before is None:
        place.note(facts)
    else:
        place.compare(before, facts)
    with closing(Lines(place.lines)) as lines:
        done = f", {lines.count:,} of which are done" if lines.count else ""
        report(f"{source.count:,} requests{done}; step {loaded.step}, seed {facts.seed}")
        if lines.count < source.count:
            try:
                asyncio.run(_answer(loaded, source, facts, lines, report))
            except Lost as error:
                raise UserError(f"{error}; {lines.count:,} requests are done, --resume goes on") from error
        if place.lines != job.output:
            write_table(place.lines, source, job.output)
        outcome = Outcome(answered=lines.answered, refused=lines.refused, problem=lines.problem)
    place.note(facts.model_copy(update={"outcome": outcome}))
    place.clear()
    return outcome


class _Place:
    """The files of a job."""

    def __init__(self, output: Path):
        self.output = output
        self.lines = output if kind_of(output, "--output") in LINES else output.with_name(f"{output.name}.lines")
        self.job = output.with_name(f"{output.name}.job.json")

    def facts(self, resume: bool) -> JobFacts | None:
        """Of the job that is to be resumed; None if nothing is there. UserError for what is in the way."""
        there = [path for path in (self.output, self.lines, self.job) if path.exists()]
        if not there:
            return None
        if not resume:
            others = ", ".join(str(path) for path in dict.fromkeys(there))
            raise UserError(
                f"{there[0]} exists already: --resume goes on with it; or choose another, or remove {others}"
            )
        if not self.job.exists():
            raise UserError(f"{there[0]} can't be resumed: {self.job}, which tells of what job it is, is not there")
        try:
            return JobFacts.model_validate_json(self.job.read_bytes())
        except (OSError, ValidationError) as error:
            raise UserError(f"can't read {self.job}: {str(error).splitlines()[0]}") from None

    def compare(self, before: JobFacts, now: JobFacts) -> None:
        """UserError if it is another job."""
        kept, given = (facts.model_dump(mode="json", exclude={"run", "outcome"}) for facts in (before, now))
        changed = [
            f"{name}: the job has {kept[name]!r}, given is {given[name]!r}"
            for name in kept
            if kept[name] != given[name]
        ]
        if changed:
            raise UserError(f"{self.output} can't be resumed as another job:\n" + "\n".join(changed))

    def note(self, facts: JobFacts) -> None:
        """UserError if it can't be written."""
        try:
            write_atomically(self.job, facts.model_dump_json(indent=1).encode() + b"\n")
        except OSError as error:
            raise UserError(f"can't write {self.job}: {error.strerror or error}") from None

    def clear(self) -> None:
        """Of a table the lines are not needed any more."""
        if self.lines != self.output:
            self.lines.unlink(missing_ok=True)


def _flat(facts: JobFacts) -> dict[str, Any]:
    """What makes a job what it is, by dotted names."""
    found: dict[str, Any] = {}
    for name, value in facts.model_dump(mode="json", exclude={"run", "outcome"}).items():
        inner = {f"{name}.{key}": one for key, one in value.items()} if isinstance(value, dict) else {name: value}
        found |= inner
    return found


def _facts(
    job: BatchJob, source: JobInput, defaults: dict[str, Any], run: str, model: ModelFacts, seed: int
) -> JobFacts:
    return JobFacts(
        version=version("md4"),
        run=run,
        model=model,
        input=InputFacts(bytes=source.bytes, sha256=source.sha256),
        settings=job.settings,
        defaults=defaults,
        seed=seed if job.seed is None else job.seed,
    )


def _check(loaded: "Loaded", job: BatchJob) -> None:
    """UserError for defaults that this model can't do."""
    label = 0 if job.label is None and loaded.config.model.classes else job.label
    sampling.prepare(loaded, Request(label=label, stop=job.stop, settings=job.settings))


async def _answer(
    loaded: "Loaded", source: JobInput, facts: JobFacts, lines: Lines, report: Callable[[str], None]
) -> None:
    """Have all requests that are not in `lines` answered, and written there."""
    config = loaded.config.serving.engine.model_copy(update={"max_waiting_rows": _ROOM})
    engine = Engine(loaded, config, settings=facts.settings)
    try:
        while engine.healthy and not engine.stats().ready:  # it measures how many rows a call takes
            await asyncio.sleep(0.01)
        await _Desk(engine, source, facts, lines, report).work()
    finally:
        await engine.close(drain=False)


@dataclass(frozen=True)
class _Asked:
    """A request that was read."""

    record: JobRecord  # as yet without samples
    request: Request | None  # None if there is an error
    png: bool
    calls: float  # network calls that its rows fill
    held: int  # bytes, about, until it is written


class _Desk:
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
