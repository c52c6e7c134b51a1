"""`md4 results show | trend`: what evaluations have found, and whether anything became worse."""

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated

import typer

from orchestration.commands.arguments import console, group, say

if TYPE_CHECKING:
    from orchestration.trends import Evaluation

app = group("What evaluations have found: the table of figures, and how they change.")

Table = Annotated[str | None, typer.Option("--results", help="a folder or s3://...; else MD4_RESULTS, else results/")]
Model = Annotated[str | None, typer.Option("--model", help="of this model alone")]
SuiteName = Annotated[str | None, typer.Option("--suite", help="of this suite alone, by its name")]


@app.command()
def show(
    table: Table = None,
    model: Model = None,
    suite: SuiteName = None,
    metric: Annotated[str | None, typer.Option(help="this figure alone, e.g. quality/entropy")] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="print a line of JSON for each figure, and nothing else")
    ] = False,
) -> None:
    """The figures, the oldest first."""
    from orchestration import results
    from orchestration.suites.reports import value
    from orchestration.trends import Evaluation, Verdict

    place = results.place(table)
    found = results.read(place, model=model, suite=suite, metric=metric)
    if as_json:
        for one in found:
            print(one.model_dump_json())
        return
    if not found:
        say(f"no such results in {place}")
        return
    rows = [
        (
            one.model, Evaluation((Verdict(one, "first"),)).place, one.suite, one.metric, value(one), one.unit,
            f"{one.created:%Y-%m-%d %H:%M}",
        )
        for one in found
    ]  # fmt: skip
    for row in aligned(("model", "at", "suite", "figure", "value", "unit", "measured"), rows):
        say(row)


@app.command()
def trend(
    table: Table = None,
    model: Model = None,
    suite: SuiteName = None,
    out: Annotated[
        str | None, typer.Option(help="folder or s3://... for the pages; else _trends/ in the table")
    ] = None,
    alpha: Annotated[
        float, typer.Option(help="the chance that anything of an evaluation is called worse though nothing is")
    ] = 0.01,
    check: Annotated[
        bool, typer.Option("--check", help="exit code 1 if anything of the newest evaluations is worse")
    ] = False,
) -> None:
    """How the figures of each model change, as a page and in short, and which became worse."""
    from urllib.parse import quote

    from orchestration import results, trends
    from orchestration.suites.page import render
    from pipelines.storage import Folder

    place = results.place(table)
    names = [model] if model is not None else trends.models(place, suite)
    pages, worse = Folder(out) if out else place / "_trends", dict[str, int]()
    for name in names:
        judged = trends.read(place, name, suite, alpha)
        for sequence, evaluations in judged.items():
            _tell(name, sequence, evaluations)
            newest = trends.newest(evaluations)
            if found := len(newest.of("worse")):
                worse[f"{name}, {sequence}: {newest.place}"] = found
        file = f"{quote(name, safe=' ')}.html"
        pages.write(file, render(name, judged, str(place), alpha).encode())
        say(f"written: {pages.path(file)}\n")
    where = f" ({'; '.join(worse)})" if worse else ""
    say(f"worse than before in the newest evaluations: {sum(worse.values()) or 'nothing'}{where}")
    if check and worse:
        sys.exit(1)


def _tell(model: str, sequence: str, evaluations: "list[Evaluation]") -> None:
    """The newest evaluation beside what came before, for a terminal."""
    from orchestration.suites.page import WORDS, against
    from orchestration.suites.reports import value
    from orchestration.trends import newest as newest_of

    newest = newest_of(evaluations)
    say(
        f"{model}, {sequence}: {newest.place}, measured {newest.first.created:%Y-%m-%d %H:%M}, "
        f"the newest of {len(evaluations)}"
    )
    rows = [
        (one.result.metric, value(one.result), one.result.unit, WORDS[one.kind], against(one))
        for one in newest.verdicts
    ]
    colours = {"worse": "bold red", "better": "green", "changed": "yellow"}
    _, *lines = aligned(("figure", "value", "unit", "", "difference"), rows)
    for one, line in zip(newest.verdicts, lines, strict=True):
        console.print(f"  {line}", markup=False, style=colours.get(one.kind))


def aligned(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines of columns: as wide as they need be, whatever the terminal."""
    widths = [max(len(row[i]) for row in (head, *rows)) for i in range(len(head))]
    return [
        "  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)).rstrip() for row in (head, *rows)
    ]
