"""`versions.json`: which versions a model has. One small file: numbers, duplicates and commits are one decision each.

An adder takes a number, writes the version's folder, and lists it. Until then nobody sees it; an adder that was killed
leaves an entry that is given up after a day, when somebody else adds.
"""

from datetime import datetime, timedelta
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from md4.errors import UserError

GIVEN_UP = timedelta(days=1)  # after which an addition that has not ended is taken for dead


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Entry(_Part):
    """A version, or an attempt at one."""

    number: int
    content: str = Field(description="as in the manifest")
    attempt: str = Field(description="drawn anew by each adder")
    since: datetime
    manifest_sha256: str | None = Field(default=None, description="null: not there yet")


class Listing(_Part):
    """What `versions.json` says."""

    format: Literal[1] = 1
    next: int = Field(default=1, description="number of the next attempt; none is given twice")
    versions: tuple[Entry, ...] = ()

    @property
    def there(self) -> list[Entry]:
        """The versions, oldest first."""
        return sorted((one for one in self.versions if one.manifest_sha256), key=lambda one: one.number)

    def same(self, content: str) -> Entry | None:
        """The version that has this content."""
        return next((one for one in self.there if one.content == content), None)

    def of(self, attempt: str) -> Entry | None:
        return next((one for one in self.versions if one.attempt == attempt), None)

    def begun(self, content: str, attempt: str, now: datetime) -> "Listing":
        """With a number taken for `content`, unless it is there or the attempt has one; without what was given up."""
        if self.same(content) is not None or self.of(attempt) is not None:
            return self
        entry = Entry(number=self.next, content=content, attempt=attempt, since=now)
        kept = tuple(one for one in self.versions if one not in self.dead(now))
        return Listing(next=self.next + 1, versions=(*kept, entry))

    def dead(self, now: datetime) -> list[Entry]:
        """Attempts that are taken for dead."""
        return [one for one in self.versions if one.manifest_sha256 is None and now - one.since > GIVEN_UP]

    def committed(self, attempt: str, manifest_sha256: str) -> "Listing":
        """With the attempt's version there, or without the attempt if its content came to be there meanwhile."""
        entry = self.of(attempt)
        if entry is None:
            raise UserError(f"this addition took longer than {GIVEN_UP.days * 24} hours and was given up: add it again")
        if entry.manifest_sha256 is not None:
            return self
        if self.same(entry.content) is not None:
            return self.withdrawn(attempt)
        listed = entry.model_copy(update={"manifest_sha256": manifest_sha256})
        return self.model_copy(update={"versions": tuple(listed if one is entry else one for one in self.versions)})

    def withdrawn(self, attempt: str) -> "Listing":
        """Without the attempt, if it has not succeeded."""
        kept = tuple(one for one in self.versions if one.attempt != attempt or one.manifest_sha256)
        return self.model_copy(update={"versions": kept})
