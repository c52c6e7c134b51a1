"""A signed-off name: which version it stands for, which one is being tried, and how that came.

What may happen to it are pure functions from one `Name` to the next. `Registry` writes the result by compare-and-swap,
so that whatever happens at the same time, the history is one chain: each change begins where the one before ended.
"""

from collections.abc import Mapping
from datetime import datetime
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from md4.errors import UserError

Action = Literal["promote", "candidate", "confirm", "drop", "rollback"]


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Candidate(_Part):
    """A version that gets a part of the traffic before it is signed off."""

    version: int
    share: float = Field(gt=0, lt=1, description="of the requests")
    since: datetime


class Signature(_Part):
    """Who changes something, when and why, and what allowed it."""

    id: str = Field(description="of the attempt: one that is made again after a lost answer changes nothing twice")
    by: str
    at: datetime
    why: str = ""
    forced: bool = Field(default=False, description="the rules were not met, or not asked")
    figures: dict[str, Any] | None = Field(
        default=None, description="the rules and figures that allowed or demanded it"
    )


class Change(Signature):
    """One change, as the history keeps it."""

    action: Action
    version: int = Field(description="that it is about")
    before: int | None = Field(description="what the name stood for")
    after: int | None = Field(description="and does since")
    share: float | None = Field(default=None, description="of a candidate")


class Name(_Part):
    """What `names/NAME.json` says."""

    format: Literal[1] = 1
    model: str
    name: str
    version: int | None = Field(default=None, description="that it stands for")
    candidate: Candidate | None = None
    history: tuple[Change, ...] = ()

    @property
    def signed(self) -> list[int]:
        """The versions that it stood for and could go back to, the present one last: what was rolled back is gone."""
        stack: list[int] = []
        for change in self.history:
            if change.action in ("promote", "confirm"):
                stack.append(change.version)
            elif change.action == "rollback" and stack:
                stack.pop()
        return stack

    @property
    def previous(self) -> int | None:
        """What a rollback goes back to, if nothing is being tried."""
        return self.signed[-2] if len(self.signed) > 1 else None

    def rejected(self, version: int) -> Change | None:
        """How a version was taken back or dropped, unless it was signed off again since."""
        for change in reversed(self.history):
            if change.version == version:
                return change if change.action in ("drop", "rollback") else None
        return None

    def holds(self, attempt: str) -> bool:
        """Was the change of this attempt made?"""
        return any(change.id == attempt for change in self.history)


def promote(found: Name, version: int, share: float | None, signed: Signature) -> Name:
    """The name given to a version, or tried with a share of the traffic; UserError for what can't be.

    The same object if nothing changes: the version has the name already.
    """
    trial = found.candidate
    if trial is not None and trial.version != version:
        raise UserError(
            f"{found.model}: version {trial.version} is being tried as {found.name} with {trial.share:.0%} of the "
            "traffic: confirm or roll back that one first"
        )
    if version == found.version:
        return found
    if share is None:
        return _moved(found, "promote" if trial is None else "confirm", version, signed)
    if not 0 < share < 1:
        raise UserError(f"share is {share:g}; it lies between 0 and 1 (without one the version gets all)")
    if found.version is None:
        raise UserError(
            f"{found.model} has no {found.name} yet, so nothing gets the rest of the traffic: leave out share"
        )
    if trial is not None and trial.share == share:
        return found
    return _noted(
        found,
        "candidate",
        version,
        signed,
        share=share,
        candidate=Candidate(version=version, share=share, since=signed.at if trial is None else trial.since),
    )


def confirm(found: Name, version: int, signed: Signature) -> Name:
    """The candidate takes the name; the same object if it has it already, UserError if it is no candidate."""
    if found.candidate is None and found.version == version:
        return found
    if found.candidate is None or found.candidate.version != version:
        now = "none" if found.candidate is None else f"version {found.candidate.version}"
        raise UserError(f"{found.model}: version {version} is not being tried as {found.name} (now: {now})")
    return _moved(found, "confirm", version, signed)


def rollback(found: Name, version: int | None, signed: Signature) -> Name:
    """The candidate dropped, or else the version before taken back.

    version: which one is to lose the name or its share; the same object if it has neither any more. None: whichever.
    Raises UserError if there is nothing to go back to.
    """
    trial = found.candidate
    if trial is not None and version in (None, trial.version):
        return _noted(found, "drop", trial.version, signed)
    if found.version is None:
        raise UserError(f"{found.model}: nothing was ever signed off as {found.name}")
    if version not in (None, found.version):
        return found
    if found.previous is None:
        raise UserError(f"{found.model}: version {found.version} is the first {found.name}; there is none before it")
    still = trial if trial is not None and trial.version != found.previous else None
    return _noted(found, "rollback", found.version, signed, after=found.previous, candidate=still)


def _moved(found: Name, action: Action, version: int, signed: Signature) -> Name:
    return _noted(found, action, version, signed, after=version)


def _noted(
    found: Name,
    action: Action,
    version: int,
    signed: Signature,
    *,
    after: int | None = None,
    share: float | None = None,
    candidate: Candidate | None = None,
) -> Name:
    after = found.version if after is None else after
    facts: Mapping[str, Any] = signed.model_dump()
    change = Change(**facts, action=action, version=version, before=found.version, after=after, share=share)
    return Name(
        model=found.model,
        name=found.name,
        version=after,
        candidate=candidate,
        history=(*found.history, change),
    )
