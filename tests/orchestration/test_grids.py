"""`md4 grid` on a real run and a real prepared set: what it finds, says and writes, and that it can be sampled with."""

import json
import sys

import pytest

from md4.errors import UserError
from md4.samplers.grids import GRIDS
from orchestration.cli import main
from orchestration.config import load
from orchestration.grids import GridReport, Search, run
from orchestration.runs import load_model
from orchestration.sampling import sample
from orchestration.sampling_settings import read_settings
from pipelines.prepare import prepare
from tests.orchestration.small_run import write_run

pytestmark = pytest.mark.ray


@pytest.fixture(scope="module")
def trained(ray_cluster, corpus, data_directory, tmp_path_factory):
    """A run's folder, and the data that it names."""
    data = ["data.source=text", f"data.path={corpus}", f"data.directory={data_directory}", "data.document_chars=1000"]
    path = write_run(tmp_path_factory.mktemp("runs"), *data)
    prepare(load_model(path).config.data, lambda _: None)
    return path


def test_a_grid_is_found_written_and_used(trained, monkeypatch, capsys):
    arguments = ["grid", str(trained), "--steps", "6", "--rows", "8", "--draws", "2", "--points", "16"]
    monkeypatch.setattr(sys, "argv", ["md4", *arguments])
    main()
    said = capsys.readouterr().out
    file = trained / "reports" / "grid-6-step-00000007-seed-0.json"
    report = GridReport.model_validate_json(file.read_text())
    assert (report.steps, report.rows, report.draws, len(report.times)) == (6, 8, 2, 7)
    assert report.found.searched <= min(report.uniform.searched, report.cosine.searched)
    assert report.below_uniform.bits == pytest.approx(report.uniform.checked - report.found.checked)
    assert report.below_cosine.bits == pytest.approx(report.cosine.checked - report.found.checked)
    for name in (*GRIDS, "found"):
        assert 0 < getattr(report, name).standard_error < 1
        assert f"{getattr(report, name).checked:.4f}" in said
    assert f"{report.found.checked:.4f}" in file.with_suffix(".md").read_text()

    command = said.strip().splitlines()[-1]
    assert command == f"next: md4 sample {trained} grid=searched steps=6"
    monkeypatch.setattr(sys, "argv", [*command.removeprefix("next: ").split(), "--seed", "3", "--json"])
    main()
    found = json.loads(capsys.readouterr().out)
    assert tuple(found["settings"]["grid"]) == report.times
    loaded = load_model(trained)
    settings = read_settings(loaded.config.sampling, [f"grid={list(report.times)}"])
    assert [one["text"] for one in found["samples"]] == [sample(loaded, seed=3, settings=settings).samples[0].text]


def test_the_same_seed_finds_the_same_grid(trained):
    wanted = Search(steps=(4,), rows=4, points=8, seed=5)
    first, again = (run(trained, wanted, lambda _: None)[0][0] for _ in range(2))
    assert first.times == again.times
    assert first.found == again.found


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        (Search(steps=(0,)), "steps is 0"),
        (Search(steps=(4,), points=0), "points is 0"),
        (Search(steps=(4,), rows=0), "rows is 0"),
        (Search(steps=(4,), draws=0), "rows and draws"),
    ],
)
def test_mistakes_are_named(trained, wanted, message):
    with pytest.raises(UserError, match=message):
        run(trained, wanted, lambda _: None)


def test_genmd4_has_no_such_grid(trained, tmp_path):
    data = load_model(trained).config.data
    given = [f"data.{name}={getattr(data, name)}" for name in ("source", "path", "directory", "document_chars")]
    other = write_run(tmp_path, *given, "model.objective=genmd4", "evaluation.estimator=continuous", "sampling={}")
    with pytest.raises(UserError, match="for models of objective md4 alone"):
        run(other, Search(steps=4), lambda _: None)
    assert load("pydocs-tiny").sampling.grid in GRIDS
