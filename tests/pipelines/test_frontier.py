"""Reports on samples and the frontier: what they hold together, and what they show."""

from datetime import UTC, datetime
from typing import Any

import numpy as np
import pytest
from PIL import Image
from pydantic import ValidationError

from md4.errors import UserError
from pipelines.frontier import FrontierReport, Point, draw, frontier
from pipelines.judges import JudgeFacts, Scores
from pipelines.quality import TextQuality, measure
from pipelines.quality_reports import QualityReport
from pipelines.reports import Provenance, write

JUDGE = JudgeFacts(
    judge="tiny", judge_sha256="0" * 64, judge_window=16, judge_stride=8, judge_first_token="scored after <s>"
)


def text(perplexity: float, size: int) -> TextQuality:
    """Measures of texts of random tokens below `size`, so that entropy grows with it."""
    rows = np.random.default_rng(size).integers(0, size, (20, 30))
    tokens = np.full(20, 10)
    spread = np.random.default_rng(0).standard_normal(20)
    return measure(rows, size, Scores(tokens * np.log(perplexity) + spread, tokens))


def report(steps: int | None, temperature: float, quality: TextQuality, **changes: Any) -> QualityReport:
    settings = {"temperature": temperature, "grid": "cosine"} | ({} if steps is None else {"steps": steps})
    facts: dict[str, Any] = {
        "created": datetime(2026, 1, 2, tzinfo=UTC),
        "model": Provenance(run="small", step=7, weights_hash="ab"),
        "data_fingerprint": "cd", "split": "validation", "vocabulary": "text8", "seed": 3, "seconds": 1.5,
        "settings": settings, "draws": "exact", "samples": 20, "length": 30, "network_calls": 24,
        "calls_per_sample": 22.5, "sampling_seconds": 1.0, "references": 20, "text": quality,
        "data": text(20, 11), "judge": JUDGE, "digest": f"{steps}-{temperature}",
    }  # fmt: skip
    return QualityReport(**(facts | changes))


REPORTS = [
    report(steps, temperature, text(20 + 100 / steps + 300 * (temperature - 0.6), round(10 * temperature)))
    for steps in (8, 32)
    for temperature in (1.2, 0.8, 1.0)
]


def test_a_report_shows_samples_beside_data(tmp_path):
    files = write(REPORTS[1], tmp_path)
    assert files[0].name == "quality-validation-step-00000007-seed-3-8-steps-temperature-0.8-8-0.8.json"
    assert QualityReport.model_validate_json(files[0].read_text()) == REPORTS[1]
    shown = files[1].read_text()
    it, data = REPORTS[1].text, REPORTS[1].data
    assert it is not None
    assert data is not None
    assert (
        f"| perplexity under the judge | {it.perplexity:.4g} ± {it.perplexity_error:.2g} | {data.perplexity:.4g}"
        in shown
    )
    assert f"| entropy of the histogram, nats | {it.entropy:.4g} ± {it.entropy_error:.2g} | {data.entropy:.4g}" in shown
    assert f"| distinct 2-grams | {it.distinct_2:.2%} | {data.distinct_2:.2%} |" in shown
    for fact in ("| judge | tiny |", "| temperature | 0.8 |", "| draws | exact |", "| samples | 20 |"):
        assert fact in shown
    sentence = REPORTS[1].headline()
    assert f"Perplexity {it.perplexity:.2f}" in sentence
    assert f"entropy {it.entropy:.3f}" in sentence
    assert "20 samples, 8 steps, temperature 0.8" in sentence


def test_a_report_is_whole_or_not_made():
    bare = measure(np.array([[0, 1], [1, 1]]), 2)
    assert report(8, 1, bare, judge=None, data=None).headline().startswith("Entropy 0.347 +- 0.347 nats")
    for quality, judge in ((text(20, 5), None), (bare, JUDGE)):
        with pytest.raises(ValidationError, match="a perplexity stands with its judge"):
            report(8, 1, quality, judge=judge)
    with pytest.raises(ValidationError, match="on texts or on images"):
        report(8, 1, bare, judge=None, text=None)
    point = {"perplexity": 3.0, "perplexity_error": 0.1, "entropy": 1.0, "entropy_error": 0.1, "distinct_2": 0.5}
    assert Point(**point).temperature is None
    for missing in ("entropy", "entropy_error", "perplexity_error"):
        with pytest.raises(ValidationError):
            Point(**{name: value for name, value in point.items() if name != missing})


def test_the_frontier_is_a_table_of_all_points(tmp_path):
    found = frontier(REPORTS, "abcd", 12.0)
    assert [(point.steps, point.temperature) for point in found.points] == [
        (steps, temperature) for steps in (8, 32) for temperature in (0.8, 1.0, 1.2)
    ]
    assert found.settings == {"grid": "cosine"}  # what all share
    by_setting = {(it.settings["steps"], it.settings["temperature"]): it for it in REPORTS}
    for point in found.points:
        own = by_setting[point.steps, point.temperature]
        assert own.text is not None
        assert (point.perplexity, point.entropy) == (own.text.perplexity, own.text.entropy)
    files = write(found, tmp_path)
    assert files[1].name == "frontier-validation-step-00000007-seed-3-abcd.md"
    assert FrontierReport.model_validate_json(files[0].read_text()) == found
    shown = files[1].read_text()
    first = found.points[0]
    assert f"| 8 | 0.8 | 22.5 | {first.perplexity:.4g} ± {first.perplexity_error:.2g} | {first.entropy:.4f} ±" in shown
    assert "](frontier-validation-step-00000007-seed-3-abcd.png)" in shown
    assert found.data is not None
    assert f"| data | - | - | {found.data.perplexity:.4g} ± {found.data.perplexity_error:.2g} | " in shown
    nearest = min(found.points, key=lambda point: abs(point.entropy - found.data.entropy))  # type: ignore[union-attr]
    assert f"({nearest.steps} steps, temperature {nearest.temperature:g}; 20 samples each)" in found.headline()


def test_points_that_can_not_be_compared_are_refused():
    with pytest.raises(UserError, match="at least 2 settings"):
        frontier(REPORTS[:1], "x", 0)
    with pytest.raises(UserError, match=r"differ in \['samples'\]"):
        frontier([REPORTS[0], REPORTS[1].model_copy(update={"samples": 21})], "x", 0)
    other = REPORTS[1].model_copy(update={"judge": JUDGE.model_copy(update={"judge_sha256": "1" * 64})})
    with pytest.raises(UserError, match=r"differ in \['judge'\]"):
        frontier([REPORTS[0], other], "x", 0)


@pytest.mark.parametrize("plain", [False, True])
def test_the_picture(tmp_path, plain):
    """Lines and a star; also without data, and of a sampler without steps."""
    bare = [report(None, t, text(20 + t, 9), data=None) for t in (0.9, 1.0)]
    file = draw(frontier(bare if plain else REPORTS, "x", 0), tmp_path / "reports" / "frontier.png")
    pixels = np.asarray(Image.open(file).convert("RGB")).reshape(-1, 3).astype(int)
    red = np.abs(pixels - [214, 39, 40]).sum(1) < 30  # the star's colour
    assert bool(red.any()) is not plain
    assert [path.name for path in file.parent.iterdir()] == ["frontier.png"]
