"""The registry for people: what the verbs of `md4 models` print."""

import math
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from rich.table import Table
from rich.text import Text

from orchestration.registry import comparison, figures
from orchestration.registry.judgement import Verdict
from orchestration.registry.names import Change, Name
from orchestration.registry.registry import Registry
from orchestration.registry.versions import Version
from orchestration.results import Difference, Result
from pipelines.storage import Folder

if TYPE_CHECKING:
    from orchestration.serving.trial_record import Record

_WHAT = {
    "promote": "signed off",
    "candidate": "tried",
    "confirm": "confirmed",
    "drop": "dropped",
    "rollback": "taken back",
}


def versions(registry: Registry, models: Iterable[str]) -> Table:
    """All versions of some models, with the names that they have now."""
    table = _table("model", "version", "names", "run", "step", "parameters", "MB", "added", "by", "note")
    for model in models:
        names = [registry.name(model, name) for name in registry.names(model)]
        for version in registry.versions(model):
            facts = version.manifest
            _row(
                table,
                model,
                version.number,
                ", ".join(titles(names, version.number)),
                facts.run or "-",
                "-" if facts.step is None else facts.step,
                f"{facts.parameters:,}",
                f"{facts.bytes / 1e6:,.1f}",
                f"{facts.created:%Y-%m-%d %H:%M}",
                facts.by,
                facts.note,
            )
    return table


def tree(registry: Registry, model: str) -> dict[str, Any]:
    """The same of one model, and the history of its names, as JSON values."""
    found = {version.number: version.manifest.model_dump(mode="json") for version in registry.versions(model)}
    names = {name: registry.name(model, name).model_dump(mode="json") for name in registry.names(model)}
    return {"versions": found, "names": names}


def titles(names: Iterable[Name], number: int) -> list[str]:
    """What a version is called: the names that it has, and those that it is tried as."""
    found = []
    for one in names:
        if one.version == number:
            found.append(one.name)
        if one.candidate is not None and one.candidate.version == number:
            found.append(f"{one.name} ({one.candidate.share:.0%} of the traffic)")
    return found


def history(name: Name) -> Table:
    """How a name came to stand for what it does, the newest change first."""
    table = _table("when", "what", "version", "before", "after", "by", "why")
    for change in reversed(name.history):
        _row(
            table,
            f"{change.at:%Y-%m-%d %H:%M}",
            _WHAT[change.action] + ("" if change.share is None else f" with {change.share:.0%}"),
            change.version,
            "-" if change.before is None else change.before,
            "-" if change.after is None else change.after,
            change.by,
            _reason(change),
        )
    return table


def trial(record: "Record") -> Table:
    """What a version that is tried has done so far, beside the present one."""
    total = record.total()
    table = _table("", "answered", "failed", "seconds an answer", "bits within samples")
    for version, one in ((record.present, total.present), (record.candidate, total.candidate)):
        bits = one.mean_entropy()
        _row(
            table,
            f"version {version}",
            one.answered,
            one.errors,
            f"{one.seconds / one.answered:.3f}" if one.answered else "-",
            "-" if bits is None else f"{bits[0]:.3f} ± {math.sqrt(bits[1]):.3f}",
        )
    if (scored := total.quality) is not None:
        told = f"{scored.difference:+.4f} ± {scored.standard_error:.4f} bits per token on {scored.texts} held-out texts"
        table.caption, table.caption_justify = (
            f"version {record.candidate} less version {record.present}: {told}",
            "left",
        )
    return table


def facts(version: Version, called: Sequence[str]) -> Table:
    """What a version says of itself."""
    manifest, lineage = version.manifest, version.lineage
    table = _table("", "")
    rows: list[tuple[str, Any]] = [
        ("version", _joined(version, *called)),
        ("folder", version.folder.url),
        ("added", f"{manifest.created:%Y-%m-%d %H:%M} UTC by {manifest.by}"),
        ("note", manifest.note or "-"),
        ("size", f"{manifest.parameters:,} parameters, {len(manifest.files)} files, {manifest.bytes:,} bytes"),
        ("from", lineage.source),
        ("run", "-" if lineage.run is None else f"{lineage.run}, step {lineage.step}"),
        ("trained", _joined(lineage.trained_at, lineage.code_version and f"code {lineage.code_version}")),
        ("weights", f"sha256 {lineage.weights_sha256[:16]}{', moving average' if lineage.averaged else ''}"),
    ]
    rows += [("data", _joined(one.name, one.fingerprint, one.rows and f"{one.rows:,} rows")) for one in lineage.data]
    if lineage.parent:
        rows.append(("parent", ", ".join(f"{key} {value}" for key, value in lineage.parent.items())))
    reports = figures.reports(version)
    rows += [("report", f"{name} ({kind})") for name, kind in reports.items()]
    for row in rows:
        _row(table, *row)
    table.show_header = False
    return table


def results(found: Sequence[Result]) -> Table:
    """What was measured, the newest first."""
    table = _table("metric", "value", "unit", "samples", "suite", "measured")
    for one in found:
        _row(table, one.metric, value(one), one.unit, one.samples or "-", one.suite, f"{one.created:%Y-%m-%d %H:%M}")
    return table


def differences(first: Version, second: Version) -> Table:
    """The facts in which two versions differ."""
    table = _table("", str(first), str(second))
    for key, one, other in comparison.differences(first, second):
        _row(table, key, *("-" if fact is None else str(fact)[:40] for fact in (one, other)))  # hashes are long
    return table


def compared(lines: Sequence[comparison.Line], first: Version, second: Version) -> Table:
    """Results side by side."""
    table = _table("metric", str(first), str(second), "difference", "")
    for line in lines:
        _row(table, line.metric, value(line.first), value(line.second), difference(line.found), line.verdict)
    return table


def verdict(found: Verdict, version: Version) -> Table:
    """What a rule came to, requirement by requirement."""
    present = "-" if found.against is None else f"version {found.against}"
    table = _table("", "required", "of", f"version {version.number}", present, "difference", "found")
    for one in found.findings:
        _row(
            table,
            "met" if one.met else "NOT MET",
            one.requirement,
            one.metric,
            value(one.new),
            value(one.present),
            difference(one.difference),
            one.why,
        )
    return table


def value(one: Result | None) -> str:
    """A figure with its standard error."""
    if one is None:
        return "-"
    return f"{one.value:.4f}" + ("" if one.standard_error is None else f" ± {one.standard_error:.4f}")


def difference(found: Difference | str | None) -> str:
    """A difference with its standard error, and how that came."""
    if not isinstance(found, Difference):
        return "-"
    return f"{found.value:+.4f} ± {found.standard_error:.4f}" + (" (paired)" if found.paired else "")


def of_version(version: Version, called: Sequence[str], table: Folder) -> list[Table]:
    """Everything that is to be said of a version."""
    found = figures.of(version, table)
    return [facts(version, called), *([results(found)] if found else [])]


def _reason(change: Change) -> str:
    if change.forced:
        return f"{change.why} (forced)"
    if change.why:
        return change.why
    rules = (change.figures or {}).get("rules")
    return f"{sum(len(rule['findings']) for rule in rules)} requirements met" if rules else ""


def _joined(*parts: object) -> str:
    return ", ".join(str(part) for part in parts if part) or "-"


def _table(*columns: str) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, header_style="dim")
    for number, column in enumerate(columns):
        table.add_column(column, no_wrap=number < len(columns) - 1, overflow="fold")
    return table


def _row(table: Table, *cells: object) -> None:
    table.add_row(*(Text(str(cell)) for cell in cells))
