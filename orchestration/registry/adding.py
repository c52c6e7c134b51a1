"""`add`: a run or an exported folder becomes the next version of a model."""

import hashlib
import json
import tempfile
import uuid
from collections.abc import Callable
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from typing import Any

from md4 import weights
from md4.errors import UserError
from md4.weights import Card
from orchestration.registry import documents, figures, lineage
from orchestration.registry.listing import Listing
from orchestration.registry.versions import EVALUATION, LINEAGE, MANIFEST, RESULTS, Manifest, describe
from pipelines.storage import Folder, Place

LISTING = "versions.json"
_ASIDE = ("code_version", "source")  # of a card: they say where the model comes from, not what it is


def add(
    models: Folder,
    model: str,
    source: Place,
    *,
    by: str,
    now: datetime,
    note: str = "",
    ema: bool = True,
    parent: dict[str, Any] | None = None,
    results: Place | None = None,
    say: Callable[[str], None] = print,
) -> int:
    """Make the newest sound checkpoint of a run, or an exported folder, a version; returns its number.

    models: the model's folder in the registry. results: the table of results, of which the version keeps those of its
    weights. The same content twice is one version: its number is returned, and that is said.

    Raises UserError for what is no sound run or export. Nothing can be seen of an addition that fails or is killed.
    """
    with tempfile.TemporaryDirectory(prefix="md4-version-") as place:
        aside = Path(place) / "export"
        if exported := Folder(source).exists(weights.CONFIG):
            _copy(Folder(source), aside)
        else:
            from orchestration.runs import export

            export(str(source), aside, ema=ema, report=say)
        found = weights.load(aside)  # a version is what can be loaded
        facts = _origin(source, found.card) if exported else lineage.of_run(str(source), found.card)
        facts = facts.model_copy(update={"parent": parent or facts.parent})
        content, attempt = _content(found.card), uuid.uuid4().hex
        begun = _begin(models, content, attempt, now)
        if (same := begun.same(content)) is not None:
            say(f"{model}: these weights and this configuration are version {same.number} already; nothing was added")
            return same.number
        entry = begun.of(attempt)
        assert entry is not None
        folder = models / f"versions/{entry.number:05d}"
        try:
            hashes = tuple(dict.fromkeys(h for h in (found.card.sha256[:16], facts.weights_hash) if h))
            kept = None if results is None else figures.keep(figures.known(Folder(results), hashes))
            _describe(aside, facts, _reports(Folder(source), hashes), kept)
            _write_card(aside, f"{model} version {entry.number}", None if exported else source, ema, facts)
            manifest = Manifest(
                model=model,
                number=entry.number,
                content=content,
                created=now,
                by=by,
                note=note,
                run=facts.run,
                step=facts.step,
                parameters=sum(parameter.numel() for parameter in found.model.parameters()),
                weights=hashes,
                files={name: describe(aside / name) for name in Folder(aside).list()},
            )
            number = _write(aside, folder, manifest, lambda sha256: _commit(models, content, attempt, sha256))
        except BaseException:
            with suppress(UserError, OSError):  # else it is taken for dead after a day
                _withdraw(models, attempt, folder)
            raise
        if number != entry.number:
            folder.remove_all()
            say(f"{model}: somebody else was just adding the same: it is version {number}")
        return number


def _copy(source: Folder, aside: Path) -> None:
    """The files of an exported folder, in a new folder on this machine."""
    for name in source.list():
        if name in (weights.CONFIG, weights.WEIGHTS, weights.TOKENIZER) or name.startswith(f"{weights.GRIDS}/"):
            file = aside / name
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(source.read(name))


def _origin(source: Place, card: Card) -> lineage.Lineage:
    """What an exported folder says of its origin; one that is a version, perhaps of another registry, says it all."""
    before = documents.read(lineage.Lineage, Folder(source), LINEAGE)
    if before is None or before.weights_sha256 != card.sha256:
        return lineage.of_export(str(source), card)
    return before.model_copy(update={"source": str(source)})


def _content(card: Card) -> str:
    """What makes two versions the same: weights, configuration, vocabulary and saved settings, whose hashes it has."""
    tree = card.model_dump(mode="json", exclude=set(_ASIDE))
    return hashlib.sha256(json.dumps(tree, sort_keys=True).encode()).hexdigest()


def _reports(source: Folder, hashes: tuple[str, ...]) -> dict[str, bytes]:
    """The reports of these weights that lie with a run, an export or a version."""
    return lineage.reports(source, EVALUATION, hashes) | lineage.reports(source, "reports", hashes)


def _describe(aside: Path, facts: lineage.Lineage, reports: dict[str, bytes], results: bytes | None) -> None:
    """Write what the version says of itself beside its weights."""
    (aside / LINEAGE).write_bytes(documents.dump(facts))
    evaluation = reports if results is None else {**reports, RESULTS: results}
    if evaluation:
        (aside / EVALUATION).mkdir()
    for name, data in evaluation.items():
        (aside / EVALUATION / name).write_bytes(data)


def _write_card(aside: Path, title: str, run: Place | None, ema: bool, known: lineage.Lineage) -> None:
    """The model card, from what the run holds, if it is one and on this machine, else from what the version says."""
    from orchestration import cards

    found = None
    if run is not None and not Folder(run).remote:
        found = cards.of_run(Path(str(run)), ema=ema)
    if found is None or found.lineage.get("weights hash") != known.weights_hash:  # the run has newer ones by now
        found = cards.of_folder(aside)
    cards.write(aside, found.model_copy(update={"name": title}))


def _write(aside: Path, folder: Folder, manifest: Manifest, commit: Callable[[str], int]) -> int:
    """Write a version's files, its manifest last, and then commit; returns the number that the content has now."""
    for name in manifest.files:
        folder.write(name, (aside / name).read_bytes())
    data = documents.dump(manifest)
    folder.create(MANIFEST, data)
    return commit(hashlib.sha256(data).hexdigest())


def _begin(models: Folder, content: str, attempt: str, now: datetime) -> Listing:
    """Take a number, unless the content is there; and remove what dead attempts left."""
    dead = []

    def begin(found: Listing | None) -> Listing | None:
        nonlocal dead
        before = found or Listing()
        after = before.begun(content, attempt, now)
        if after is before:
            return None
        dead = before.dead(now)
        return after

    listing = documents.update(Listing, models, LISTING, begin)
    assert listing is not None
    for entry in dead:
        (models / f"versions/{entry.number:05d}").remove_all()
    return listing


def _commit(models: Folder, content: str, attempt: str, manifest_sha256: str) -> int:
    """List the version; returns the number that the content has now, another's if that came first."""

    def commit(found: Listing | None) -> Listing | None:
        before = found or Listing()
        after = before.committed(attempt, manifest_sha256)
        return None if after is before else after

    listing = documents.update(Listing, models, LISTING, commit)
    same = listing and listing.same(content)
    if not same:
        raise UserError(f"{models.path(LISTING)} lost this addition: add it again")
    return same.number


def _withdraw(models: Folder, attempt: str, folder: Folder) -> None:
    """Leave nothing behind of an addition that did not succeed."""

    def withdraw(found: Listing | None) -> Listing | None:
        return None if found is None or found.of(attempt) is None else found.withdrawn(attempt)

    listing = documents.update(Listing, models, LISTING, withdraw)
    entry = listing and listing.of(attempt)
    if not entry:
        folder.remove_all()
