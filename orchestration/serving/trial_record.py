"""What all replicas know of a version that is tried, in one file beside the name that it is tried as:

    REGISTRY/MODEL/names/production.canary.json

Each replica keeps figures of its own and writes them there, by compare-and-swap, whenever it looks at the name; the
verdict is about all of them. So what a replica had written counts when it dies, and what it had not is lost. A request
that failed in several of them, or again after one was started anew, is one error: keys are noted and united. Answers,
of which there are many, are added up: each counts once in a replica. The file is of one state of the name: after any
change of it (another share, another present version) figures begin anew. Nothing depends on it but the verdict: a
service whose registry can't be reached goes on with what it has.
"""

from collections.abc import Iterable
from datetime import datetime
from functools import reduce
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from orchestration.registry import Registry, documents
from orchestration.registry.names import Name
from orchestration.serving.canary import Figures, Quality
from pipelines.storage import Folder

_ERRORS = 1024  # of one replica, of both versions together, whose keys are kept: further ones are not counted


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Seen(_Part):
    """What became of the requests."""

    present: Figures = Figures()
    candidate: Figures = Figures()
    quality: Quality | None = None


class Part(Seen):
    """What one replica saw, and the requests (`canary.key`) that failed there."""

    present_failed: tuple[int, ...] = ()
    candidate_failed: tuple[int, ...] = ()

    def with_request(self, key: int, present: Figures, candidate: Figures) -> "Part":
        """The same with what became of another request.

        When there are too many errors to keep, none is counted any more, of either version: if those of one went on,
        they would speak against it.
        """
        full = len(self.present_failed) + len(self.candidate_failed) >= _ERRORS
        if full and present.errors + candidate.errors:
            return self
        return Part(
            present=self.present + present,
            candidate=self.candidate + candidate,
            quality=self.quality,
            present_failed=(*self.present_failed, *([key] if present.errors else [])),
            candidate_failed=(*self.candidate_failed, *([key] if candidate.errors else [])),
        )


class Record(_Part):
    """A trial."""

    format: Literal[1] = 1
    change: str = Field(description="id of the last change of the name's history: the figures are of the time since")
    changes: int = Field(description="that there had been")
    present: int | None = Field(description="version that the name stands for")
    candidate: int
    share: float
    since: datetime = Field(description="that change; `max_seconds` is counted from here")
    replicas: dict[str, Part] = {}

    def with_part(self, replica: str, part: Part) -> "Record":
        """The same with what a replica knows by now."""
        return self.model_copy(update={"replicas": {**self.replicas, replica: part}})

    def total(self) -> Seen:
        """All replicas together: answers are added up, and a request that failed in several is one error."""
        parts = list(self.replicas.values())
        scored = [part.quality for part in parts if part.quality is not None]  # all the same, up to rounding
        return Seen(
            present=_joined((part.present, part.present_failed) for part in parts),
            candidate=_joined((part.candidate, part.candidate_failed) for part in parts),
            quality=scored[0] if scored else None,
        )


def read(registry: Registry, name: Name) -> Record | None:
    """The trial that is under way, None if there is none or nothing is known of it."""
    found = documents.read(Record, _folder(registry, name), _file(name))
    return found if found is not None and name.history and found.change == name.history[-1].id else None


def write(registry: Registry, name: Name, replica: str, part: Part) -> Record | None:
    """Put a replica's figures of the trial under way into its place; the whole record, None if it is over.

    Raises `UserError` if the registry can't be reached.
    """
    new = _begun(name)

    def put(found: Record | None) -> Record | None:
        if found is not None and found.changes > new.changes:
            return None  # the name was changed: these figures are of the past
        record = found if found is not None and found.change == new.change else new
        if record.replicas.get(replica) == part:
            return None
        return record.with_part(replica, part)

    found = documents.update(Record, _folder(registry, name), _file(name), put)
    return found if found is not None and found.change == new.change else None


def _joined(parts: Iterable[tuple[Figures, tuple[int, ...]]]) -> Figures:
    every = list(parts)
    answers = reduce(Figures.__add__, (figures for figures, _ in every), Figures())
    return answers.model_copy(update={"errors": len({key for _, failed in every for key in failed})})


def _begun(name: Name) -> Record:
    trial = name.candidate
    assert trial is not None
    return Record(
        change=name.history[-1].id,
        changes=len(name.history),
        present=name.version,
        candidate=trial.version,
        share=trial.share,
        since=name.history[-1].at,
    )


def _folder(registry: Registry, name: Name) -> Folder:
    return registry.folder / name.model


def _file(name: Name) -> str:
    return f"names/{name.name}.canary.json"
