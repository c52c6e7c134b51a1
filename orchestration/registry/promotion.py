"""`promote`: a name for a version, if the rules allow it. `confirm` and `rollback`: what is done by hand afterwards.

The judgement is made on what the name stands for at that moment, and signed only if it still does: of two promoters at
once one goes first, and the other is judged again against its version. A promotion that was killed is made again by the
same command; it changes nothing if the first one came through.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from md4.errors import UserError
from orchestration.registry import figures, rules
from orchestration.registry.judgement import Finding, Verdict, judge
from orchestration.registry.names import Name, Signature
from orchestration.registry.names import promote as promoted
from orchestration.registry.names import rollback as rolled_back
from orchestration.registry.registry import Moved, Registry
from orchestration.registry.versions import Version
from pipelines.storage import Folder


@dataclass(frozen=True)
class Wanted:
    """What is to be promoted, and how."""

    version: Version
    name: str
    share: float | None = None
    rules: Path | None = None
    why: str = ""
    by: str | None = None
    force: bool = False  # whatever the rules say; the reason is required


@dataclass(frozen=True)
class Decision:
    """What the rules came to, and what became of the name."""

    seen: Name  # what it was judged on
    verdicts: tuple[Verdict, ...]
    allowed: bool
    now: Name  # the same, if it was not allowed, or is so already
    already: bool = False

    @property
    def unmet(self) -> list[Finding]:
        return [finding for verdict in self.verdicts for finding in verdict.findings if not finding.met]

    @property
    def changed(self) -> bool:
        return self.now != self.seen


def promote(
    registry: Registry,
    wanted: Wanted,
    table: Folder,
    *,
    dry_run: bool = False,
    say: Callable[[str], None] = print,
) -> Decision:
    """Judge a version by the rules that apply to the name and, if they are met or it is forced, give it the name.

    dry_run: judge only. Raises UserError for what can't be promoted whatever the rules say: a damaged version, one
    while another is being tried, one that was taken back from the name unless it is forced; and for `force` without a
    reason.
    """
    if wanted.force and not wanted.why.strip():
        raise UserError("--force leaves the rules aside: say --why, it is kept in the name's history")
    _check(wanted.version)
    while True:
        decision = _decide(registry, wanted, table)
        if dry_run or decision.already or not decision.allowed:
            return decision
        try:
            after = registry.promote(
                wanted.version.model,
                wanted.version.number,
                wanted.name,
                share=wanted.share,
                why=wanted.why,
                by=wanted.by,
                forced=wanted.force,
                figures={"rules": [verdict.facts() for verdict in decision.verdicts]} if decision.verdicts else None,
                seen=decision.seen,
            )
        except Moved as moved:
            say(f"{moved}: judged again")
            continue
        return Decision(decision.seen, decision.verdicts, True, after)


def confirm(registry: Registry, model: str, name: str, *, why: str = "", by: str | None = None) -> Name:
    """Sign the candidate off, whatever its figures are; UserError if there is none, or it is damaged."""
    trial = registry.name(model, name).candidate
    if trial is None:
        raise UserError(
            f"{model}: nothing is being tried as {name}; md4 models promote {model} VERSION {name} --share 0.1"
        )
    _check(registry.version(model, trial.version))
    return registry.confirm(model, name, trial.version, why=why, by=by)


def rollback(
    registry: Registry,
    model: str,
    name: str,
    why: str,
    *,
    version: int | None = None,
    by: str | None = None,
    say: Callable[[str], None] = print,
) -> tuple[Name, Name]:
    """Drop the candidate or, if there is none, go back to the version before; the name as it was, and as it is.

    version: the one that is to lose the name or its share; nothing happens if it has neither any more.
    Raises UserError for a version that is not there, if there is nothing to go back to, and if that is damaged.
    """
    if version is not None:
        registry.version(model, version)
    while True:
        seen = registry.name(model, name)
        target = rolled_back(seen, version, Signature(id="", by="", at=registry.now())).version
        if target is not None and target != seen.version:
            for problem in registry.version(model, target).damage():
                raise UserError(
                    f"{name} would go back to a damaged version: {problem}; instead of it promote a sound one: "
                    f"md4 models promote {model} VERSION {name}"
                )
        try:
            return seen, registry.rollback(model, name, why, version=version, by=by, seen=seen)
        except Moved as moved:
            say(f"{moved}: looked at again")


def _check(version: Version) -> None:
    for problem in version.damage():
        raise UserError(f"a damaged version is not signed off: {problem}")


def _decide(registry: Registry, wanted: Wanted, table: Folder) -> Decision:
    version = wanted.version
    seen = registry.name(version.model, wanted.name)
    # Refuses what can't be, before anything is measured against anything.
    tried = promoted(seen, version.number, wanted.share, Signature(id="", by="", at=registry.now()))
    if tried is seen:
        return Decision(seen, (), True, seen, already=True)
    if not wanted.force and (before := seen.rejected(version.number)) is not None:
        how = "taken back" if before.action == "rollback" else "dropped as a candidate"
        raise UserError(
            f"{version} was {how} from {wanted.name} on {before.at:%Y-%m-%d} by {before.by}"
            f"{f' ({before.why})' if before.why else ''}: promoting it again needs --force and --why"
        )
    apply = rules.applying(registry.folder, version.model, wanted.name, wanted.rules)
    new = figures.of(version, table) if apply else []
    present = []
    if apply and seen.version is not None:
        present = figures.of(registry.version(version.model, seen.version), table)
    verdicts = tuple(
        judge(
            origin,
            rule,
            version.number,
            new,
            present,
            target=seen,
            before=None if rule.after is None else registry.name(version.model, rule.after),
            table=table,
            now=registry.now(),
        )
        for origin, rule in apply
    )
    return Decision(seen, verdicts, wanted.force or all(verdict.met for verdict in verdicts), seen)
