"""The registry: versions added and found, names moved. Every change is one compare-and-swap of one small file."""

import getpass
import os
import re
import uuid
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

from md4.errors import UserError
from orchestration.registry import adding, documents, names
from orchestration.registry.listing import Entry, Listing
from orchestration.registry.names import Name, Signature
from orchestration.registry.versions import Version
from orchestration.registry.words import LATEST, check_model, check_name, is_name, number_of, split
from pipelines.storage import Folder, Place

DEFAULT = "registry"


class Registry:
    """The models below a folder, which may be in S3 and need not exist yet."""

    def __init__(self, place: Place | None = None, *, now: Callable[[], datetime] = lambda: datetime.now(UTC)):
        """place: None = MD4_REGISTRY, or else `registry/`. now: the clock, in UTC."""
        self.folder = Folder(place or os.environ.get("MD4_REGISTRY") or DEFAULT)
        self.now = now

    def __str__(self) -> str:
        return f"the registry in {self.folder}"

    # -- versions --------------------------------------------------------------------------------------------------

    def models(self) -> list[str]:
        """Names of the models that have versions."""
        found = (re.fullmatch(rf"([^/]+)/{re.escape(adding.LISTING)}", path) for path in self.folder.list())
        return [match[1] for match in found if match and self.versions(match[1])]

    def versions(self, model: str) -> list[Version]:
        """Its versions, oldest first; none of a model that is not there."""
        listing = documents.read(Listing, self._model(model), adding.LISTING)
        return [self._version(model, entry) for entry in (listing.there if listing else ())]

    def version(self, model: str, ref: str | int = LATEST) -> Version:
        """A version by its number, a name such as production, or `latest`; UserError if there is none."""
        there = {version.number: version for version in self.versions(model)}
        if not there:
            known = ", ".join(self.models()) or "none"
            raise UserError(f"{self} has no model {model!r}; models there: {known}")
        number = number_of(str(ref))
        if ref == LATEST:
            number = max(there)
        elif number is None:
            number = self.name(model, str(ref)).version
            if number is None:
                known = ", ".join(self.names(model)) or "none"
                raise UserError(f"{model}: nothing is signed off as {ref}; names there: {known}")
        if number not in there:
            raise UserError(f"{model} has no version {number}; versions there: {', '.join(map(str, there))}")
        return there[number]

    def find(self, text: str) -> Version:
        """The version that `MODEL[@REF]` means, see `version`."""
        return self.version(*split(text))

    def add(
        self,
        model: str,
        source: Place,
        *,
        note: str = "",
        by: str | None = None,
        ema: bool = True,
        parent: dict[str, Any] | None = None,
        results: Place | None = None,
        say: Callable[[str], None] = print,
    ) -> Version:
        """Make a run's newest sound checkpoint, or an exported folder, the next version; see `adding.add`.

        results: the table of results, of which the version keeps what is known of its weights.
        """
        folder = self._model(model)
        number = adding.add(
            folder,
            model,
            source,
            by=signer(by),
            now=self.now(),
            note=note,
            ema=ema,
            parent=parent,
            results=results,
            say=say,
        )
        return self.version(model, number)

    # -- names -----------------------------------------------------------------------------------------------------

    def names(self, model: str) -> list[str]:
        """Names that were ever given."""
        files = (path.rpartition("/")[2] for path in self._model(model).list("names"))
        return [file.removesuffix(".json") for file in files if is_name(file.removesuffix(".json"))]

    def name(self, model: str, name: str) -> Name:
        """What a name stands for; one that was never given stands for nothing. One small read: fit to be polled."""
        found = documents.read(Name, self._model(model), _file(name))
        return found or Name(model=model, name=name)

    def promote(
        self,
        model: str,
        version: int,
        name: str,
        *,
        share: float | None = None,
        why: str = "",
        by: str | None = None,
        forced: bool = False,
        figures: dict[str, Any] | None = None,
        seen: Name | None = None,
    ) -> Name:
        """Give a name to a version, or try it with a share of the traffic. No rules are asked here: see `promotion`.

        seen: what the decision was made on; `Moved` if the name stands for something else by now.
        Raises UserError for a version that is not there, or while another one is being tried.
        """
        self.version(model, version)
        signed = self._signed(by, why, forced, figures)
        return self._change(model, name, signed, lambda found: names.promote(found, version, share, signed), seen)

    def confirm(
        self,
        model: str,
        name: str,
        version: int,
        *,
        why: str = "",
        by: str | None = None,
        figures: dict[str, Any] | None = None,
        seen: Name | None = None,
    ) -> Name:
        """Sign the candidate off; nothing happens if it is already. UserError if this version is not being tried.

        Its files are not looked at: who serves it has verified them, `promotion.confirm` does.
        seen: what the decision was made on, as of `promote`.
        """
        signed = self._signed(by, why, False, figures)
        return self._change(model, name, signed, lambda found: names.confirm(found, version, signed), seen)

    def rollback(
        self,
        model: str,
        name: str,
        why: str,
        *,
        version: int | None = None,
        by: str | None = None,
        figures: dict[str, Any] | None = None,
        seen: Name | None = None,
    ) -> Name:
        """Drop the candidate or, if there is none, go back to the version before.

        version: the one that is to lose the name or its share: if it has neither any more, nothing happens, so that
        it may be called twice. None: whichever. seen: what the decision was made on, as of `promote`.
        Whether the version before is sound is not looked at: see `promotion.rollback`.
        Raises UserError if there is nothing to go back to.
        """
        signed = self._signed(by, why, False, figures)
        return self._change(model, name, signed, lambda found: names.rollback(found, version, signed), seen)

    def _change(
        self, model: str, name: str, signed: Signature, change: Callable[[Name], Name], seen: Name | None = None
    ) -> Name:
        check_name(name)

        def replace(found: Name | None) -> Name | None:
            before = found or Name(model=model, name=name)
            if before.holds(signed.id):
                return None  # our own change, whose answer was lost
            if seen is not None and before != seen:
                raise Moved(before)
            after = change(before)
            return None if after is before else after

        return documents.update(Name, self._model(model), _file(name), replace) or Name(model=model, name=name)

    def _signed(self, by: str | None, why: str, forced: bool, figures: dict[str, Any] | None) -> Signature:
        return Signature(id=uuid.uuid4().hex, by=signer(by), at=self.now(), why=why, forced=forced, figures=figures)

    def _model(self, model: str) -> Folder:
        return self.folder / check_model(model)

    def _version(self, model: str, entry: Entry) -> Version:
        assert entry.manifest_sha256 is not None
        return Version(model, entry.number, self._model(model) / f"versions/{entry.number:05d}", entry.manifest_sha256)


class Moved(Exception):
    """A name was changed between the decision and its signature."""

    def __init__(self, now: Name):
        super().__init__(f"{now.model}: {now.name} was changed meanwhile")
        self.now = now


def signer(by: str | None = None) -> str:
    """Who signs: as given, or else the user's name on this machine; UserError if there is none."""
    if by is not None and by.strip():
        return by.strip()
    try:
        return os.environ.get("USER") or getpass.getuser()
    except (OSError, KeyError):
        raise UserError("who signs this? Set USER, or say --by NAME") from None


def _file(name: str) -> str:
    return f"names/{check_name(name)}.json"
