"""What is to run, and when."""

import re
from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator

from md4.errors import UserError
from orchestration.cron.schedule import Schedule
from orchestration.jobs import Job

ON_TIME_S = 60  # a time that is seen within a minute is not late

_NAME = re.compile(r"[a-z0-9](?:[a-z0-9-]{0,38}[a-z0-9])?")


def check_name(name: str) -> str:
    """UserError for what can't be the name of an entry."""
    if not _NAME.fullmatch(name):
        raise UserError(f"name {name!r}: at most 40 of a-z 0-9 - are allowed, with a letter or digit at both ends")
    return name


def _zone_of_the_list(zone: str) -> str:
    Schedule("* * * * *", zone)
    return zone


class Entry(BaseModel):
    """A job and its times.

    overlap: what happens at a time when the run of an earlier one has not ended. "skip": nothing, and that is recorded;
    "wait": it runs afterwards; one waits at most, a later time takes the place of an earlier one.
    catch_up_s: seconds after which a time that was missed (the service or the cluster was away) is no longer run.
    Of several missed times within them the last runs. 0 = only what is seen within a minute runs.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: Annotated[str, AfterValidator(check_name)]
    schedule: str = Field(description="minute, hour, day of month, month, day of week, as in crontab(5)")
    zone: Annotated[str, AfterValidator(_zone_of_the_list)] = Field("UTC", description="of the IANA list")
    job: Job
    overlap: Literal["skip", "wait"] = "skip"
    catch_up_s: float = Field(0.0, ge=0, allow_inf_nan=False)
    paused: bool = False

    @model_validator(mode="after")
    def _the_times_come(self) -> "Entry":
        self.times()
        return self

    def times(self) -> Schedule:
        """When it is to run."""
        return Schedule(self.schedule, self.zone)

    @property
    def window_s(self) -> float:
        """Seconds after a planned time within which it may still be run."""
        return max(ON_TIME_S, self.catch_up_s)


def make(**facts: object) -> Entry:
    """An entry; UserError with one line for each mistake."""
    try:
        return Entry.model_validate(facts)
    except ValidationError as error:
        lines = []
        for problem in error.errors():
            key, message = ".".join(map(str, problem["loc"])), problem["msg"].removeprefix("Value error, ")
            ours = not key or problem["type"] == "value_error"  # those name the value themselves
            lines.append(message if ours else f"{key}={problem['input']!r}: {message[0].lower()}{message[1:]}")
        raise UserError("\n".join(lines)) from None
