"""What a job is, in OUTPUT.job.json beside its output: it is resumed as that, or not at all."""

from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from md4.errors import UserError
from md4.samplers import SamplingConfig
from orchestration.sampling import ModelFacts
from orchestration.serving.job_input import LINES, kind_of
from pipelines.storage import write_atomically


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


class JobFiles:
    """The output of a job, and what lies beside it."""

    def __init__(self, output: Path):
        self.output = output
        self.lines = output if kind_of(output, "--output") in LINES else output.with_name(f"{output.name}.lines")
        self.job = output.with_name(f"{output.name}.job.json")

    def facts(self, resume: bool) -> JobFacts | None:
        """Of the job that is to be resumed; None if nothing is there. UserError for what is in the way."""
        there = [path for path in (self.output, self.lines, self.job) if path.exists() and path.stat().st_size]
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
        kept, given = _flat(before), _flat(now)
        changed = [name for name in kept | given if kept.get(name) != given.get(name)]
        if changed:
            lines = [f"{name}: the job has {kept.get(name)!r}, given is {given.get(name)!r}" for name in changed]
            raise UserError(f"{self.output} can't be resumed as another job:\n" + "\n".join(lines))

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
        found |= {f"{name}.{part}": one for part, one in value.items()} if isinstance(value, dict) else {name: value}
    return found
