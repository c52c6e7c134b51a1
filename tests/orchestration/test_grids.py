"""`md4 grid` on a real run and a real prepared set: what it finds, says and writes, and that it can be sampled with."""

import json
import sys
from pathlib import Path

import pytest

import md4
from md4.errors import UserError
from md4.samplers import SamplingConfig, wording
from md4.samplers.grids import GRIDS
from orchestration import sampler_frontier
from orchestration.cli import main
from orchestration.grids import GridReport, Search, run
from orchestration.quality import Wanted, draw_rows
from orchestration.quality import run as quality
from orchestration.runs import export, load_model
from orchestration.sampling import Request, sample
from orchestration.sampling_settings import read_settings
from orchestration.yardsticks import yardstick
from pipelines.prepare import prepare
from pipelines.sampler_frontier import SamplerFrontier
from tests.orchestration.small_run import write_run

pytestmark = pytest.mark.ray


@pytest.fixture(scope="module")
def trained(ray_cluster, corpus, data_directory, tmp_path_factory):
    """A run's folder, and the data that it names."""
    data = ["data.source=text", f"data.path={corpus}", f"data.directory={data_directory}", "data.document_chars=1000"]
    path = write_run(tmp_path_factory.mktemp("runs"), *data)
    prepare(load_model(path).config.data, lambda _: None)
    return path


def md4_says(monkeypatch, capsys, *arguments: object) -> str:
    monkeypatch.setattr(sys, "argv", ["md4", *map(str, arguments)])
    main()
    return capsys.readouterr().out


def test_grids_are_found_kept_and_used_by_name(trained, tmp_path, monkeypatch, capsys):
    """Two numbers of steps at once; the same samples from the run and from its export, by name and by the times."""
    said = md4_says(
        monkeypatch, capsys, "grid", trained, "--steps", "6,3", "--rows", 8, "--draws", 2, "--points", 16
    )  # fmt: skip
    reports = {}
    for steps in (6, 3):
        file = trained / "reports" / f"grid-{steps}-step-00000007-seed-0.json"
        report = reports[steps] = GridReport.model_validate_json(file.read_text())
        assert (report.steps, report.rows, report.draws, len(report.times)) == (steps, 8, 2, steps + 1)
        assert report.found.searched <= min(report.uniform.searched, report.cosine.searched)
        assert report.below_uniform.bits == pytest.approx(report.uniform.checked - report.found.checked)
        assert report.below_cosine.bits == pytest.approx(report.cosine.checked - report.found.checked)
        for name in (*GRIDS, "found"):
            assert 0 < getattr(report, name).standard_error < 1
            assert f"{getattr(report, name).checked:.4f}" in said
        assert f"{report.found.checked:.4f}" in file.with_suffix(".md").read_text()
        assert f"next: md4 sample {trained} grid=searched steps={steps}" in said

    asked = ("grid=searched", "steps=6", "--seed", 3)
    found = json.loads(md4_says(monkeypatch, capsys, "sample", trained, *asked, "--json"))
    assert tuple(found["settings"]["grid"]) == reports[6].times
    loaded = load_model(trained)
    settings = read_settings(loaded.config.sampling, [f"grid={list(reports[6].times)}"])
    text = sample(loaded, seed=3, settings=settings).samples[0].text
    assert [one["text"] for one in found["samples"]] == [text]
    file = trained / "reports" / "grid-6-step-00000007-seed-0.json"
    assert read_settings(loaded.config.sampling, [f"grid={file}"]).grid == reports[6].times
    (answer,) = quality(trained, Wanted(settings={"grid": "searched", "steps": 3}, count=4), lambda _: None).reports
    assert tuple(answer.settings["grid"]) == reports[3].times

    exported = md4.load(export(trained, tmp_path / "model", report=lambda _: None))
    assert exported.text(exported.sample(1, seed=3, grid="searched", steps=6)) == [text]
    with pytest.raises(UserError, match="steps=5 is not kept with this model; there is searched for steps=3, 6"):
        exported.sample(1, grid="searched", steps=5)


def test_a_grid_has_a_name_of_its_own(trained):
    wanted = Search(steps=(2,), rows=4, points=8, name="searched-rough")
    ((report, file),) = run(trained, wanted, lambda _: None)
    assert Path(file).name == "grid-rough-2-step-00000007-seed-0.json"
    kept = load_model(trained).model.saved
    assert kept is not None
    assert kept.named["searched-rough"][2].grid == report.times
    with pytest.raises(UserError, match="the name of a grid is 'cosine'"):
        run(trained, Search(steps=(2,), name="cosine"), lambda _: None)


def test_the_frontier_names_the_best_and_keeps_it(trained, monkeypatch, capsys):
    """Two samplers at two numbers of calls: files, marks, and the winner by name, in the run and over the library."""
    said = md4_says(
        monkeypatch, capsys, "grid", trained, "top_p=0.9", "--frontier", "--steps", "3,6", "--rows", 4, "--points", 8,
        "--samplers", "ancestral,first_hitting", "--count", 12, "--save", "--seed", 2,
    )  # fmt: skip
    (file,) = (trained / "reports").glob("sampler-frontier-*.json")
    report = SamplerFrontier.model_validate_json(file.read_text())
    assert file.with_suffix(".png").read_bytes()[:4] == b"\x89PNG"
    assert len(report.points) == 2 * (3 + 2)
    assert {point.settings["sampler"] for point in report.points} == {"ancestral", "first_hitting"}
    for point in report.points:
        assert point.calls.value <= point.settings["steps"] + 0.5
        assert 0 < point.score.value <= 1
        assert set(point.figures) == {"trigram perplexity", "entropy, nats"}
    assert [winner.calls for winner in report.winners] == [3, 6]
    assert [gain.below for gain in report.gains] == ["uniform", "uniform", "cosine", "cosine"]
    loaded = load_model(trained)
    measure = yardstick(loaded, "validation", 12, say=lambda _: None)
    for winner in report.winners:
        least = min(p.score.value for p in report.points if p.calls.value <= winner.calls + 0.5)
        assert winner.score.value == least
        settings = wording.change(SamplingConfig(), winner.settings)
        request = Request(count=12, seed=2 + 12, settings=settings)  # behind the seeds that the choice saw
        assert measure(draw_rows(loaded, request, None, 5).tokens)[0] == winner.again
        assert winner.kept == f"grids/best-{winner.calls}.json"
        found = json.loads(
            md4_says(monkeypatch, capsys, "sample", trained, "sampler=best", f"steps={winner.calls}", "--json")
        )
        assert found["settings"]["sampler"] == winner.settings["sampler"]
        assert found["settings"]["top_p"] == 0.9
    assert report.points[0].title in file.with_suffix(".md").read_text()
    assert f"next: md4 sample {trained} sampler=best steps=3" in said


def test_the_bound_beside_a_point_is_that_of_its_grid(trained):
    wanted = Search(steps=(3,), rows=4, points=8)
    trial = sampler_frontier.Wanted(wanted, samplers=("ancestral",), count=4)
    report, ((grid, _),), _ = sampler_frontier.run(trained, trial, lambda _: None)
    bounds = {point.settings["grid"]: point.bound for point in report.points}
    expected = {"uniform": grid.uniform, "cosine": grid.cosine, "searched": grid.found}
    assert {kind: bound.value for kind, bound in bounds.items() if bound} == {k: b.checked for k, b in expected.items()}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--count", "8"], "--count is about samples: it needs --frontier"),
        (["--save"], "--save is about samples: it needs --frontier"),
        (["top_p=0.9"], "top_p=0.9 is a setting of samplers: it needs --frontier"),
        (["--frontier", "eta=1"], "eta is no setting of all samplers; allowed beside --frontier: temperature, top_p"),
        (["--frontier", "top_p=2"], "top_p=2"),
        (["--frontier", "--samplers", "thinning"], "sampler=thinning is not for models of objective md4; allowed: anc"),
        (["--frontier", "--count", "3"], "count is 3; at least 4"),
        (["--frontier", "--features", "x.pt"], "makes text: --features is about images"),
        (["--steps", "8,x"], "--steps: 'x' is not a whole number"),
        (["--steps", "8,8"], "--steps=8,8 names a value twice"),
        (["--steps", "0"], "steps is 0"),
        (["--name", "best"], "the name of a grid is 'best'"),
    ],
)
def test_mistakes_end_in_one_line(trained, monkeypatch, capsys, arguments, message):
    monkeypatch.setattr(sys, "argv", ["md4", "grid", str(trained), *arguments])
    with pytest.raises(SystemExit) as left:
        main()
    said = capsys.readouterr().err
    assert left.value.code == 2
    assert message in said
    assert said.count("\n") == 1


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


def test_genmd4_has_grids_too(trained, tmp_path):
    data = load_model(trained).config.data
    given = [f"data.{name}={getattr(data, name)}" for name in ("source", "path", "directory", "document_chars")]
    other = write_run(tmp_path, *given, "model.objective=genmd4", "evaluation.estimator=continuous", "sampling={}")
    ((report, _),) = run(other, Search(steps=(4,), rows=4, draws=2, points=8), lambda _: None)
    assert report.found.searched <= min(report.uniform.searched, report.cosine.searched)
    loaded = load_model(other)
    settings = read_settings(loaded.config.sampling, ["sampler=ancestral", "grid=searched", "steps=4"])
    assert sample(loaded, seed=0, settings=settings).settings.grid == report.times
    trial = sampler_frontier.Wanted(Search(steps=(4,), rows=4, points=8), samplers=("ancestral", "p2"), count=4)
    assert len(sampler_frontier.run(other, trial, lambda _: None)[0].points) == 4
