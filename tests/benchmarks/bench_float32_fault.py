"""The float32 fault of joint draws, reproduced: how often positions are revealed, and how varied the tokens are.

    python -m tests.benchmarks.bench_float32_fault [THOUSANDS OF MEASURED DRAWS, 200]      about 2 minutes

A step of a run of T steps on the uniform grid reveals a masked position with rho = 1/T at first. Older codes draw that
coin and the token jointly in float32 (`md4.samplers.joint`). For a flat and for a Zipf prediction (1/rank), V = 50257:

    formula   the law of joint draws whose uniforms are multiples of 2^-24, tests/md4/lattice.py
    measured  joint draws by torch's own generator, -log of `uniform_` in float32, no line of md4: the best token of
              each draw against all values that the class "stay masked" can draw
    exact     md4's default: the coin and the token apart, in float64

Whole runs: every position meets the steps' rho = 1/T, 1/(T-1) .. 1 until it is revealed; their token law is put
together from the formula's at powers of 2 and of sqrt(2), interpolated in log rho.

Writes results/float32_fault.json and results/float32_fault.png.
"""

import json
import math
import sys
import time
from datetime import UTC, datetime
from typing import Any

import torch
from torch import Tensor

from md4 import noise
from md4.samplers.draws import categorical
from tests.benchmarks.harness import RESULTS, machine
from tests.md4.lattice import entropy, lattice_law

V, BITS = 50257, 24
STEPS = [2**k for k in range(5, 13)]
FINE = [16.0, *map(float, STEPS[:3]), *(2 ** (k / 2) for k in range(16, 25))]  # of the formula, 16 .. 4096
ROWS = 5  # draws at a time: a megabyte of float32


def predictions() -> dict[str, Tensor]:
    """Laws `[V]` float64."""
    zipf = 1 / torch.arange(1, V + 1, dtype=torch.float64)
    return {"flat": torch.full((V,), 1 / V, dtype=torch.float64), "zipf": zipf / zipf.sum()}


def best_tokens(laws: dict[str, Tensor], draws: int) -> dict[str, tuple[Tensor, Tensor]]:
    """Of each of `draws` joint draws the best token's mu / E, float64 `[draws]`, and which one it is, `[draws]`.

    For rho = 2^-k the weight rho mu is mu but for the exponent, so that one set of draws serves all steps.
    """
    generator = torch.Generator().manual_seed(0)
    weights = {name: mu.float() for name, mu in laws.items()}
    found = {name: (torch.empty(draws), torch.empty(draws, dtype=torch.int64)) for name in laws}
    clocks, race = torch.empty(ROWS, V), torch.empty(ROWS, V)
    for start in range(0, draws, ROWS):
        clocks.uniform_(generator=generator).log_().neg_()
        for name, weight in weights.items():
            best, token = found[name]
            best[start : start + ROWS], token[start : start + ROWS] = torch.div(weight, clocks, out=race).max(dim=1)
    return {name: (best.double(), token) for name, (best, token) in found.items()}


def flips(best: Tensor, rho: float) -> Tensor:
    """Probability `[N]` that a token of rho * best [N] beats "stay": its uniform k 2^-24 is at most e^(-x)."""
    x = (1 - rho) / (rho * best)
    return (torch.floor(torch.exp(-x) * 2**BITS) + 1) / 2**BITS


def mean(values: Tensor, weights: Tensor | None = None) -> tuple[float, float]:
    """A (weighted) mean and its standard error."""
    weights = torch.ones_like(values) if weights is None else weights
    centre = (weights * values).sum() / weights.sum()
    error = ((weights * (values - centre)) ** 2).sum().sqrt() / weights.sum()
    return float(centre), float(error)


def whole_run(mu: Tensor, laws: dict[float, Tensor], steps: int) -> Tensor:
    """Law `[V]` of the tokens of a run; laws: of one draw, by 1 / rho, rising."""
    nodes = [1.0, *laws]
    table = torch.stack([mu, *(law[:-1] / law[:-1].sum() for law in laws.values())])
    ratio = torch.tensor([1.0, *((1 - float(law[-1])) * t for t, law in laws.items())], dtype=torch.float64)
    share, masked = torch.zeros(len(nodes), dtype=torch.float64), 1.0
    for left in range(steps, 0, -1):
        upper = min(next((i for i, t in enumerate(nodes) if t >= left), len(nodes) - 1), len(nodes) - 1)
        lower = max(upper - 1, 0)
        part = 0.0 if upper == lower else math.log(left / nodes[lower]) / math.log(nodes[upper] / nodes[lower])
        mix = torch.zeros_like(share).index_add_(
            0, torch.tensor([lower, upper]), torch.tensor([1 - part, part], dtype=torch.float64)
        )
        revealed = masked * (1.0 if left == 1 else float(mix @ ratio) / left)
        share, masked = share + revealed * mix, masked - revealed
    return share @ table


def measure(draws: int) -> dict[str, Any]:
    laws = predictions()
    began = time.perf_counter()
    best = best_tokens(laws, draws)
    print(f"{draws:,} joint draws: {time.perf_counter() - began:.0f} s", file=sys.stderr, flush=True)
    coins = noise.uniform(noise.key(0, "coins"), torch.arange(5_000_000))
    figures: dict[str, Any] = {"exact": {}}
    for steps in STEPS:
        share = float((coins < 1 / steps).double().mean())
        error = math.sqrt(share * (1 - share) / len(coins))
        figures["exact"][str(steps)] = {"flip_ratio": [share * steps, error * steps]}
    for name, mu in laws.items():
        formula = {t: lattice_law(mu, 1 / t, BITS) for t in FINE}
        keys = noise.derive(noise.key(0, "tokens"), torch.arange(4000))
        tokens = torch.cat([categorical(mu.log().expand(len(part), -1), part) for part in keys.split(100)])
        facts: dict[str, Any] = {
            "entropy": entropy(mu),
            "exact draws": {"entropy": list(mean(-mu[tokens].log())), "draws": len(tokens)},
            "formula": [],
            "measured": {},
        }
        for t, law in formula.items():
            one = {"steps": t, "flip_ratio": (1 - float(law[-1])) * t, "entropy": entropy(law[:-1] / law[:-1].sum())}
            if float(t).is_integer() and int(t) in STEPS:
                one["run_entropy"] = entropy(whole_run(mu, formula, int(t)))
            facts["formula"].append(one)
        for steps in STEPS:
            value, token = best[name]
            chance, law = flips(value, 1 / steps), formula[float(steps)]
            ratio, error = mean(chance)
            facts["measured"][str(steps)] = {
                "flip_ratio": [ratio * steps, error * steps],
                # The mean of -ln q, q the formula's law: its entropy if the draws follow it.
                "entropy": list(mean(-(law[token] / law[:-1].sum()).log(), chance)),
            }
        figures[name] = facts
    return figures


def draw(figures: dict[str, Any]) -> None:
    """The picture: flips over steps, and entropies over steps."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    from matplotlib.axes import Axes

    figure, panels = plt.subplots(1, 2, figsize=(12.5, 5.4), dpi=120, layout="constrained")
    left, right = panels[0], panels[1]
    assert isinstance(left, Axes)
    assert isinstance(right, Axes)
    colours = {"flat": "C3", "zipf": "C0"}
    titles = {"flat": "flat prediction", "zipf": "Zipf prediction (1/rank)"}

    def curve(axes: Axes, name: str, what: str, **style: Any) -> None:
        rows = [row for row in figures[name]["formula"] if row["steps"] >= STEPS[0] and what in row]
        axes.plot([row["steps"] for row in rows], [row[what] for row in rows], color=colours[name], **style)

    def points(axes: Axes, name: str, what: str, **style: Any) -> None:
        rows = figures[name]["measured"]
        values = [rows[str(steps)][what] for steps in STEPS]
        axes.errorbar(STEPS, [v for v, _ in values], yerr=[2 * e for _, e in values], color=colours[name], **style)

    marks = {"fmt": "o", "ms": 5, "capsize": 3, "lw": 1.2}
    exact = [figures["exact"][str(steps)]["flip_ratio"] for steps in STEPS]
    left.axhline(1, color="C2", lw=1.5)
    left.errorbar(
        STEPS, [v for v, _ in exact], yerr=[2 * e for _, e in exact], color="C2", **{**marks, "fmt": "s"},
        label="exact draws (float64), any prediction: measured",
    )  # fmt: skip
    for name in ("zipf", "flat"):
        curve(left, name, "flip_ratio", lw=1.5, label=f"joint float32, {titles[name]}: formula")
        points(left, name, "flip_ratio", **marks, label="    measured")
        ratio = next(r["flip_ratio"] for r in figures[name]["formula"] if r["steps"] == 1024)
        left.annotate(
            f"{ratio:.2f}", (1024, ratio), xytext=(9, 4), textcoords="offset points", color=colours[name], fontsize=11
        )
    left.set(ylabel="positions revealed / intended", ylim=(-0.03, 1.1))
    left.set_title("Too few positions are revealed in a step", fontsize=12)
    handles, labels = left.get_legend_handles_labels()
    order = [labels.index(text) for text in labels if "formula" in text]
    points_of = [i for i, text in enumerate(labels) if text.strip() == "measured"]
    exact_one = next(i for i, text in enumerate(labels) if text.startswith("exact"))
    order = [exact_one, *(i for pair in zip(order, points_of, strict=True) for i in pair)]
    left.legend([handles[i] for i in order], [labels[i] for i in order], frameon=False, fontsize=9, loc="lower left",
                title="bars: ± 2 standard errors", title_fontsize=9, alignment="left")  # fmt: skip

    zipf = figures["zipf"]
    value, error = zipf["exact draws"]["entropy"]
    right.axhline(
        zipf["entropy"], color="C2", lw=1.5, label="exact draws: the prediction's own entropy, any number of steps"
    )
    right.axhspan(
        value - 2 * error, value + 2 * error, color="C2", alpha=0.15, lw=0, label="    measured, ± 2 standard errors"
    )
    curve(right, "zipf", "run_entropy", lw=1.5, ls="--", label="joint float32, tokens of a whole run: formula")
    curve(right, "zipf", "entropy", lw=1.5, label="joint float32, tokens of the first step: formula")
    points(right, "zipf", "entropy", **marks, label="    measured, ± 2 standard errors")
    right.set(ylabel="entropy of the drawn tokens, nats", ylim=(4, 8.1))
    right.set_title("What is revealed comes from the head of the vocabulary (Zipf)", fontsize=12)
    right.legend(frameon=False, fontsize=9, loc="lower left")
    for axes in (left, right):
        axes.set_xscale("log", base=2)
        axes.set_xticks(STEPS, [f"{steps:,}" for steps in STEPS])
        axes.set_xlabel("steps of the run, T (a step should reveal 1/T of the positions)")
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25, lw=0.6)
    figure.suptitle(
        f"Joint draws in float32 reveal too few tokens, and too common ones; the finer the grid, the worse (V = {V:,})",
        fontsize=13.5,
    )
    figure.savefig(RESULTS / "float32_fault.png")
    plt.close(figure)


def main() -> None:
    draws = 1000 * (int(sys.argv[1]) if len(sys.argv) > 1 else 200)
    torch.set_num_threads(1)  # small tensors, and nothing is timed
    began = time.perf_counter()
    figures = measure(draws)
    report = {
        "benchmark": "float32_fault",
        "measured": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": f"python -m tests.benchmarks.bench_float32_fault {draws // 1000}",
        "seconds": round(time.perf_counter() - began),
        "machine": machine(),
        "draws": draws,
        "vocabulary": V,
        "bits": BITS,
        "figures": figures,
    }
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "float32_fault.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    draw(figures)
    for name in ("flat", "zipf"):
        formula = {row["steps"]: row for row in figures[name]["formula"]}
        for steps in STEPS:
            measured = figures[name]["measured"][str(steps)]
            flip, nats = measured["flip_ratio"], measured["entropy"]
            print(
                f"{name} {steps:5d} steps: revealed / intended {formula[steps]['flip_ratio']:.4f} by formula, "
                f"{flip[0]:.4f} +- {flip[1]:.4f} measured; "
                f"entropy {formula[steps]['entropy']:.3f}, {nats[0]:.3f} +- {nats[1]:.3f}; "
                f"whole run {formula[steps]['run_entropy']:.3f}; exact {figures[name]['entropy']:.3f}"
            )


if __name__ == "__main__":
    main()
