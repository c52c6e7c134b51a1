"""Pictures of a run, drawn from its `metrics.jsonl`."""

from collections.abc import Mapping
from pathlib import Path

from orchestration.runs import Run


def draw_loss(run: Run, path: Path, lines: Mapping[str, float] | None = None) -> Path:
    """Loss over steps as a PNG at `path`: training, evaluations with their standard errors, and reference `lines`
    (name -> bits per token)."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    train, evaluations = run.metrics("train"), run.metrics("evaluation")
    figure, axes = plt.subplots(figsize=(8, 4.8), dpi=120, layout="constrained")
    axes.plot(
        [row["step"] for row in train], [row["bits_per_token"] for row in train], lw=1, alpha=0.6, label="training loss"
    )
    if evaluations:
        axes.errorbar(
            [row["step"] for row in evaluations],
            [row["bits_per_token"] for row in evaluations],
            yerr=[2 * row["standard_error"] for row in evaluations],
            fmt="o-", capsize=3, color="C1", label="validation bound (EMA), ± 2 standard errors",
        )  # fmt: skip
    for name, bits in (lines or {}).items():
        axes.axhline(bits, color="0.5", lw=0.8, ls="--")
        axes.annotate(
            f"{name} {bits:.2f}",
            (1, bits),
            xycoords=("axes fraction", "data"),
            ha="right",
            va="bottom",
            fontsize=8,
            color="0.4",
        )
    unit = "bits per dimension" if run.config.data.has_images else "bits per token"
    axes.set(xlabel="step", ylabel=unit, title=f"{run.config.name}: negative ELBO")
    axes.margins(x=0.01)
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
    plt.close(figure)
    return path
