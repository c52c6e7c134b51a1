"""Pictures of a study: learning curves over tokens, and its values against its bounds."""

import math
from pathlib import Path

from orchestration.search.ranking import Ranked
from orchestration.search.study import Study

_NAMED = 8  # of the best trials, with a colour and a line in the legend


def draw_curves(study: Study, ranked: list[Ranked], unit: str, path: Path) -> Path:
    """The bound of every trial, in `unit`, over the tokens that it trained on, as a PNG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(9, 5.2), dpi=120, layout="constrained")
    for one in reversed(ranked):
        rounds = [r for r in one.rounds if math.isfinite(r.bits)]
        if not rounds:
            continue
        named = one.place <= _NAMED
        axes.errorbar(
            [r.tokens for r in rounds],
            [r.bits for r in rounds],
            yerr=[2 * r.error if math.isfinite(r.error) else 0.0 for r in rounds],
            fmt="o-" if one.state == "finished" else "x:",
            color=f"C{one.place - 1}" if named else "0.8",
            lw=2 if one.place == 1 else 1.2,
            ms=4,
            capsize=2,
            elinewidth=0.7,
            zorder=3 if named else 1,
            label=f"{one.record.number:03d} {one.state}" if named else None,
        )
    axes.set(
        xlabel="tokens", ylabel=f"validation bound, {unit}", title=f"{study.name}: learning curves, ± 2 standard errors"
    )
    handles, labels = axes.get_legend_handles_labels()
    axes.legend(handles[::-1], labels[::-1], frameon=False, fontsize=8, title="best first", title_fontsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path)
    plt.close(figure)
    return path


def draw_parallel(study: Study, ranked: list[Ranked], unit: str, path: Path) -> Path:
    """Parallel coordinates: a line through the values of each trial to its bound, as a PNG. Those that were stopped are
    dotted: their bound is of fewer tokens."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    known = [one for one in ranked if one.bits is not None and math.isfinite(one.bits)]
    keys = list(study.space.space)
    bounds = [one.bits for one in known if one.bits is not None]
    low, high = min(bounds), max(bounds)
    spread = (high - low) or 1.0
    figure, axes = plt.subplots(figsize=(2.2 * (len(keys) + 1) + 1.5, 4.6), dpi=120, layout="constrained")
    colours = matplotlib.colormaps["viridis_r"]
    for one in reversed(known):
        assert one.bits is not None
        shift = 0.012 * ((one.record.number % 5) - 2)  # lines of equal values stay apart
        ranges = [study.space.space[key] for key in keys]
        places = [given.place(one.record.values[key]) for given, key in zip(ranges, keys, strict=True)]
        heights = [place + shift * (given.values is not None) for place, given in zip(places, ranges, strict=True)]
        height = (one.bits - low) / spread
        axes.plot(
            range(len(keys) + 1), [*heights, height], "-" if one.state == "finished" else ":",
            color=colours(0.95 - 0.85 * height), lw=2.4 if one.place == 1 else 1.3, alpha=0.9,
        )  # fmt: skip
    for number, key in enumerate(keys):
        axes.axvline(number, color="0.3", lw=0.8)
        for height, text in _ticks(study, key):
            axes.annotate(text, (number, height), (3, 0), textcoords="offset points", fontsize=8, va="center",
                          bbox={"fc": "white", "ec": "none", "alpha": 0.75, "pad": 0.6})  # fmt: skip
    axes.axvline(len(keys), color="0.3", lw=0.8)
    for height in (0, 0.5, 1):
        axes.annotate(f"{low + height * (high - low):.3f}", (len(keys), height), (4, 0), textcoords="offset points",
                      fontsize=8, va="center")  # fmt: skip
    labels = [key.removeprefix("model.").removeprefix("optimizer.") for key in keys]
    axes.set_xticks(range(len(keys) + 1), [*labels, f"bound,\n{unit}"], fontsize=9)
    axes.set(
        yticks=[],
        ylim=(-0.06, 1.06),
        xlim=(-0.15, len(keys) + 0.35),
        title=f"{study.name}: values and bounds, best at the bottom",
    )
    axes.spines[["top", "right", "left", "bottom"]].set_visible(False)
    figure.savefig(path)
    plt.close(figure)
    return path


def _ticks(study: Study, key: str) -> list[tuple[float, str]]:
    one = study.space.space[key]
    values = one.values or one.ends
    if len(values) > 8:
        values = (values[0], values[len(values) // 2], values[-1])
    return [(one.place(value), f"{value:g}" if isinstance(value, float) else str(value)) for value in values]
