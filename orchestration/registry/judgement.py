"""Rules applied to what was measured: requirement by requirement, with the numbers.

What is decided where the numbers leave it open:

- *Missing*: a metric without a result of the new version is not met, nor is a pattern that matches none. A pattern
  means every metric that either version has a result of, so that leaving a bad one out does not help. Results older
  than max_age_days count as missing; those of the present version may be old, its weights are the same.
- *Not comparable*: results measured with other settings, data or units are never compared: not met. Of several results
  of a metric the newest of the new version counts that was measured like one of the present version.
- *No present version* (the first promotion to a name): what compares with it is met if there is a result; ranges in
  numbers are asked as ever.
- *No standard error*: what is asked in standard errors is not met; `within` compares the values alone.
- *No direction* (neither lower nor higher is better): better_by and not_worse_by are not met; `within` is what fits.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from fnmatch import fnmatchcase
from typing import Any

from orchestration.registry import figures
from orchestration.registry.names import Name
from orchestration.registry.rules import Requirement, Rule
from orchestration.results import Difference, Result
from pipelines.storage import Folder


@dataclass(frozen=True)
class Finding:
    """What became of one requirement, for one metric."""

    requirement: str
    metric: str
    met: bool
    why: str
    new: Result | None = None
    present: Result | None = None
    difference: Difference | None = None

    def facts(self) -> dict[str, Any]:
        """For the history of the name."""
        tree: dict[str, Any] = {"requirement": self.requirement, "metric": self.metric, "met": self.met}
        for what, one in (("new", self.new), ("present", self.present)):
            if one is not None:
                tree[what] = {"value": one.value, "standard_error": one.standard_error, "attempt": one.attempt}
        if self.difference is not None:
            found = self.difference
            tree["difference"] = {
                "value": found.value,
                "standard_error": found.standard_error,
                "paired": found.paired,
            }
        return {**tree, "why": self.why}


@dataclass(frozen=True)
class Verdict:
    """What a rule came to."""

    origin: str
    rule: Rule
    against: int | None
    findings: tuple[Finding, ...]

    @property
    def met(self) -> bool:
        return all(finding.met for finding in self.findings)

    def facts(self) -> dict[str, Any]:
        """For the history of the name: the rule, and the figures that allowed the promotion or spoke against it."""
        found = [finding.facts() for finding in self.findings]
        return {"rule": self.rule.facts(), "stands_in": self.origin, "against": self.against, "findings": found}


def judge(
    origin: str,
    rule: Rule,
    version: int,
    new: Sequence[Result],
    present: Sequence[Result],
    *,
    target: Name,
    before: Name | None,
    table: Folder,
    now: datetime,
) -> Verdict:
    """Apply a rule.

    new, present: the results of the version that is to be promoted, and of the one that has the name, newest first.
    target: the name that is promoted to. before: the one that `from` asks for.
    """
    found: list[Finding] = []
    if before is not None:
        found.append(_came_from(version, before))
    oldest = None if rule.max_age_days is None else now - timedelta(days=rule.max_age_days)
    for requirement in rule.require:
        wanted = requirement.metric
        metrics = sorted({one.metric for one in (*new, *present) if fnmatchcase(one.metric, wanted)})
        for metric in metrics or [wanted]:
            mine = [one for one in new if one.metric == metric]
            fresh = [one for one in mine if oldest is None or one.created >= oldest]
            if fresh:
                others = [one for one in present if one.metric == metric]
                found.append(_judge_one(requirement, metric, fresh, others, target, table))
                continue
            why = f"version {version} has no result of it"
            if mine:
                age = (now - mine[0].created) / timedelta(days=1)
                why = f"its newest result is {age:.0f} days old, at most {rule.max_age_days:g} are allowed"
            found.append(Finding(str(requirement), metric, False, why, mine[0] if mine else None))
    return Verdict(origin, rule, target.version, tuple(found))


def _came_from(version: int, before: Name) -> Finding:
    wanted = f"signed off as {before.name} before"
    taken_back = before.rejected(version)
    if taken_back is not None:
        return Finding(
            wanted, "", False, f"taken back there {taken_back.at:%Y-%m-%d}: {taken_back.why or 'no reason given'}"
        )
    held = any(change.after == version for change in before.history)
    return Finding(wanted, "", held, "it was" if held else f"version {version} was never {before.name}")


def _judge_one(
    requirement: Requirement, metric: str, mine: Sequence[Result], others: Sequence[Result], target: Name, table: Folder
) -> Finding:
    def finding(met: bool, why: str, *facts: Any) -> Finding:
        return Finding(str(requirement), metric, met, why, *facts)

    within = requirement.within
    if within is not None and within.percent is None:
        outside = within.outside(mine[0].value)
        return finding(outside is None, outside or "inside", mine[0])
    if target.version is None:
        return finding(True, f"nothing to compare with: it is the first {target.name}", mine[0])
    if not others:
        return finding(False, f"version {target.version}, the present {target.name}, has no result of it", mine[0])
    new, present, found = figures.pair(mine, others, table)
    if within is not None:
        if new.series != present.series:
            return finding(False, str(found), new, present)
        outside = within.outside(new.value, present.value)
        return finding(outside is None, outside or "inside", new, present, None if isinstance(found, str) else found)
    if isinstance(found, str):
        return finding(False, found, new, present)
    if new.better == "neither":
        return finding(False, "neither lower nor higher is better: ask for within", new, present, found)
    gain = found.z if new.better == "higher" else -found.z
    least = requirement.better_by if requirement.better_by is not None else -(requirement.not_worse_by or 0)
    said = f"{abs(gain):.1f} s.e. {'better' if gain > 0 else 'worse'}" if gain else "no difference"
    return finding(gain >= least, said, new, present, found)
