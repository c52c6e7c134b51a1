"""The sampler frontier: how good samples are for the network calls that they cost, as a table and a picture.

A setting is on the frontier if none that costs as much or less has a lower score. The score is one figure that both
bad and monotonous samples raise; what it is made of stands beside it. Of many noisy scores the least looks a little too
good: those that win a number of calls are sampled again, with other seeds.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, FiniteFloat

from pipelines.judges import JudgeFacts
from pipelines.reports import Report, facts_table


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
    data: dict[str, Figure] = Field(description="the figures of as many real rows; of the score, where it would end")
    points: list[SamplerPoint] = Field(min_length=1)
    winners: list[Winner]

    @property
    def name(self) -> str:
        return f"{super().name}-{self.digest}"

    def headline(self) -> str:
        best = "; ".join(f"{each.calls} calls: {_words(each.settings)} ({each.again})" for each in self.winners)
        real = f", of real rows {self.data['score']}" if "score" in self.data else ""
        return f"Best of {len(self.points)} settings by {self.score} ({self.samples:,} samples each{real}): {best}."

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
        return "\n".join([*lines, _line(["real rows", "-", "-", *real, "-"])])

    def markdown(self) -> str:
        chosen = [_line(["calls", "best", "score", "again", "kept"]), _line(["---"] * 5)]
        for each in self.winners:
            cells = [str(each.calls), _words(each.settings), str(each.score), str(each.again), each.kept or "-"]
            chosen.append(_line(cells))
        facts = facts_table(self.model_dump(mode="json", exclude={"points", "winners", "data"}))
        picture = f"![Score by network calls]({self.name}.png)"
        return "\n\n".join([
            f"# Sampler frontier, {self.split}", self.headline(), "\n".join(chosen), picture, self.table(), facts
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
    """Score over network calls as a PNG at `path`, a line for each sampler and grid; bars are one standard error.

    If there are bounds, a second panel has those.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    from matplotlib.ticker import NullFormatter

    bounds = any(point.bound is not None for point in report.points)
    wide = (12.5, 5.4) if bounds else (8.2, 5.4)
    figure, panels = plt.subplots(1, 1 + bounds, figsize=wide, dpi=130, layout="constrained", squeeze=False)
    titles = list(dict.fromkeys(_series(point) for point in report.points))
    colours = {title: f"C{place % 10}" for place, title in enumerate(titles)}
    marks = {title: "osD^v"[place // 10 % 5] for place, title in enumerate(titles)}
    for axes, what in zip(panels[0], ("score", "bound"), strict=False):
        for title in titles:
            line = [point for point in report.points if _series(point) == title and getattr(point, what) is not None]
            if not line:
                continue
            line.sort(key=lambda point: point.calls.value)
            figures: list[Figure] = [getattr(point, what) for point in line]
            axes.errorbar(
                [point.calls.value for point in line],
                [each.value for each in figures],
                yerr=[each.standard_error for each in figures],
                fmt=f"{marks[title]}-", ms=4.5, lw=1.3, elinewidth=0.9, color=colours[title], label=title, alpha=0.9,
            )  # fmt: skip
        axes.set_xscale("log", base=2)
        ticks = sorted({each.calls for each in report.winners})
        axes.set_xticks(ticks, [str(tick) for tick in ticks])
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.grid(color="0.92", lw=0.8)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
        axes.set_xlabel("network calls of a sample")
    score = panels[0][0]
    steps = sorted((point for point in report.points if point.frontier), key=lambda point: point.calls.value)
    score.plot(
        [point.calls.value for point in steps], [point.score.value for point in steps], "o", ms=11, mfc="none", mew=1.6,
        color="0.2", label="on the frontier",
    )  # fmt: skip
    if "score" in report.data:
        score.axhline(report.data["score"].value, color="0.4", ls="--", lw=1, label=f"real rows ({report.split})")
    score.set_ylabel(report.score)
    if all(point.score.value > 0 for point in report.points):
        score.set_yscale("log")
    score.legend(frameon=False, fontsize=8, ncols=1 + (len(titles) > 8))
    if bounds:
        panels[0][1].set_ylabel("bound of the sampler as run, bits per token")
        panels[0][1].set_title("held-out rows", loc="left", fontsize=10)
    step = "" if report.model.step is None else f", step {report.model.step:,}"
    score.set_title(f"{report.model.run}{step}: {report.samples:,} samples a point", loc="left", fontsize=10)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}")
    figure.savefig(temporary, format="png")
    plt.close(figure)
    temporary.replace(path)
    return path


def _series(point: SamplerPoint) -> str:
    """The line of a point: settings that the calls follow from aside."""
    return point.title.split(", entropy_bound")[0]
