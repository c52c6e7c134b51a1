"""The whole way: runs measured by a suite, added, and promoted by what was found."""

from pathlib import Path

import pytest

from md4.model import build
from orchestration.registry import Registry, promotion
from orchestration.registry.promotion import Wanted
from orchestration.runs import Run
from orchestration.suites.run import run as measure
from orchestration.suites.settings import Suite
from pipelines.storage import Folder
from tests.orchestration.small_run import LENGTH, disturbed, write_checkpoint, write_run
from tests.pipelines.small import some_rows, write_set

RULES = b"{name: production, require: [{metric: 'likelihood/*', better_by: 2}]}"


@pytest.fixture
def suite(tmp_path) -> Suite:
    write_set(tmp_path / "set", [some_rows(24, LENGTH)], 8, split="validation")
    asked = {"name": "nightly", "likelihood": [{"data": str(tmp_path / "set"), "rows": 24, "draws": 2}]}
    return Suite.model_validate(asked)


def trained(folder: Path, scale: float, seed: int) -> Path:
    """A run whose newest weights are so much noise: the less, the better they predict random rows."""
    path = write_run(folder)
    run = Run(path)
    write_checkpoint(run, disturbed(build(run.config.model), seed, scale), step=8)
    return path


def test_by_what_a_suite_found(tmp_path, suite):
    registry, table = Registry(tmp_path / "registry"), Folder(tmp_path / "results")
    for number, scale in enumerate((0.3, 0.05, 0.6), 1):
        run = trained(tmp_path / f"runs-{number}", scale, number)
        if number < 3:
            measure(run, suite, table, say=lambda text: None)
        version = registry.add("small", run, results=table)
        assert version.lineage.step == 8
        if number == 3:  # measured as a version, later
            assert "evaluation/results.json" not in version.manifest.files
            measure(version.fetch(), suite, table, say=lambda text: None)
    registry.folder.write("rules.yaml", RULES)

    def promote(number: int, place: Folder = table) -> promotion.Decision:
        return promotion.promote(registry, Wanted(registry.version("small", number), "production"), place)

    assert promote(1).changed  # the first
    better, worse = promote(2), promote(3)
    assert better.changed
    assert not worse.allowed
    for decision, sign in ((better, -1), (worse, 1)):
        (finding,) = decision.verdicts[0].findings
        assert finding.difference is not None
        assert finding.difference.paired  # the same rows with the same seeds
        assert finding.difference.value * sign > 0
    registry.rollback("small", "production", "tried without the table")
    (again,) = promotion.promote(
        registry,
        Wanted(registry.version("small", 2), "production", why="the figures that it was added with", force=True),
        Folder(tmp_path / "lost"),
    ).verdicts
    assert again.met
    assert again.findings[0].difference is not None
    assert not again.findings[0].difference.paired
