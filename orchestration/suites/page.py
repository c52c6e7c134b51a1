"""The trend page of a model: each figure over its versions, steps or days, and what became worse, in one HTML file."""

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from md4.errors import UserError
from orchestration.results import Difference, Result
from orchestration.suites.pictures import Axis, draw
from orchestration.suites.reports import value
from orchestration.trends import Evaluation, Verdict, newest
from pipelines.storage import Folder

WORDS = {
    "worse": "worse",
    "better": "better",
    "changed": "changed",
    "same": "no change seen",
    "first": "first",
    "unjudged": "no error known",
    "older": "not in the newest",
}
_FILLINGS = 12


@dataclass(frozen=True)
class Card:
    """One metric."""

    metric: str
    unit: str
    value: str
    kind: str  # of its verdict; "older" for a figure that the newest evaluation doesn't have
    word: str
    against: str  # the difference, in words
    picture: Markup
    anchor: str


@dataclass(frozen=True)
class Section:
    """One suite; of its versions alone, or of its steps, where there are both."""

    name: str
    newest: Evaluation
    cards: list[Card]
    evaluations: list[Evaluation]  # the last in their order first
    metrics: list[str]
    fillings: list[dict[str, Any]]

    def row(self, evaluation: Evaluation) -> list[Verdict | None]:
        """Its figures in the order of the columns."""
        found = {one.result.metric: one for one in evaluation.verdicts}
        return [found.get(metric) for metric in self.metrics]


def render(model: str, judged: Mapping[str, Sequence[Evaluation]], table: str, alpha: float) -> str:
    """The page, complete in itself: no scripts, nothing that is fetched."""
    files = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    files.filters |= {"figure": value, "against": against, "breakable": _breakable}
    sections = [_section(name, list(evaluations)) for name, evaluations in judged.items()]
    worse = [(section, card) for section in sections for card in section.cards if card.kind == "worse"]
    return files.get_template("page.html").render(
        model=model,
        sections=sections,
        worse=worse,
        figures=sum(len(section.newest.verdicts) for section in sections),
        table=table,
        alpha=f"{100 * alpha:g} %",
        now=datetime.now(UTC),
        words=WORDS,
    )


def against(one: Verdict) -> str:
    """How far the figure is from the one that it was compared with, in words."""
    if one.reference is None:
        return "nothing to compare with yet"
    other = _place(one.reference)
    if one.difference is None:
        return f"{_minus(f'{one.result.value - one.reference.value:+.4g}')} against {other}"
    rows = ", row by row" if one.difference.paired else ""
    return f"{_signed(one.difference)} against {other}{rows}"


def _place(one: Result) -> str:
    return Evaluation((Verdict(one, "first"),)).place


def _signed(found: Difference) -> str:
    error = found.standard_error
    if not error:
        return _minus(f"{found.value:+.4g}")
    digits = max(0, min(8, 1 - math.floor(math.log10(error))))
    z = f"z {found.z:+.1f}" if math.isfinite(found.z) else "z beyond measure"
    return _minus(f"{found.value:+.{digits}f} ± {error:.{digits}f} ({z})")


def _breakable(metric: str) -> Markup:
    """A name that may be broken behind its slashes."""
    return Markup("/<wbr>").join(metric.split("/"))


def _minus(text: str) -> str:
    """With the sign, which is as wide as a plus."""
    return text.replace("-", "\N{MINUS SIGN}")


def _section(name: str, evaluations: list[Evaluation]) -> Section:
    last = newest(evaluations)
    series: dict[str, list[Verdict]] = {}
    for evaluation in (last, *reversed(evaluations)):  # the order of the newest, then what only others have
        for one in evaluation.verdicts:
            series.setdefault(one.result.metric, [])
    for evaluation in evaluations:
        for one in evaluation.verdicts:
            series[one.result.metric].append(one)
    cards = [_card(name, verdicts, last) for verdicts in series.values()]
    return Section(name, last, cards, list(reversed(evaluations)), list(series), _fillings(last))


def _card(section: str, verdicts: list[Verdict], last: Evaluation) -> Card:
    """The figure of the newest evaluation; if that has none, the one that was measured last, marked as such."""
    shown = max(reversed(verdicts), key=lambda one: one.result.created)
    metric, text, kind = shown.result.metric, against(shown), shown.kind
    if shown not in last.verdicts:
        text, kind = f"last measured at {_place(shown.result)}: {text}", "older"
    return Card(
        metric=metric,
        unit=shown.result.unit,
        value=value(shown.result),
        kind=kind,
        word=WORDS[kind],
        against=text,
        picture=Markup(draw(verdicts, Axis.of(verdicts), shown)),
        anchor=re.sub(r"[^\w.-]+", "-", f"{section}-{metric}"),
    )


def _fillings(evaluation: Evaluation) -> list[dict[str, Any]]:
    """What the model wrote into fixed texts last, if its report is at hand."""
    for one in evaluation.verdicts:
        if one.result.metric.startswith("prompts/") and one.result.report:
            place, _, name = one.result.report.rpartition("/")
            try:
                found = json.loads(Folder(place or ".").read(name))
            except (OSError, ValueError, UserError):
                return []
            fillings = found.get("fillings", [])
            texts = list(dict.fromkeys(filling["prompt"] for filling in fillings))
            share = max(1, _FILLINGS // max(1, len(texts)))
            shown = [[filling for filling in fillings if filling["prompt"] == text][:share] for text in texts]
            return [{"prompt": text, "fillings": found} for text, found in zip(texts, shown, strict=True)]
    return []
