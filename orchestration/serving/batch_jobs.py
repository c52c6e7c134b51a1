"""A file of requests, answered by an engine in this process: `md4 sample RUN --input FILE --output FILE`.

Records come in the order of the input, each as soon as it and those before it are known. A request that can't be
answered gets a record that says why.

A request without a seed gets one that follows from the job's seed and its index (`seed_of`): the same job gives the
same records, and one that was interrupted goes on with what it would have given. What a job is stands in
OUTPUT.job.json; it is resumed only as the job that it was.
"""

import asyncio
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from md4.errors import UserError
from md4.samplers import SamplingConfig
from orchestration import sampling
from orchestration.sampling import ModelFacts, Request
from orchestration.serving.engine import Engine
from orchestration.serving.errors import complaints
from orchestration.serving.job_desk import ROOM, Desk
from orchestration.serving.job_facts import InputFacts, JobFacts, JobFiles, Outcome
from orchestration.serving.job_input import FIELDS, JobInput, JobRequest, open_input
from orchestration.serving.job_output import Lines, write_table
from orchestration.serving.models import Lost

if TYPE_CHECKING:
    from orchestration.runs import Loaded


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


def run(job: BatchJob, load: "Callable[[], Loaded]", report: Callable[[str], None]) -> Outcome:
    """Do the job. `load` gives the model, once everything else was checked.

    Raises `UserError` for an output that is there already or is another job's, and for a file that can't be read or
    written, or if the engine fails. What was written before stays.
    """
    files = JobFiles(job.output)
    before = files.facts(job.resume)
    source, defaults = open_input(job.input), job.defaults
    if before is not None and before.outcome is not None and job.output.exists():
        files.compare(before, _facts(job, source, defaults, before.run, before.model, before.seed))
        report(f"{job.output} is complete")
        files.clear()
        return before.outcome
    loaded = load()
    _check(loaded, job)
    seed = sampling.random_seed() if before is None else before.seed
    facts = _facts(job, source, defaults, loaded.config.name, sampling.facts(loaded), seed)
    if before is not None:
        files.compare(before, facts)
    with closing(Lines(files.lines)) as lines:  # nobody else has it now
        if files.facts(job.resume) != before:
            raise UserError(f"{job.output} was written by another job just now")
        if before is None:
            files.note(facts)
        done = f", {lines.count:,} of which are done" if lines.count else ""
        report(f"{source.count:,} requests{done}; step {loaded.step}, seed {facts.seed}")
        if lines.count < source.count:
            try:
                asyncio.run(_answer(loaded, source, facts, lines, report))
            except Lost as error:
                raise UserError(f"{error}; {lines.count:,} requests are done, --resume goes on") from error
        if files.lines != job.output:
            write_table(files.lines, source, job.output)
        outcome = Outcome(answered=lines.answered, refused=lines.refused, problem=lines.problem)
    files.note(facts.model_copy(update={"outcome": outcome}))
    files.clear()
    return outcome


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
    config = loaded.config.serving.engine.model_copy(update={"max_waiting_rows": ROOM})
    engine = Engine(loaded, config, settings=facts.settings)
    try:
        while engine.healthy and not engine.stats().ready:  # it measures how many rows a call takes
            await asyncio.sleep(0.01)
        await Desk(engine, source, facts, lines, report).work()
    finally:
        await engine.close(drain=False)
