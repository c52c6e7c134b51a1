"""`promote`: a name for a version, if the rules allow it.

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
    for problem in wanted.version.damage():
        raise UserError(f"a damaged version is not signed off: {problem}")
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
