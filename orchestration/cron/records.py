"""What became of each planned time.

    waiting -> running -> succeeded | failed | stopped | lost      it ran, once
    waiting -> skipped | missed                                    it did not, and why
    skipped | missed                                               the same, known at once

A record is made before anything else happens, by whoever comes first, and no step goes back: that is why a restart, or
a second service, runs nothing twice. Records of an entry follow each other without a gap, so the last one says up to
when every time has its record.
"""

from datetime import UTC, datetime
from enum import StrEnum
from typing import Annotated

from pydantic import AfterValidator, AwareDatetime, BaseModel, ConfigDict

Time = Annotated[AwareDatetime, AfterValidator(lambda time: time.astimezone(UTC))]


class Status(StrEnum):
    """Where a planned time stands."""

    WAITING = "waiting"  # to be submitted, or it is not known whether that arrived
    RUNNING = "running"  # the cluster has it
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    STOPPED = "stopped"  # by somebody, or by the service after its time limit
    LOST = "lost"  # the cluster had it and no longer knows it
    SKIPPED = "skipped"  # on purpose: overlap, pause, removal
    MISSED = "missed"  # the service or the cluster was not there in time

    @property
    def open(self) -> bool:
        """Is there something to come?"""
        return self in (Status.WAITING, Status.RUNNING)


class Record(BaseModel):
    """One planned time; or several in a row, of which none ran, for the same reason."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str  # of the entry
    planned: Time
    last: Time  # of several times; else as planned
    count: int = 1
    status: Status
    reason: str = ""
    job: str = ""  # digest of the job, see `Store.job`
    time_limit_s: float | None = None
    recorded: Time
    after: str | None = None  # submission id of the run whose end it waits for, or waited for
    first_attempt: Time | None = None  # to submit it
    last_attempt: Time | None = None
    submitted: Time | None = None
    started: Time | None = None  # seen running first
    stopping: Time | None = None  # the service asked for its end, the last time
    ended: Time | None = None  # seen ended

    @property
    def submission_id(self) -> str:
        """On the cluster."""
        return f"cron-{self.name}-{stamp(self.planned)}"

    @property
    def seconds(self) -> float | None:
        """From the first sight of it running to that of its end."""
        begun = self.started or self.submitted
        return (self.ended - begun).total_seconds() if begun and self.ended else None


def stamp(time: datetime) -> str:
    """A time as names have it: 20261130T023000Z."""
    return f"{time.astimezone(UTC):%Y%m%dT%H%M%SZ}"
