"""Searched time grids against the named ones, and the sampler frontier beside, on the demos of text and images.

    python -m tests.benchmarks.bench_grids [PRESET=RUN ...]     an hour on one core, most of it for the text

Trains `pydocs-tiny` and `digits-tiny`, or takes the runs given (the other preset's figures then stay as they are). For
each: grids of 8, 16, 32 (and 64) steps searched on half of the validation rows; the bounds (T-step negative ELBO, the
bound of ancestral sampling as run) of the uniform, the cosine and the searched grid on the other half, with the
standard error of their difference row by row; then samples of every sampler and grid, scored without any other model
(`orchestration/yardsticks.py`).

Asks that the searched grid's bound be below both others' by more than two standard errors at 8, 16 and 32 steps.
Writes results/grids.json and results/grids.png. No figure depends on time, nor on how busy the machine is.
"""

import json
import subprocess
import sys
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from orchestration.grids import GridReport, Search
from orchestration.sampler_frontier import Wanted, run
from pipelines.sampler_frontier import SamplerFrontier, draw_panels
from tests.benchmarks.harness import RESULTS, machine

ASKED = (8, 16, 32)
# The text's network sees the time, which takes many rows to account for; the digits have 170 validation rows, and what
# rows lack masks make up for.
PLANS = {
    "digits-tiny": Wanted(Search((*ASKED, 64), rows=85, draws=16), count=512),
    "pydocs-tiny": Wanted(Search(ASKED, rows=929, draws=4), count=192),
}


def trained(preset: str, folder: Path) -> Path:
    """A run of the preset, trained by `md4 train`."""
    command = [
        sys.executable,
        "-m",
        "orchestration",
        "train",
        preset,
        f"runs={folder}",
        f"data.directory={folder}/data",
    ]
    subprocess.run(command, check=True, stdout=sys.stderr)
    return folder / preset


def row(report: GridReport) -> dict[str, Any]:
    """The bounds of one number of steps, in bits per token."""
    gains = {f"below_{kind}": getattr(report, f"below_{kind}") for kind in ("uniform", "cosine")}
    bounds = {kind: getattr(report, kind) for kind in ("uniform", "cosine", "found")}
    return {
        "steps": report.steps,
        **{name: [bound.checked, bound.standard_error] for name, bound in bounds.items()},
        **{name: [gain.bits, gain.standard_error] for name, gain in gains.items()},
        "standard_errors": {name: gain.bits / gain.standard_error for name, gain in gains.items()},
        "times": report.times,
    }


def measure(run_folder: Path, plan: Wanted) -> dict[str, Any]:
    """The figures of one model."""
    began = time.perf_counter()
    frontier, found, _ = run(run_folder, plan, lambda text: print(text, file=sys.stderr, flush=True))
    rows = [row(report) for report, _ in found]
    reached = all(z > 2 for each in rows if each["steps"] in ASKED for z in each["standard_errors"].values())
    return {
        "measured": datetime.now(UTC).isoformat(timespec="seconds"),
        "seconds": round(time.perf_counter() - began),
        "machine": machine(),
        "rows": found[0][0].rows,
        "draws": found[0][0].draws,
        "points": found[0][0].points,
        "grids": rows,
        "below_both_by_two_errors": reached,
        "frontier": frontier.model_dump(mode="json"),
    }


def draw(frontiers: list[SamplerFrontier]) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    size = (13, 5.5 * len(frontiers) + 1)
    figure, panels = plt.subplots(
        len(frontiers), 2, figsize=size, dpi=110, layout="constrained", width_ratios=(1.5, 1), squeeze=False
    )
    for axes, frontier in zip(panels, frontiers, strict=True):
        draw_panels(frontier, *axes)
    handles, labels = panels[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", frameon=False, fontsize=9, ncols=5)
    figure.savefig(RESULTS / "grids.png")
    plt.close(figure)


def read_runs(arguments: list[str]) -> dict[str, Path]:
    """Preset and run of each argument."""
    pairs = [argument.partition("=") for argument in arguments]
    for preset, _, path in pairs:
        if preset not in PLANS or not path:
            sys.exit(f"{preset}={path} is not PRESET=RUN with one of the presets {', '.join(PLANS)}")
    return {preset: Path(path) for preset, _, path in pairs}


def main() -> None:
    torch.set_num_threads(1)  # small tensors, and nothing is timed
    given, file = read_runs(sys.argv[1:]), RESULTS / "grids.json"
    figures = json.loads(file.read_text(encoding="utf-8"))["figures"] if given and file.exists() else {}
    with tempfile.TemporaryDirectory() as folder:
        for preset in given or PLANS:
            figures[preset] = measure(given.get(preset) or trained(preset, Path(folder)), PLANS[preset])
            report = {"benchmark": "grids", "command": "python -m tests.benchmarks.bench_grids", "figures": figures}
            RESULTS.mkdir(exist_ok=True)
            file.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    frontiers = {preset: SamplerFrontier.model_validate(facts["frontier"]) for preset, facts in figures.items()}
    draw(list(frontiers.values()))
    for preset, facts in figures.items():
        print(f"{preset}: searched below both by two standard errors at {ASKED}: {facts['below_both_by_two_errors']}")
        for each in facts["grids"]:
            words = ", ".join(f"{z:.1f} errors {name.replace('_', ' ')}" for name, z in each["standard_errors"].items())
            bits, error = each["found"]
            print(f"  {each['steps']:3d} steps: {bits:.4f} ± {error:.4f} bits per token, {words}")
        print(f"  {frontiers[preset].headline()}")
    if not all(facts["below_both_by_two_errors"] for facts in figures.values()):
        sys.exit("the searched grid is not below both named ones by two standard errors everywhere")


if __name__ == "__main__":
    main()
