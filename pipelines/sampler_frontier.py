"""The sampler frontier: how good samples are for the network calls that they cost, as a table and a picture.

A setting is on the frontier if none that costs as much or less has a lower score. The score is one figure that both
bad and monotonous samples raise; what it is made of stands beside it. Of many noisy scores the least looks a little too
good: those that win a number of calls are sampled again, with other seeds.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, FiniteFloat

from pipelines.judges import JudgeFacts
from pipelines.reports import Report, facts_table

if TYPE_CHECKING:
    from matplotlib.axes import Axes


class Figure(BaseModel):
    """A value with its standard error."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    value: FiniteFloat
    standard_error: FiniteFloat = Field(ge=0)

    def __str__(self) -> str:
        return f"{self.value:.4g} ± {self.standard_error:.2g}"


class SamplerPoint(BaseModel):
    """Some samples of one setting."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    settings: dict[str, Any] = Field(description="what was asked for; grids by name")
    calls: Figure = Field(description="network calls of a sample")
    score: Figure
    figures: dict[str, Figure] = Field(description="what else was measured, by name")
    bound: Figure | None = Field(default=None, description="bits per token of the sampler as run, on held-out rows")
    frontier: bool = Field(default=False, description="nothing as cheap has a lower score")

    @property
    def title(self) -> str:
        """The setting in words, but for its steps."""
        rest = {name: value for name, value in self.settings.items() if name not in ("sampler", "steps")}
        words = [name if value is True else f"{name}={value}" for name, value in rest.items()]
        return ", ".join([str(self.settings["sampler"]).replace("_", " "), *words])


class GridGain(BaseModel):
    """By how much the bound of a searched grid is below that of a named one, on the same held-out rows."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    steps: int
    below: str = Field(description="the named grid")
    bits: Figure = Field(description="per token; the error is that of the difference")


class Winner(BaseModel):
    """The setting that is best for a number of calls."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    calls: int = Field(description="that a sample may cost, on average, give or take half a call")
    settings: dict[str, Any]
    score: Figure = Field(description="among the others")
    again: Figure = Field(description="score of new samples, with seeds that the choice didn't see")
    kept: str | None = Field(default=None, description="file in the folder of the run; None: not kept")


class SamplerFrontier(Report):
    """All settings of one model."""

    kind: Literal["sampler-frontier"] = "sampler-frontier"
    score: str = Field(description="what the score is; lower is better")
    samples: int = Field(description="of each setting")
    length: int = Field(description="tokens of a sample")
    common: dict[str, Any] = Field(description="settings of all samplers")
    judge: JudgeFacts | None = None
    digest: str = Field(description="short hash of all that was asked for: names the files")
    data: dict[str, Figure] = Field(description="the figures of real rows; of the score, where it would end")
    real_rows: int | None = Field(
        default=None,
        description="how many, if the split has fewer than there are samples; their score is too high then",
    )
    points: list[SamplerPoint] = Field(min_length=1)
    winners: list[Winner]
    gains: list[GridGain] = Field(description="of the searched grids, in the bound of ancestral sampling as run")

    @property
    def name(self) -> str:
        return f"{super().name}-{self.digest}"

    def headline(self) -> str:
        best = "; ".join(f"{each.calls} calls: {_words(each.settings)} ({each.again})" for each in self.winners)
        real = f", of {self.real} {self.data['score']}" if "score" in self.data else ""
        return f"Best of {len(self.points)} settings by {self.score} ({self.samples:,} samples each{real}): {best}."

    @property
    def real(self) -> str:
        """What samples are compared with, in words."""
        return "as many real rows" if self.real_rows is None else f"{self.real_rows:,} real rows"

    def table(self) -> str:
        """All points in Markdown, by calls; those on the frontier in bold."""
        names = list(self.points[0].figures)
        head = ["sampler", "steps", "calls", "score", *names, "bound, bits per token"]
        lines = [_line(head), _line(["---"] * len(head))]
        for point in sorted(self.points, key=lambda point: (point.calls.value, point.score.value)):
            steps = point.settings.get("steps")
            mark = "**" if point.frontier else ""
            cells = [f"{mark}{point.title}{mark}", "-" if steps is None else str(steps), f"{point.calls.value:.1f}"]
            cells += [f"{mark}{point.score}{mark}", *(str(point.figures[name]) for name in names)]
            lines.append(_line([*cells, "-" if point.bound is None else str(point.bound)]))
        real = [str(self.data[name]) if name in self.data else "-" for name in ("score", *names)]
        return "\n".join([*lines, _line([self.real, "-", "-", *real, "-"])])

    def markdown(self) -> str:
        gained = [_line(["steps", "searched grid's bound is below that of", "bits per token"]), _line(["---"] * 3)]
        gained += [_line([str(gain.steps), gain.below, str(gain.bits)]) for gain in self.gains]
        chosen = [_line(["calls", "best", "score", "again", "kept"]), _line(["---"] * 5)]
        for each in self.winners:
            cells = [str(each.calls), _words(each.settings), str(each.score), str(each.again), each.kept or "-"]
            chosen.append(_line(cells))
        facts = facts_table(self.model_dump(mode="json", exclude={"points", "winners", "data", "gains"}))
        picture = f"![Score by network calls]({self.name}.png)"
        return "\n\n".join([
            f"# Sampler frontier, {self.split}", self.headline(), "\n".join(chosen), picture, self.table(),
            "\n".join(gained), facts,
        ]) + "\n"  # fmt: skip


def frontier_of(points: Sequence[SamplerPoint]) -> list[SamplerPoint]:
    """The points, those marked that no point of as many or fewer calls beats. Calls that differ by less than half are
    as many: leftovers cost some samples one more."""

    def beaten(point: SamplerPoint) -> bool:
        return any(
            other.score.value < point.score.value and other.calls.value <= point.calls.value + 0.5 for other in points
        )

    return [point.model_copy(update={"frontier": not beaten(point)}) for point in points]


def best_within(points: Sequence[SamplerPoint], calls: int) -> SamplerPoint | None:
    """The point with the lowest score that costs at most `calls`, half a call aside; None if all cost more."""
    cheap = [point for point in points if point.calls.value <= calls + 0.5]
    return min(cheap, key=lambda point: point.score.value, default=None)


def _words(settings: dict[str, Any]) -> str:
    return " ".join(f"{name}={str(value).lower() if value is True else value}" for name, value in settings.items())


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def draw(report: SamplerFrontier, path: Path) -> Path:
    """A picture as a PNG at `path`: score over network calls, and what searched grids gain; see `draw_panels`."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, (left, right) = plt.subplots(
        1, 2, figsize=(12.5, 6.2), dpi=130, layout="constrained", width_ratios=(1.5, 1)
    )
    draw_panels(report, left, right)
    figure.legend(loc="outside lower center", frameon=False, fontsize=8, ncols=5)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}")
    figure.savefig(temporary, format="png")
    plt.close(figure)
    temporary.replace(path)
    return path


def draw_panels(report: SamplerFrontier, scores: "Axes", gains: "Axes") -> None:
    """Score over network calls, a line for each sampler and grid, and the gains of searched grids over named ones.

    Bars are one standard error of scores, two of gains.
    """
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    titles = list(dict.fromkeys(_series(point) for point in report.points))
    for place, title in enumerate(titles):
        line = [point for point in report.points if _series(point) == title]
        line.sort(key=lambda point: point.calls.value)
        scores.errorbar(
            [point.calls.value for point in line],
            [point.score.value for point in line],
            yerr=[point.score.standard_error for point in line],
            fmt=f"{'osD^v'[place // 10 % 5]}-", ms=4.5, lw=1.3, elinewidth=0.9, color=f"C{place % 10}", label=title,
        )  # fmt: skip
    best = [point for point in report.points if point.frontier]
    scores.plot(
        [point.calls.value for point in best], [point.score.value for point in best], "o", ms=11, mfc="none", mew=1.6,
        color="0.2", label="on the frontier",
    )  # fmt: skip
    if "score" in report.data:
        scores.axhline(report.data["score"].value, color="0.4", ls="--", lw=1, label="real rows")
    scores.set_ylabel(report.score)
    if all(point.score.value > 0 for point in report.points):
        scores.set_yscale("log")
        scores.yaxis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 5, 7)))
        scores.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        scores.yaxis.set_minor_formatter(NullFormatter())
    for place, kind in enumerate(dict.fromkeys(gain.below for gain in report.gains)):
        line = [gain for gain in report.gains if gain.below == kind]
        gains.errorbar(
            [gain.steps * (0.98, 1.02)[place % 2] for gain in line],
            [gain.bits.value for gain in line],
            yerr=[2 * gain.bits.standard_error for gain in line],
            fmt="o-", ms=5, capsize=3, lw=1.3, color=("0.55", "0.15")[place % 2],
        )  # fmt: skip
        last = line[-1]
        gains.annotate(
            f"than {kind}", (last.steps, last.bits.value), (9, 0), textcoords="offset points", va="center", fontsize=9
        )
    if all(gain.bits.value > 2 * gain.bits.standard_error for gain in report.gains):
        gains.set_yscale("log")  # gains over one grid may be a hundredth of those over the other
        gains.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    else:
        gains.axhline(0, color="0.4", lw=0.8)
    gains.margins(x=0.18)
    gains.set_ylabel("lower bound with the searched grid, bits per token")
    gains.set_title("held-out rows, ± 2 standard errors", loc="left", fontsize=10)
    ticks = sorted({gain.steps for gain in report.gains})
    for axes, what in ((scores, "network calls of a sample"), (gains, "steps of ancestral sampling")):
        axes.set_xscale("log", base=2)
        axes.set_xticks(ticks, [str(tick) for tick in ticks])
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.grid(color="0.92", lw=0.8)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
        axes.set_xlabel(what)
    step = "" if report.model.step is None else f", step {report.model.step:,}"
    real = f", {report.real}" if "score" in report.data else ""
    scores.set_title(f"{report.model.run}{step}: {report.samples:,} samples a point{real}", loc="left", fontsize=10)


def _series(point: SamplerPoint) -> str:
    """The line of a point: settings that the calls follow from aside."""
    return point.title.split(", entropy_bound")[0]
