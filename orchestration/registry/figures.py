"""What was measured of a version: the results that it was added with, and those that came into the table since."""

import json
from collections.abc import Sequence

from pydantic import BaseModel, ConfigDict

from md4.errors import UserError
from orchestration import results
from orchestration.registry import documents
from orchestration.registry.versions import EVALUATION, RESULTS, Version
from orchestration.results import Difference, Result
from pipelines.storage import Folder


class Kept(BaseModel):
    """What `evaluation/results.json` of a version says."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    results: tuple[Result, ...]


def known(table: Folder, hashes: Sequence[str]) -> list[Result]:
    """The results of weights with one of these hashes, the newest first."""
    return [one for one in reversed(results.read(table)) if one.weights_hash in hashes]


def keep(found: Sequence[Result]) -> bytes | None:
    """The file that a version keeps of them, if there are any."""
    return documents.dump(Kept(results=tuple(found))) if found else None


def of(version: Version, table: Folder) -> list[Result]:
    """All results of a version, the newest first, each evaluation once."""
    manifest, found = version.manifest, known(table, version.manifest.weights)
    file = f"{EVALUATION}/{RESULTS}"
    if file in manifest.files:
        there = {(one.attempt, one.metric) for one in found}
        kept = documents.parse(Kept, version.read(file), version.folder.path(file)).results
        found += [one for one in kept if (one.attempt, one.metric) not in there]
    return sorted(found, key=lambda one: (one.created, one.attempt), reverse=True)


def reports(version: Version) -> dict[str, str]:
    """The reports that it was added with: what each found, by file name."""
    found = {}
    for file in version.manifest.files:
        folder, _, name = file.partition("/")
        if folder == EVALUATION and name != RESULTS:
            found[name] = str(json.loads(version.read(file)).get("kind", "report"))
    return found


def pair(mine: Sequence[Result], others: Sequence[Result], table: Folder) -> tuple[Result, Result, Difference | str]:
    """Of two versions' results of one metric, both the newest first: the newest of `mine` that was measured like one
    of the others, that one, and how much it lies above; why that can't be said if none was."""
    for one in mine:
        for other in others:
            if one.series == other.series:
                try:
                    return one, other, results.compare(one, other, table)
                except UserError as error:
                    return one, other, str(error)
    one, other = mine[0], others[0]
    names = ("metric", "unit", "settings", "data")
    unlike = [
        f"{name} {a or 'unknown'} and {b or 'unknown'}"
        for name, a, b in zip(names, one.series, other.series, strict=True)
        if a != b
    ]
    return one, other, f"not measured alike: {', '.join(unlike)}"
