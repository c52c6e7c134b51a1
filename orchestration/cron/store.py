"""Where entries and records lie: a folder, on this machine or in S3, with files of JSON.

    entries/NAME.json                        what is to run
    removed/NAME.json                        what was, last
    jobs/DIGEST.json                         a job, by the hash of what it is
    runs/NAME/2026-11/20261130T023000Z.json  what became of the time(s) from this one on
    runs/NAME/closed.json                    all records up to a time are closed: nobody need read them again

Records are made only where there is none and changed only if nobody else has, so any number of services may share it.
"""

import hashlib
import os
import re
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from typing import TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from md4.errors import UserError
from orchestration.cron.entry import Entry
from orchestration.cron.plan import account
from orchestration.cron.records import Record, Status, Time, stamp
from orchestration.jobs import Job
from pipelines.storage import Folder

PLACE = "MD4_CRON"
_RUN = re.compile(r"runs/(?P<name>[a-z0-9-]+)/(?P<month>\d{4}-\d{2})/(?P<stamp>\d{8}T\d{6}Z)\.json")
_ENTRY = re.compile(r"(?:entries|removed)/([a-z0-9-]+)\.json")
Kind = TypeVar("Kind", bound=BaseModel)


class Stored(BaseModel):
    """An entry, and from when on its times count. Paused ones are stored as such."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    entry: Entry
    since: Time
    job: str  # digest of the entry's job


class _Closed(BaseModel):
    through: Time


class Store:
    """The store at `place`; None = what MD4_CRON says, else `cron`. It need not be there yet."""

    def __init__(self, place: str | Folder | None = None):
        self.folder = Folder(place or os.environ.get(PLACE) or "cron")

    def __str__(self) -> str:
        return str(self.folder)

    # -- entries ---------------------------------------------------------------------------------------------------

    def entries(self) -> Iterator[tuple[str, Stored | UserError]]:
        """Every entry by name, sorted; what is wrong instead of one that can't be read."""
        for file in self.folder.list("entries"):
            if match := _ENTRY.fullmatch(file):
                try:
                    yield match[1], self._read(file, Stored)
                except FileNotFoundError:  # removed since
                    continue
                except UserError as error:
                    yield match[1], error

    def entry(self, name: str) -> Stored:
        """UserError if there is none, with those that there are."""
        try:
            return self._read(f"entries/{name}.json", Stored)
        except FileNotFoundError:
            names = ", ".join(name for name, _ in self.entries()) or "none"
            raise UserError(f"no entry {name!r} in {self}; there are: {names}") from None

    def names(self) -> set[str]:
        """Of entries that are or were."""
        files = [*self.folder.list("entries"), *self.folder.list("removed")]
        return {match[1] for file in files if (match := _ENTRY.fullmatch(file))}

    def add(self, entry: Entry, now: datetime, *, replace: bool = False) -> bool:
        """Keep an entry; its times count from now on. False if the very same is there already; UserError for another.

        replace: another one is taken out first.
        """
        digest = self._keep(entry.job)
        new = Stored(entry=entry, since=now, job=digest)

        def put(old: bytes | None) -> bytes | None:
            nonlocal known
            known = Stored.model_validate_json(old) if old is not None else None
            if known is not None and (known.entry == entry or not replace):
                return None
            return _json(new)

        known: Stored | None = None
        if replace and self.folder.exists(f"entries/{entry.name}.json"):
            self._settle(entry.name, now, "the entry was replaced")
        self.folder.update(f"entries/{entry.name}.json", put)
        if known is None or replace:
            return known is None or known.entry != entry
        if known.entry == entry:
            return False
        raise UserError(
            f"{self} has another entry {entry.name!r} already ({known.entry.schedule!r}, {known.entry.job.command}): "
            "remove it first, or --replace it"
        )

    def remove(self, name: str, now: datetime) -> None:
        """Take an entry out, sound or not; UserError if there is none. Its records stay, and what runs is followed to
        its end."""
        try:
            data = self.folder.read(f"entries/{name}.json")
        except FileNotFoundError:
            self.entry(name)
            raise
        if (found := dict(self.entries()).get(name)) and not isinstance(found, UserError):
            self._settle(name, now, "the entry was removed")
        self.folder.write(f"removed/{name}.json", data)
        self.folder.remove(f"entries/{name}.json")

    def pause(self, name: str, paused: bool, now: datetime) -> bool:
        """Pause an entry, or resume it; False if it is so already. What came before has its reason."""
        if self.entry(name).entry.paused == paused:
            return False
        self._settle(name, now, "paused before it was seen" if paused else "paused")

        def turn(old: bytes | None) -> bytes | None:
            if old is None:
                raise UserError(f"the entry {name!r} was removed meanwhile")
            stored = Stored.model_validate_json(old)
            entry = stored.entry.model_copy(update={"paused": paused})
            return _json(stored.model_copy(update={"entry": entry}))

        self.folder.update(f"entries/{name}.json", turn)
        return True

    def job(self, digest: str) -> Job:
        """A job by its digest."""
        try:
            return self._read(f"jobs/{digest}.json", Job)
        except FileNotFoundError:
            raise UserError(f"{self.folder.path(f'jobs/{digest}.json')} is gone: a planned run needs it") from None

    # -- records ---------------------------------------------------------------------------------------------------

    def create(self, record: Record) -> bool:
        """Keep a new record; False if its time has one."""
        try:
            self.folder.create(_file(record), _json(record))
        except FileExistsError:
            return False
        return True

    def change(self, old: Record, new: Record) -> bool:
        """Replace a record; False if it is not `old` any more."""
        done = False

        def put(found: bytes | None) -> bytes | None:
            nonlocal done
            done = found is not None and Record.model_validate_json(found) == old
            return _json(new) if done else None

        self.folder.update(_file(old), put)
        return done

    def history(self, name: str, count: int | None = None) -> list[Record]:
        """The records of an entry that is or was, the newest first; UserError for one that can't be read."""
        files = [file for file in self.folder.list(f"runs/{name}") if _RUN.fullmatch(file)]
        return [self._read(file, Record) for file in sorted(files, reverse=True)[:count]]

    def ledger(self, name: str) -> "Ledger":
        """The records of an entry, for one who looks at them again and again."""
        return Ledger(self, name)

    def _settle(self, name: str, now: datetime, reason: str) -> None:
        """Give all times up to now a record, so that what comes is not taken for them."""
        ledger = self.ledger(name)
        while True:
            stored = self.entry(name)
            seen = max(ledger.look(now), stored.since)
            record = account(stored.entry, seen, now, Status.SKIPPED, reason)
            if record is None or self.create(record):
                return

    def _keep(self, job: Job) -> str:
        data = _json(job)
        digest = hashlib.sha256(data).hexdigest()[:16]
        self.folder.create(f"jobs/{digest}.json", data)
        return digest

    def _read(self, file: str, kind: type[Kind]) -> Kind:
        try:
            return kind.model_validate_json(self.folder.read(file))
        except ValidationError as error:
            problem = error.errors()[0]
            where = ".".join(map(str, problem["loc"]))
            raise UserError(f"{self.folder.path(file)}: {where}: {problem['msg']}") from None


class Ledger:
    """The open records of one entry. Closed ones are read once: they don't change."""

    def __init__(self, store: Store, name: str):
        self._store, self.name = store, name
        self._known: dict[str, Record] = {}  # by file
        self._through: datetime | None = None  # up to it, all are closed

    @property
    def open(self) -> list[Record]:
        """As of the last look, in order."""
        return [record for _, record in sorted(self._known.items()) if record.status.open]

    def look(self, now: datetime) -> datetime:
        """Read what is new. The time up to which all planned ones have a record, the year 1970 if none has."""
        if self._through is None:
            self._through = self._read_closed()
        files = [file for file in self._files(now) if self._is_new(file)]
        for file in files:
            self._known[file] = self._store._read(file, Record)
        seen = max((record.last for record in self._known.values()), default=self._through)
        self._forget()
        return seen

    def _is_new(self, file: str) -> bool:
        match = _RUN.fullmatch(file)
        if match is None or (self._through and match["stamp"] <= stamp(self._through)):
            return False
        known = self._known.get(file)
        return known is None or known.status.open

    def _files(self, now: datetime) -> list[str]:
        """Those that may be new or have changed: a listing of years is read once only."""
        assert self._through is not None
        if self._through.year == 1970:
            return list(self._store.folder.list(f"runs/{self.name}"))
        months, month = [], self._through.replace(day=1)
        while month <= now + timedelta(days=1):  # the clock of another service may be ahead
            months.append(f"{month:%Y-%m}")
            month = (month + timedelta(days=32)).replace(day=1)
        return [file for each in months for file in self._store.folder.list(f"runs/{self.name}/{each}")]

    def _forget(self) -> None:
        """Let go of closed records before the first open one, all but the last, and note that for those to come."""
        files = sorted(self._known)
        first_open = next((place for place, file in enumerate(files) if self._known[file].status.open), len(files))
        closed = files[: min(first_open, len(files) - 1)]
        if len(closed) < 100:
            return
        through = self._through = self._known[closed[-1]].last
        for file in closed:
            del self._known[file]

        def later(old: bytes | None) -> bytes | None:
            there = old is not None and _Closed.model_validate_json(old).through >= through
            return None if there else _json(_Closed(through=through))

        self._store.folder.update(f"runs/{self.name}/closed.json", later)

    def _read_closed(self) -> datetime:
        try:
            return self._store._read(f"runs/{self.name}/closed.json", _Closed).through
        except FileNotFoundError:
            return datetime.fromtimestamp(0, UTC)


def _file(record: Record) -> str:
    return f"runs/{record.name}/{record.planned:%Y-%m}/{stamp(record.planned)}.json"


def _json(thing: BaseModel) -> bytes:
    return thing.model_dump_json(indent=1).encode()
