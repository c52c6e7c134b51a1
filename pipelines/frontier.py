"""The frontier: perplexity under a judge against entropy, over temperatures and steps, as a table and a picture.

A lower temperature lowers both, until samples repeat themselves; more steps should lower the perplexity at the same
entropy. Hence one sampler is better than another if its line lies lower where both have the same entropy, and the
point of real text tells where a line would best end. Single points on different lines say little.
"""

from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, FiniteFloat

from md4.errors import UserError
from pipelines.judges import JudgeFacts
from pipelines.quality import TextQuality
from pipelines.quality_reports import QualityReport
from pipelines.reports import Report, facts_table


class Point(BaseModel):
    """Some texts under the judge: no perplexity without its entropy, both with standard errors."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    perplexity: float = Field(gt=0, allow_inf_nan=False)
    perplexity_error: FiniteFloat
    entropy: FiniteFloat = Field(ge=0, description="nats")
    entropy_error: FiniteFloat
    distinct_2: float | None
    steps: int | None = Field(default=None, description="of the sampler, if it has such")
    temperature: float | None = Field(default=None, description="None of real texts")
    calls_per_sample: float | None = None
    mauve: float | None = None


class FrontierReport(Report):
    """All points of one sampler, and that of the data."""

    kind: Literal["frontier"] = "frontier"
    settings: dict[str, Any] = Field(description="that all points share")
    draws: str
    samples: int = Field(description="of each point")
    length: int = Field(description="tokens of a sample")
    judge: JudgeFacts
    digest: str = Field(description="short hash of all that was asked for: names the files")
    points: list[Point] = Field(min_length=2)
    data: Point | None = Field(default=None, description="of real texts, as many")

    @property
    def name(self) -> str:
        return f"{super().name}-{self.digest}"

    def headline(self) -> str:
        best = min(self.points, key=self._distance) if self.data is not None else None
        if best is None or self.data is None:
            return f"{len(self.points)} points under {self.judge.judge}, {self.samples:,} samples each."
        return (
            f"Nearest to the data's entropy of {self.data.entropy:.3f} nats, where its perplexity under "
            f"{self.judge.judge} is {self.data.perplexity:.2f}: perplexity {best.perplexity:.2f} +- "
            f"{best.perplexity_error:.2f} at entropy {best.entropy:.3f} +- {best.entropy_error:.3f} "
            f"({_setting(best)}; {self.samples:,} samples each)."
        )

    def _distance(self, point: Point) -> float:
        assert self.data is not None
        return abs(point.entropy - self.data.entropy)

    def markdown(self) -> str:
        rows = [_row(point) for point in self.points] + ([_row(self.data)] if self.data is not None else [])
        table = "\n".join([
            "| steps | temperature | calls | perplexity | entropy, nats | distinct 2-grams | MAUVE |",
            "|---|---|---|---|---|---|---|",
            *rows,
        ])  # fmt: skip
        tree = self.model_dump(mode="json", exclude={"points", "data"})
        picture = f"![Perplexity against entropy]({self.name}.png)"
        return (
            "\n\n".join([f"# Frontier, against {self.split}", self.headline(), table, picture, facts_table(tree)])
            + "\n"
        )


def frontier(reports: Sequence[QualityReport], digest: str, seconds: float) -> FrontierReport:
    """The frontier of reports on the same model, judge, number of samples and data, at different settings.

    UserError for fewer than two, or for one without a perplexity.
    """
    if len(reports) < 2:
        raise UserError(f"a frontier needs at least 2 settings of temperature and steps, there is {len(reports)}")
    first = reports[0]
    if first.judge is None:
        raise UserError("a frontier needs a judge")
    fixed = ("model", "judge", "samples", "length", "data", "data_fingerprint", "seed")
    for other in reports[1:]:
        if different := [name for name in fixed if getattr(other, name) != getattr(first, name)]:
            raise UserError(f"a frontier's points must agree in all but the setting; they differ in {different}")
    shared = {k: v for k, v in first.settings.items() if all(other.settings.get(k) == v for other in reports)}
    points = [
        _point(report.text, report.settings, report.calls_per_sample, report.mauve.mauve if report.mauve else None)
        for report in reports
        if report.text is not None
    ]
    base = first.model_dump(include=set(Report.model_fields) - {"kind", "created", "seconds", "model"})
    return FrontierReport(
        **base,
        created=datetime.now(UTC),
        model=first.model,
        seconds=seconds,
        settings=shared,
        draws=first.draws,
        samples=first.samples,
        length=first.length,
        judge=first.judge,
        digest=digest,
        points=sorted(points, key=lambda point: (point.steps or 0, point.temperature or 0)),
        data=None if first.data is None else _point(first.data),
    )


def _point(
    text: TextQuality, settings: dict[str, Any] | None = None, calls: float | None = None, mauve: float | None = None
) -> Point:
    settings = settings or {}
    own = text.model_dump(include={"perplexity", "perplexity_error", "entropy", "entropy_error", "distinct_2"})
    return Point(
        **own,
        steps=settings.get("steps"),
        temperature=settings.get("temperature"),
        calls_per_sample=calls,
        mauve=mauve,
    )


def _setting(point: Point) -> str:
    steps = "no steps" if point.steps is None else f"{point.steps:,} steps"
    return f"{steps}, temperature {point.temperature:g}"


def _row(point: Point) -> str:
    real = point.temperature is None
    cells = (
        "data" if real else "-" if point.steps is None else f"{point.steps:,}",
        "-" if real else f"{point.temperature:g}",
        "-" if point.calls_per_sample is None else f"{point.calls_per_sample:.1f}",
        f"{point.perplexity:.4g} ± {point.perplexity_error:.2g}",
        f"{point.entropy:.4f} ± {point.entropy_error:.2g}",
        "-" if point.distinct_2 is None else f"{point.distinct_2:.2%}",
        "-" if point.mauve is None else f"{point.mauve:.3f}",
    )
    return f"| {' | '.join(cells)} |"


def draw(report: FrontierReport, path: Path) -> Path:
    """The picture as a PNG at `path`: a line for each number of steps, points named by temperature, the data a star.

    Bars are one standard error. The perplexity's axis is logarithmic.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

    figure, axes = plt.subplots(figsize=(7.5, 5.2), dpi=130, layout="constrained")
    lines = sorted({point.steps for point in report.points}, key=lambda steps: steps or 0)
    colors = plt.get_cmap("viridis")([0.75 * place / max(1, len(lines) - 1) for place in range(len(lines))])
    for place, (steps, color) in enumerate(zip(lines, colors, strict=True)):
        line = [point for point in report.points if point.steps == steps]
        axes.errorbar(
            [point.entropy for point in line],
            [point.perplexity for point in line],
            xerr=[point.entropy_error for point in line],
            yerr=[point.perplexity_error for point in line],
            fmt="o-", ms=5, lw=1.6, elinewidth=0.9, capsize=0, color=color,
            label="sampler without steps" if steps is None else f"{steps:,} steps",
        )  # fmt: skip
        for point in line:
            # Lines run close together: the first and the last name their points on the outer side.
            aside = (-4, 6) if place == 0 else (5, -6) if place == len(lines) - 1 else (6, 4)
            axes.annotate(
                f"{point.temperature:g}", (point.entropy, point.perplexity), aside, textcoords="offset points",
                ha="right" if aside[0] < 0 else "left", va="top" if aside[1] < 0 else "bottom",
                fontsize=8, color=color,
            )  # fmt: skip
    if report.data is not None:
        point = report.data
        axes.errorbar(
            [point.entropy], [point.perplexity], xerr=[point.entropy_error], yerr=[point.perplexity_error],
            fmt="*", ms=14, color="C3", elinewidth=0.9, label=f"real text ({report.split})", zorder=5,
        )  # fmt: skip
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 5, 7)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.xaxis.set_major_locator(MaxNLocator(8))
    axes.margins(0.08)
    axes.grid(color="0.92", lw=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.set(xlabel="entropy of a sample's tokens, nats", ylabel=f"perplexity under {report.judge.judge}")
    step = "" if report.model.step is None else f", step {report.model.step:,}"
    axes.set_title(f"{report.model.run or 'samples'}{step}: quality and diversity of samples", loc="left", fontsize=11)
    axes.legend(frameon=False, fontsize=9, title="numbers at points: temperature", title_fontsize=8, alignment="left")
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}")
    figure.savefig(temporary, format="png")
    plt.close(figure)
    temporary.replace(path)
    return path
