"""A figure over the life of a model as a small picture, to stand in a page: SVG that takes the page's own colours."""

import io
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from markupsafe import escape

from orchestration.trends import Verdict

SIZE = (4.4, 1.9)  # inches: of a card
_ERRORS = 1.96  # standard errors to each side that are drawn: 95 %
# Colours that stand for those of the page, which may be dark or light.
_COLOURS = {"accent": "#010201", "wrong": "#010202", "amber": "#010203", "soft": "#010204", "line": "#010205"}
_OF_KIND = {"worse": "wrong", "changed": "amber"}


@dataclass(frozen=True)
class Axis:
    """What stands below a picture."""

    name: str  # version, step or time
    values: list[float]

    @classmethod
    def of(cls, verdicts: Sequence[Verdict]) -> "Axis":
        """Versions if all have one, else steps, else the time (s since 1970)."""
        found = [one.result for one in verdicts]
        for name in ("version", "step"):
            if all(getattr(one, name) is not None for one in found):
                return cls(name, [float(getattr(one, name)) for one in found])
        return cls("time", [one.created.timestamp() for one in found])

    def label(self, value: float) -> str:
        """A place on the axis in words."""
        if self.name == "time":
            return f"{datetime.fromtimestamp(value):%b %d}"
        if value >= 10_000 and value % 1000 == 0:
            return f"{value / 1000:,.0f}k"
        return f"{value:,.0f}"


def draw(verdicts: Sequence[Verdict], axis: Axis, shown: Verdict) -> str:
    """The figures of one metric in their order, with 95 % error bars, as an <svg> element; what was measured otherwise
    than the one that is `shown` in words is pale, and what became worse stands out by colour and form."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    metric = shown.result.metric
    style: Any = {"svg.fonttype": "none", "svg.hashsalt": metric, "font.family": "sans-serif", "font.size": 8}
    with plt.rc_context(style):
        figure, axes = plt.subplots(figsize=SIZE, layout="constrained")
        for series in dict.fromkeys(one.result.series for one in verdicts):
            places = [i for i, one in enumerate(verdicts) if one.result.series == series]
            pale = 1.0 if series == shown.result.series else 0.35
            values = [verdicts[i].result.value for i in places]
            axes.plot(
                [axis.values[i] for i in places], values, "-", lw=1.4, color=_COLOURS["accent"], alpha=0.55 * pale
            )
            for i in places:
                _point(axes, axis.values[i], verdicts[i], pale, verdicts[i] is shown)
        _dress(axes, axis, _view(verdicts, shown))
        out = io.StringIO()
        figure.savefig(out, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
        plt.close(figure)
    return _themed(out.getvalue(), f"{metric}: {len(verdicts)} evaluations by {axis.name}")


def _point(axes, x: float, one: Verdict, pale: float, newest: bool) -> None:  # type: ignore[no-untyped-def]
    colour = _COLOURS[_OF_KIND.get(one.kind, "accent")]
    error = one.result.standard_error
    if error:
        axes.errorbar(x, one.result.value, yerr=_ERRORS * error, fmt="none", ecolor=colour, elinewidth=1, alpha=pale)
    stands_out = one.kind in _OF_KIND
    axes.plot(
        x, one.result.value, "D" if stands_out else "o", ms=6 if stands_out or newest else 3.5, color=colour,
        alpha=pale, mew=0,
    )  # fmt: skip


def _view(verdicts: Sequence[Verdict], shown: Verdict) -> tuple[float, float]:
    """The range of values that is drawn: where the newer half and the one in words are, at a scale at which they can be
    seen; what came long before may begin beyond it, as the first steps of a training do."""
    found = [(one.result.value, _ERRORS * (one.result.standard_error or 0)) for one in verdicts]
    lows, highs = [middle - half for middle, half in found], [middle + half for middle, half in found]
    newer = max(3, len(found) // 2)
    within = [i for i, one in enumerate(verdicts) if one is shown or i >= len(found) - newer]
    low, high = min(lows[i] for i in within), max(highs[i] for i in within)
    room = 1.5 * (high - low)
    return max(low - room, min(lows)), min(high + room, max(highs))


def _dress(axes, axis: Axis, view: tuple[float, float]) -> None:  # type: ignore[no-untyped-def]
    """Quiet axes: three values to each side, no frame, the name of what runs below."""
    from matplotlib.ticker import FixedLocator, MaxNLocator

    ticks = sorted({min(axis.values), max(axis.values)})
    if len(set(axis.values)) > 2:
        middle = (ticks[0] + ticks[-1]) / 2
        nearest = min(set(axis.values), key=lambda value: abs(value - middle))
        ticks = sorted({*ticks, nearest})
    axes.xaxis.set_major_locator(FixedLocator(ticks))
    axes.set_xticklabels([axis.label(tick) if i else f"{axis.name} {axis.label(tick)}" for i, tick in enumerate(ticks)])
    axes.yaxis.set_major_locator(MaxNLocator(3))
    axes.tick_params(length=0, labelcolor=_COLOURS["soft"])
    axes.grid(axis="y", color=_COLOURS["line"], lw=0.8)
    axes.set_axisbelow(True)
    for spine in axes.spines.values():
        spine.set_visible(False)
    axes.margins(x=0.06)
    low, high = view if not math.isclose(*view) else (view[0] - 0.5, view[1] + 0.5)
    axes.set_ylim(low - 0.12 * (high - low), high + 0.12 * (high - low))


def _themed(svg: str, title: str) -> str:
    """The element alone, scaling with its card, in the colours of the page, with a title for who can't see it."""
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg[svg.index("<svg") :], flags=re.DOTALL)
    for name, colour in _COLOURS.items():
        svg = svg.replace(colour, f"var(--{name})")
    head, rest = svg.split(">", 1)
    head = re.sub(r' (?:width|height)="[^"]*"', "", head)
    rest = re.sub(r"font: ([^;\"]*px) [^;\"]*", r"font: \1 inherit; font-family: inherit", rest)
    return f'{head} role="img" aria-label="{escape(title)}">{rest}'
