"""What a job is: a command of `md4` that a cluster carries out. It stands alone: the files that it names go with it.

job = Job(verb="evaluate", arguments=("s3://bucket/runs/mine",), name="evaluate-mine")
Job.model_validate_json(job.model_dump_json()) == job
"""

import re
from enum import StrEnum
from pathlib import PurePosixPath

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from md4.errors import UserError
from orchestration.jobs import secrets

VERBS = ("train", "prepare", "search", "evaluate", "quality", "grid", "sample", "export")
PACKAGES = ("md4", "pipelines", "orchestration", "infra")  # what a file of a job must not be called
SPEC = "job.json"  # the job itself, in the folder in which it runs
ENVIRONMENT = "environment.json"  # what the sender has installed, there too
_NAME = r"[a-z0-9](?:[a-z0-9._-]{0,61}[a-z0-9])?"
# Those of Kubernetes, so that labels can become labels there.
_LABEL_KEY = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9._-]{0,61}[A-Za-z0-9])?")
_LABEL_VALUE = re.compile(r"(?:[A-Za-z0-9](?:[A-Za-z0-9._-]{0,61}[A-Za-z0-9])?)?")


class State(StrEnum):
    """Of a job, as Ray says it."""

    PENDING = "PENDING"
    RUNNING = "RUNNING"
    SUCCEEDED = "SUCCEEDED"
    FAILED = "FAILED"
    STOPPED = "STOPPED"

    @property
    def over(self) -> bool:
        return self in (State.SUCCEEDED, State.FAILED, State.STOPPED)


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Retry(_Part):
    """What a job may lose to failed attempts. A user's mistake (exit code 2) is never tried again."""

    attempts: int = Field(3, ge=1, le=1000, description="in a row without progress; of `train`, that is a checkpoint")
    first_s: float = Field(10, ge=0, description="seconds before the second attempt; doubled for each one after it")
    longest_s: float = Field(300, ge=0, description="seconds that are waited at most")
    budget_s: float | None = Field(None, ge=0, description="seconds in all of attempts that failed, and of waiting")


class Job(_Part):
    """A command of `md4`, and how it is to be carried out.

    arguments: as typed after `md4 VERB`; paths in them are the cluster's, or names of `files`.
    name: of train the run's; jobs of one name follow each other, never run at once.
    files: text by relative path, laid into the folder in which the command runs.
    typed, place: for people: the command as it was typed, and where its results go, if that is known.
    secrets: NAME=env:VARIABLE, NAME=file:PATH (both on the cluster's machines), NAME=k8s:SECRET/KEY. The command and
        its workers find the value in their environment as NAME.
    num_cpus, num_gpus: of the driver, not of its workers; 0 leaves it on the head.
    """

    verb: str
    arguments: tuple[str, ...] = ()
    name: str
    labels: dict[str, str] = {}
    secrets: tuple[str, ...] = ()
    retry: Retry = Retry.model_validate({})
    time_limit_s: float | None = Field(None, gt=0)
    num_cpus: float = Field(0, ge=0)
    num_gpus: float = Field(0, ge=0)
    files: dict[str, str] = {}
    typed: str | None = None
    place: str | None = None

    @field_validator("verb")
    @classmethod
    def _is_a_verb(cls, verb: str) -> str:
        if verb not in VERBS:
            raise ValueError(f"must be one of {', '.join(VERBS)}")
        return verb

    @field_validator("name")
    @classmethod
    def _is_a_name(cls, name: str) -> str:
        if not re.fullmatch(_NAME, name):
            raise ValueError("at most 63 of a-z 0-9 . _ - are allowed, with a letter or digit at both ends")
        return name

    @field_validator("labels")
    @classmethod
    def _are_labels(cls, labels: dict[str, str]) -> dict[str, str]:
        for key, value in labels.items():
            if not _LABEL_KEY.fullmatch(key) or not _LABEL_VALUE.fullmatch(value):
                raise ValueError(
                    f"{key}={value}: at most 63 of A-Z a-z 0-9 . _ - are allowed, with a letter or digit at both ends"
                )
        return labels

    @field_validator("secrets")
    @classmethod
    def _are_references(cls, references: tuple[str, ...]) -> tuple[str, ...]:
        for reference in references:
            secrets.parse(reference)
        return references

    @field_validator("files")
    @classmethod
    def _stay_below(cls, files: dict[str, str]) -> dict[str, str]:
        for name in files:
            path = PurePosixPath(name)
            if path.is_absolute() or not path.parts or ".." in path.parts or str(path) != name:
                raise ValueError(f"{name!r} is not a relative path below the job's folder")
            if path.parts[0].removesuffix(".py") in PACKAGES:
                raise ValueError(f"{name!r} would be taken for the package {path.parts[0].removesuffix('.py')!r}")
            if name in (SPEC, ENVIRONMENT):
                raise ValueError(f"{name!r} is the name of a file that goes with every job")
        return files

    @property
    def command(self) -> str:
        """For people: the command as one line."""
        import shlex

        return shlex.join(["md4", self.verb, *self.arguments])

    def refuse_secrets(self) -> None:
        """UserError if anything that is sent looks like a secret; names the place, never the value."""
        found = [
            *secrets.in_arguments(self.arguments),
            *secrets.in_tree({"labels": self.labels, "place": self.place, "command": self.typed}),
            *(place for name, text in self.files.items() for place in secrets.in_file(name, text)),
        ]
        if found:
            raise UserError(
                f"{'; '.join(found)}: secrets go by reference alone. Take it out, and name where the cluster's "
                "machines find it: --secret NAME=env:VARIABLE, NAME=file:PATH or NAME=k8s:SECRET/KEY"
            )


def make(**facts: object) -> Job:
    """A job; UserError with one line for each mistake, and for anything that looks like a secret."""
    try:
        job = Job.model_validate(facts)
    except ValidationError as error:
        lines = []
        for problem in error.errors():
            key = ".".join(str(part) for part in problem["loc"])
            value = "" if key.startswith(("secrets", "files", "labels")) else f"={problem['input']!r}"
            lines.append(f"{key}{value}: {problem['msg'].removeprefix('Value error, ')}")
        raise UserError("\n".join(lines)) from None
    job.refuse_secrets()
    return job
