"""The report of a suite: all its figures, and the texts that came out."""

from datetime import datetime
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from orchestration.results import Result
from orchestration.suites.prompts import Filling
from pipelines.reports import Provenance

_SHOWN = 24  # fillings in the form for people


class SuiteReport(BaseModel):
    """What a suite found, for programs as JSON, for people as Markdown."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    kind: Literal["suite"] = "suite"
    created: datetime
    suite: str
    model: Provenance
    version: int | None = Field(None, description="in the registry")
    attempt: str = Field(description="id of the evaluation in the table of results")
    seconds: float
    asked: dict[str, Any] = Field(description="the suite, as far as it decides the figures")
    results: list[Result]
    fillings: list[Filling] = []

    @property
    def name(self) -> str:
        """Stem of the report's files."""
        step = "" if self.model.step is None else f"-step-{self.model.step:08d}"
        return f"suite-{self.suite}{step}-{self.attempt}"

    def headline(self) -> str:
        """The result in one sentence."""
        return f"{self.suite}: {figures(self.results)}."

    def markdown(self) -> str:
        """The figures as a table, then the texts."""
        step = "" if self.model.step is None else f", step {self.model.step:,}"
        parts = [f"# {self.suite}: {self.model.run}{step}", table(self.results)]
        if self.fillings:
            rows = [_row(one) for one in self.fillings[:_SHOWN]]
            more = len(self.fillings) - _SHOWN
            tail = [f"and {more} more in the JSON file"] if more > 0 else []
            parts += ["\n".join(["| prompt | filled | right |", "|---|---|---|", *rows]), *tail]
        parts.append(f"weights {self.model.weights_hash}, evaluation {self.attempt}, {self.seconds:.1f} s")
        return "\n\n".join(parts) + "\n"


def figures(results: list[Result], most: int = 4) -> str:
    """The first figures with their errors, in a line."""
    shown = [f"{one.metric} {value(one)}" for one in results[:most]]
    more = len(results) - most
    return ", ".join([*shown, *([f"and {more} more"] if more > 0 else [])])


def value(one: Result) -> str:
    """A figure with its standard error, to as many digits as that has meaning for."""
    if one.standard_error is None:
        return f"{one.value:.4g}"
    digits = 4 if one.standard_error < 0.1 else 3 if one.standard_error < 1 else 2
    return f"{one.value:.{digits}f} ± {one.standard_error:.{digits}f}"


def table(results: list[Result]) -> str:
    """All figures, as a table in Markdown."""
    rows = [f"| {one.metric} | {value(one)} | {one.unit} | {one.samples or '-'} |" for one in results]
    return "\n".join(["| figure | value | unit | of |", "|---|---|---|---|", *rows])


def text_table(results: list[Result]) -> str:
    """The same for a terminal."""
    wide = max((len(one.metric) for one in results), default=0)
    return "\n".join(f"  {one.metric:<{wide}}  {value(one):>20}  {one.unit}" for one in results)


def _row(one: Filling) -> str:
    right = {None: "-", True: "yes", False: "no"}[one.right]
    return f"| `{_cell(one.prompt)}` | `{_cell(one.text)}` | {right} |"


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ").replace("`", "'")
