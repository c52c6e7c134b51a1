"""Two versions side by side: what differs in configuration, size and origin, and what was measured of both."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from md4 import weights
from orchestration.registry import documents, figures
from orchestration.registry.versions import Version
from orchestration.results import Difference, Result
from pipelines.storage import Folder

_OF_A_RUN = ("model", "sampling")  # of its configuration: the exported one says it


@dataclass(frozen=True)
class Line:
    """A metric: what was measured of each, and how much the second lies above the first, or why that can't be said."""

    metric: str
    first: Result | None
    second: Result | None
    found: Difference | str

    @property
    def verdict(self) -> str:
        """In words, with the difference in standard errors."""
        if isinstance(self.found, str) or self.second is None:
            return str(self.found)
        z = self.found.z
        if z == 0:
            return "the same"
        direction = {"lower": "better" if z < 0 else "worse", "higher": "better" if z > 0 else "worse"}
        return f"{direction.get(self.second.better, 'lower' if z < 0 else 'higher')}, z = {z:+.1f}"


def facts(version: Version) -> dict[str, Any]:
    """Everything but its results that one would compare of a version, by dotted key."""
    card = documents.parse(weights.Card, version.read(weights.CONFIG), version.folder.path(weights.CONFIG))
    manifest, lineage = version.manifest, version.lineage
    size = {
        "parameters": manifest.parameters,
        "bytes": manifest.bytes,
        "weights": manifest.files[weights.WEIGHTS].bytes,
        "files": len(manifest.files),
    }
    origin = lineage.model_dump(mode="json", exclude={"config", "source"})
    run = {key: value for key, value in (lineage.config or {}).items() if key not in _OF_A_RUN}
    own = card.model_dump(mode="json", include={"model", "sampling", "vocabulary"})
    return dict(_leaves({"config": {**own, **run}, "size": size, "lineage": origin}))


def differences(first: Version, second: Version) -> list[tuple[str, Any, Any]]:
    """The facts that differ: key, and the value of each (None where one has none)."""
    one, other = facts(first), facts(second)
    keys = dict.fromkeys([*one, *other])
    return [(key, one.get(key), other.get(key)) for key in keys if one.get(key) != other.get(key)]


def results(first: Version, second: Version, table: Folder) -> list[Line]:
    """Each metric that was measured of one of them. Only what was measured alike is compared."""
    mine, others = figures.of(first, table), figures.of(second, table)
    return [
        _line(
            metric,
            [one for one in mine if one.metric == metric],
            [one for one in others if one.metric == metric],
            str(first),
            str(second),
            table,
        )
        for metric in sorted({one.metric for one in (*mine, *others)})
    ]


def _line(
    metric: str, mine: Sequence[Result], others: Sequence[Result], first: str, second: str, table: Folder
) -> Line:
    if not mine or not others:
        missing = f"{second if mine else first} has no result of it"
        return Line(metric, mine[0] if mine else None, others[0] if others else None, missing)
    new, present, found = figures.pair(others, mine, table)
    return Line(metric, present, new, found)


def _leaves(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, list | tuple) and any(isinstance(item, Mapping) for item in value):
            value = {str(number): item for number, item in enumerate(value)}
        if isinstance(value, Mapping):
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
