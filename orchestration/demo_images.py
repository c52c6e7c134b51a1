"""`make demo-images`: the line for pixels, from handwritten digits to new ones, in a few minutes on two cores.

    python -m orchestration.demo_images

Every phase is one `md4` command, shown before it runs; then comes the picture. At the end: a summary on the screen and
in `runs/demo-images/reports/summary.json`, the picture in `reports/story.png`, the loss curve in `reports/loss.png`.
"""

from pathlib import Path
from typing import Any

from orchestration.config import load
from orchestration.curves import draw_loss
from orchestration.phases import Demo, bits_before, newest_report
from orchestration.pictures import draw_story
from orchestration.runs import Run, load_model
from pipelines.config import prepared_path
from pipelines.manifest import Manifest, PixelFacts
from pipelines.shards import ShardSet

PRESET, RUN = "digits-tiny", Path("runs/demo-images")
SEED = 7


def main() -> None:
    demo = Demo(RUN)
    demo.keep_earlier()
    with demo.phase("prepare", "1. scikit-learn's handwritten digits become shards of pixels"):
        demo.md4("prepare", PRESET)
    with demo.phase("train", "2. two Ray Train workers learn from them with DeepSpeed ZeRO-2"):
        demo.md4("train", PRESET, f"name={RUN.name}")
    with demo.phase("evaluate", "3. how many bits does a pixel of unseen digits cost?"):
        demo.md4("evaluate", str(RUN), "--draws", "16")
    with demo.phase("sample", "4. the model draws"):
        demo.md4("sample", str(RUN), "--count", "20", "--seed", str(SEED))
    with demo.phase("picture", "5. real, noised, denoised in steps, new"):
        pixels = pixel_facts(Run(RUN))
        draw_pictures(Run(RUN), pixels)
    summary = summarise(demo, pixels)
    demo.finish(summary, describe(summary))


def pixel_facts(run: Run) -> PixelFacts:
    """What the manifest of the run's data says of its images."""
    pixels = Manifest.load(prepared_path(load(PRESET).data)).pixels
    assert pixels is not None, run.path
    return pixels


def draw_pictures(run: Run, pixels: PixelFacts) -> None:
    bits = newest_report(run)["bits_per_token"]
    entropy = {"pixels by themselves": pixels.independent_bits, "histogram": pixels.histogram_bits}
    draw_loss(run, run.reports / "loss.png", entropy)
    note = (
        f"{bits_before(run):.2f} bits per dimension before training, {bits:.2f} after; "
        f"{pixels.independent_bits:.2f} is the best for pixels by themselves. Blue: still hidden."
    )
    data = ShardSet(prepared_path(run.config.data), "validation")
    draw_story(load_model(run.path), data, run.reports / "story.png", seed=SEED, note=note)


def summarise(demo: Demo, pixels: PixelFacts) -> dict[str, Any]:
    """The facts of the demo, all read from what the run left behind."""
    run = Run(demo.run)
    return {
        "bits_per_dimension_before": bits_before(run),
        "bits_per_dimension_after": newest_report(run)["bits_per_token"],
        "independent_bits": pixels.independent_bits,
        "histogram_bits": pixels.histogram_bits,
        **demo.results(),
        "picture": str(run.reports / "story.png"),
    }


def describe(summary: dict[str, Any]) -> list[str]:
    """The summary as lines for a reader."""
    after, independent = summary["bits_per_dimension_after"], summary["independent_bits"]
    seconds = summary["seconds"]["train"]
    return [
        f"bits per dimension   {summary['bits_per_dimension_before']:.3f} before training, "
        f"{after:.3f} ± {summary['standard_error']:.3f} after (upper bound, unseen images)",
        f"for comparison       {independent:.3f} with each pixel predicted by itself, "
        f"{summary['histogram_bits']:.3f} from the histogram",
        f"                     {after - independent:+.3f} bits from the pixels by themselves: "
        f"{'below' if after < independent else 'NOT below'}",
        f"training             {summary['train_tokens_per_second']:,.0f} pixels/s, {seconds:.0f} s with start and stop",
        f"the picture          {summary['picture']}",
        f"everything is in     {RUN}/ (loss curve: {RUN}/reports/loss.png)",
        "",
        f"next: .venv/bin/md4 sample {RUN} --count 50",
        f"      .venv/bin/md4 train {PRESET} name=longer train.steps=4000",
        f"      .venv/bin/md4 train {PRESET} name=by-class model.classes=10 model.network.feature_dim=64",
        f"      .venv/bin/md4 train {PRESET} name=mine data.source=images data.path=FOLDER data.shape=[32,32,3] "
        "data.fit=crop",
    ]


if __name__ == "__main__":
    main()
