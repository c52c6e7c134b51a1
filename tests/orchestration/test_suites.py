"""Suites: what a file may say, and that the figures are those of the single commands, in the table once."""

import json
import math
import sys
from pathlib import Path

import numpy as np
import pytest

from md4 import weights
from md4.errors import UserError
from md4.model import build
from orchestration import evaluation, quality, results
from orchestration.cli import main
from orchestration.evaluation import Evaluation, ZeroShot
from orchestration.runs import Run, export, load_model
from orchestration.sampling import sample
from orchestration.suites.reports import SuiteReport
from orchestration.suites.run import Options, run
from orchestration.suites.settings import Suite, load, suite_names
from pipelines.manifest import PixelFacts
from tests.orchestration.small_run import LENGTH, disturbed, make_run, write_checkpoint, write_run
from tests.orchestration.test_evaluation import folder  # noqa: F401 - a fixture
from tests.orchestration.test_pictures import write_image_run
from tests.pipelines.small import some_rows, write_set
from tests.pipelines.small_judge import Features, write_features


def silent(_: str) -> None:
    pass


@pytest.fixture
def parts(tmp_path, folder):  # noqa: F811
    """A run, a suite of every kind for it, and a place for the table."""
    write_set(tmp_path / "set", [some_rows(24, LENGTH)], 8, split="validation")
    suite = Suite.model_validate(
        {
            "name": "nightly",
            "likelihood": [{"data": str(tmp_path / "set"), "rows": 12, "draws": 2}],
            "zero_shot": [{"data_set": "lambada", "data": str(folder), "draws": 2}],
            "quality": [{"count": 6, "seed": 3, "settings": {"steps": 8}}],
            "prompts": [{"count": 3, "seed": 5, "texts": ["the ____ of", {"text": "ab_", "answer": "abc"}]}],
        }
    )
    return write_run(tmp_path / "runs"), suite, tmp_path / "results"


def test_every_figure_is_that_of_its_own_command(parts, tmp_path, folder):  # noqa: F811
    path, suite, table = parts
    outcome = run(path, suite, table, say=silent)
    assert outcome.fresh
    assert outcome.results == results.read(table)
    found = {one.metric: one for one in outcome.results}
    assert {one.model for one in outcome.results} == {"small"}
    assert {(one.step, one.version, one.suite) for one in outcome.results} == {(7, None, "nightly")}

    (bound,) = evaluation.run(path, Evaluation(data=tmp_path / "set", rows=12, draws=2), silent)
    one = found["likelihood/set/validation"]
    assert (one.value, one.standard_error, one.unit) == (
        bound.bits_per_token,
        bound.standard_error,
        "bits per character",
    )
    assert (one.data_fingerprint, one.better, one.samples) == (bound.data_fingerprint, "lower", 12)

    foreign = Evaluation(data=folder, draws=2, zero_shot=ZeroShot(("lambada",)))
    (shown,) = evaluation.run(path, foreign, silent)
    one = found["zero_shot/lambada/md4/perplexity"]
    assert (one.value, one.standard_error) == (shown.perplexity, shown.perplexity_error)

    (samples,) = quality.run(path, quality.Wanted(settings={"steps": 8}, count=6, seed=3), silent).reports
    assert samples.text is not None
    assert found["quality/entropy"].value == samples.text.entropy
    assert found["quality/entropy"].standard_error == samples.text.entropy_error
    assert found["quality/distinct_2"].value == samples.text.distinct_2

    kept = results.contributions(table, outcome.attempt)
    assert kept.keys() == {name for name in found if not name.startswith("quality/distinct")}
    for metric, rows in kept.items():  # what single rows contributed gives the errors of the reports
        if rows.standard_error:  # not 0: of fillings that are all right, or all wrong
            assert rows.standard_error == pytest.approx(found[metric].standard_error, rel=1e-9)


def test_prompts_come_out_as_samples_do(parts):
    path, suite, table = parts
    outcome = run(path, suite, table, say=silent)
    assert outcome.report is not None
    fillings = outcome.report.fillings
    loaded = load_model(path)
    first = sample(loaded, prompts=["the ____ of"], count=3, length=len("the ____ of"), seed=5)
    assert [one.text for one in fillings[:3]] == [one.text for one in first.samples]
    assert [(one.seed, one.right) for one in fillings[:3]] == [(5, None), (6, None), (7, None)]
    assert all(one.text.startswith("ab") and one.right == (one.text == "abc") for one in fillings[3:])
    counts = [np.unique(list(one.text[4:8]), return_counts=True)[1] / 4 for one in fillings[:3]]
    assert [one.entropy for one in fillings[:3]] == pytest.approx([-float((p * np.log(p)).sum()) for p in counts])
    stored = json.loads(next((path / "reports").glob("suite-nightly-step-00000007-*.json")).read_text())
    assert SuiteReport.model_validate(stored).fillings == fillings
    assert "`the ____ of`" in next((path / "reports").glob("suite-*.md")).read_text()


def test_the_same_again_is_found_and_not_measured(parts):
    path, suite, table = parts
    first = run(path, suite, table, say=silent)
    said: list[str] = []
    second = run(path, suite, table, say=said.append)
    assert not second.fresh
    assert second.results == first.results
    assert first.attempt in said[-1]
    assert "already" in said[-1]
    third = run(path, suite, table, Options(again=True), say=silent)
    assert third.attempt == f"{first.attempt}-2"
    assert [one.value for one in third.results] == [one.value for one in first.results]
    assert len(results.read(table)) == 2 * len(first.results)
    other = suite.model_copy(update={"quality": ()})
    assert run(path, other, table, say=silent).fresh  # another suite is another evaluation
    described = suite.model_copy(update={"description": "in other words"})
    assert not run(path, described, table, say=silent).fresh


def test_two_checkpoints_are_compared_row_by_row(parts):
    """The newer weights are the older ones, disturbed: the error of the difference is far below that of the bounds."""
    path, suite, table = parts
    model = load_model(path).model
    write_checkpoint(Run(path), disturbed(model, 5, 0.005), 9)
    old, new = (run(path, suite, table, Options(step=step), silent).results for step in (7, 9))
    assert ({one.step for one in old}, {one.step for one in new}) == ({7}, {9})
    (a,), (b,) = ([one for one in found if one.metric.startswith("likelihood")] for found in (old, new))
    paired, alone = results.compare(b, a, table), results.compare(b, a)
    assert paired.paired
    assert paired.value == alone.value != 0
    assert paired.standard_error < alone.standard_error / 5
    with pytest.raises(UserError, match="no sound checkpoint of step 8; there are those of 7, 9"):
        run(path, suite, table, Options(step=8), silent)


def test_an_export_and_a_version_give_the_same_figures(parts, tmp_path):
    path, suite, table = parts
    version = tmp_path / "registry" / "words" / "versions" / "00003"
    export(path, tmp_path / "out", report=silent)
    export(path, version, report=silent)
    of_run, of_export, of_version = (run(one, suite, table, say=silent) for one in (path, tmp_path / "out", version))
    for outcome, name, number in ((of_export, "out", None), (of_version, "words", 3)):
        assert [one.value for one in outcome.results] == [one.value for one in of_run.results]
        assert [one.series for one in outcome.results] == [one.series for one in of_run.results]
        assert {(one.model, one.version, one.step) for one in outcome.results} == {(name, number, 7)}
    (named,) = {one.model for one in run(version, suite, table, Options(name="mine"), silent).results}
    assert named == "mine"


def test_a_run_in_s3(s3, parts):
    path, suite, table = parts
    there = make_run("s3://bucket/runs").place
    found = run(there, suite, "s3://bucket/results", say=silent)
    here = run(path, suite, table, say=silent)
    assert found.attempt == here.attempt  # the same weights, suite and data, wherever they are
    assert [one.value for one in found.results] == [one.value for one in here.results]
    assert f"reports/suite-nightly-step-00000007-{found.attempt}.md" in there.list()


def test_an_export_without_a_vocabulary_has_bounds_alone(parts, tmp_path):
    path, suite, table = parts
    config = Run(path).config.model
    weights.export(tmp_path / "out", disturbed(build(config), 0), config)
    bounds = suite.model_copy(update={"zero_shot": (), "quality": (), "prompts": ()})
    assert len(run(tmp_path / "out", bounds, table, say=silent).results) == 1
    with pytest.raises(UserError, match=r"suite nightly, quality\.0: .*doesn't say what the model's tokens are"):
        run(tmp_path / "out", suite.model_copy(update={"zero_shot": ()}), table, say=silent)


def test_images(tmp_path):
    """FID and KID, of the run and of its export."""
    path = write_image_run(tmp_path / "runs").path
    rows = np.random.default_rng(0).integers(0, 17, (12, 64)).astype(np.uint8)
    facts = PixelFacts(
        shape=(8, 8, 1), levels=17, classes=None, class_names=None, independent_bits=0, histogram_bits=0,
        converted={}, rejected={}, rejected_examples=[],
    )  # fmt: skip
    write_set(tmp_path / "set", [rows], 4, split="validation", vocabulary="pixels17", vocabulary_size=17, pixels=facts)
    network = write_features(tmp_path / "features.pt", Features(3), 3)
    suite = Suite.model_validate(
        {
            "name": "digits",
            "likelihood": [{"data": str(tmp_path / "set"), "rows": 4, "draws": 1}],
            "quality": [
                {"count": 4, "data": str(tmp_path / "set"), "features": str(network), "settings": {"steps": 2}}
            ],
        }
    )
    export(path, tmp_path / "out", report=silent)
    of_run, of_export = (run(one, suite, tmp_path / "t", say=silent).results for one in (path, tmp_path / "out"))
    assert [one.metric for one in of_run] == ["likelihood/set/validation", "quality/fid", "quality/kid"]
    assert of_run[0].unit == "bits per dimension"
    assert of_run[1].data_fingerprint == of_run[0].data_fingerprint
    assert [(one.value, one.series) for one in of_export] == [(one.value, one.series) for one in of_run]
    words = Suite.model_validate({"name": "digits", "prompts": [{"texts": ["a_"]}]})
    with pytest.raises(UserError, match=r"suite digits, prompts\.0: prompts are texts, and small makes images"):
        run(path, words, tmp_path / "t", say=silent)


def test_nothing_is_measured_if_a_part_cannot_be(parts, tmp_path):
    """A mistake in the last part is told before the first is begun; nothing is written."""
    path, suite, table = parts
    wrong = {**suite.model_dump(), "prompts": [{"count": 2, "texts": ["no hole here"]}]}
    with pytest.raises(UserError, match=r"suite nightly, prompts\.0: prompt 'no hole here': it has no hole to fill"):
        run(path, Suite.model_validate(wrong), table, say=silent)
    wrong = {**suite.model_dump(), "prompts": [{"count": 2, "texts": [{"text": "ab_", "answer": "abcd"}]}]}
    with pytest.raises(UserError, match=r"prompts\.0: prompt 'ab_': the answer 'abcd' can never come out: it has 4"):
        run(path, Suite.model_validate(wrong), table, say=silent)
    assert not table.exists()
    assert not (path / "reports").exists()


def test_two_figures_never_have_one_name(parts, tmp_path):
    """Names that are known only when the data are open: the second would take the rows of the first."""
    path, _, table = parts
    places = [str(tmp_path / "set"), str(tmp_path / "other" / "set")]
    write_set(tmp_path / "other" / "set", [some_rows(8, LENGTH, seed=1)], 8, split="validation")
    first, second = ({"data": place, "rows": 4, "draws": 1} for place in places)
    twice = Suite.model_validate({"name": "a", "likelihood": [first, second]})
    expected = r"suite a: likelihood\.0 and likelihood\.1 would both give likelihood/set/validation; .*`name: \.\.\.`"
    with pytest.raises(UserError, match=expected):
        run(path, twice, table, say=silent)
    apart = Suite.model_validate({"name": "a", "likelihood": [first, {**second, "name": "other"}]})
    outcome = run(path, apart, table, say=silent)
    kept = results.contributions(table, outcome.attempt)
    for one in outcome.results:
        assert kept[one.metric].standard_error == pytest.approx(one.standard_error, rel=1e-9)


def test_one_name_for_several_splits_and_protocols():
    tree = {
        "name": "a", "likelihood": [{"name": "short"}, {"name": "short", "split": "test"}],
        "zero_shot": [
            {"name": "p", "data_set": "ptb", "data": "d", "protocol": protocol} for protocol in ("md4", "mdlm")
        ],
    }  # fmt: skip
    assert len(Suite.model_validate(tree).likelihood) == 2


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("likelihood: [{rowz: 3}]", r"unknown key 'likelihood\.0\.rowz'; did you mean 'rows'\?"),
        ("likelyhood: [{rows: 3}]", r"unknown key 'likelyhood'; did you mean 'likelihood'\?"),
        ("likelihood: [{rows: 0}]", r"likelihood\.0\.rows=0: input should be greater than or equal to 1"),
        ("quality: [{settings: {stepz: 3}}]", r"unknown setting 'stepz'; did you mean 'steps'\?"),
        ("prompts: [{texts: [{txt: a}]}]", r"unknown key 'prompts\.0\.texts\.0\.txt'; did you mean 'text'\?"),
        ("prompts: [{count: 3}]", r"key 'prompts\.0\.texts' is missing"),
        ("prompts: [{count: 1, texts: [a_]}]", "at least 2 are needed for a standard error"),
        ("zero_shot: [{data_set: ptb}]", r"key 'zero_shot\.0\.data' is missing"),
        ("quality: [{}, {count: 4}]", "quality has two entries for no name: give them different names"),
        ("likelihood: [{}, {rows: 4}]", "two entries for the first set validation"),
        (
            "likelihood: {rows: 3}",
            r"likelihood is a list, each entry behind `- ` or all in \[\.\.\.\]; found a mapping",
        ),
        ("prompts: [{texts: a_}]", r"prompts\.0\.texts is a list, .*; found str"),
        ("description: nothing", "it measures nothing: give likelihood, zero_shot, quality or prompts"),
        ("- a", "a suite is a mapping of keys to values, found list"),
        ("likelihood: [", "line 1.*not valid YAML"),
    ],
)
def test_mistakes_in_a_suite_are_named(tmp_path, text, expected):
    file = tmp_path / "mine.yaml"
    file.write_text(text)
    with pytest.raises(UserError, match=expected) as caught:
        load(file)
    assert str(file) in str(caught.value)


def test_the_suites_of_the_package_are_sound():
    assert suite_names() == ["pydocs"]
    suite = load("pydocs")
    assert suite.name == "pydocs"
    assert all(getattr(suite, part) for part in ("likelihood", "quality", "prompts"))
    with pytest.raises(UserError, match=r"can't read the suite absent.*suites of the package: pydocs"):
        load("absent")


def test_places_are_absolute_for_another_process(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "judge").mkdir()
    tree = {
        "name": "a", "likelihood": [{"data": "set"}, {"data": "s3://bucket/set"}],
        "quality": [{"judge": "judge"}, {"name": "hub", "judge": "gpt2"}],
    }  # fmt: skip
    suite = Suite.model_validate(tree)
    whole = suite.absolute()
    assert [one.data for one in whole.likelihood] == [str(tmp_path / "set"), "s3://bucket/set"]
    assert [one.judge for one in whole.quality] == [str(tmp_path / "judge"), "gpt2"]
    assert whole.likelihood[0].name == suite.likelihood[0].name


def test_an_evaluation_is_the_same_however_its_places_are_written(tmp_path, monkeypatch):
    """By the files that are there, so that a training's own suite and the command's are one; names on the hub stay."""
    monkeypatch.chdir(tmp_path)
    for name in ("judge", "copy", "other"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "weights").write_bytes(name[:1].replace("c", "j").encode())
    (tmp_path / "net.pt").write_bytes(b"net")

    def content(judge: str) -> dict:
        tree = {
            "name": "a", "quality": [{"judge": judge}, {"name": "b", "features": "net.pt"}],
            "zero_shot": [{"data_set": "ptb", "data": "d", "tokenizer": judge}],
        }  # fmt: skip
        suite = Suite.model_validate(tree)
        assert suite.absolute().content() == suite.content()
        return suite.content()

    assert content("judge") == content("./judge") == content(str(tmp_path / "judge")) == content("copy")
    assert content("judge") != content("other")
    assert content("gpt2")["quality"][0]["judge"] == content("gpt2")["zero_shot"][0]["tokenizer"] == "gpt2"


def test_the_verb(parts, tmp_path, monkeypatch, capsys):
    path, suite, table = parts
    file = tmp_path / "nightly.yaml"
    file.write_text(json.dumps(suite.model_dump(exclude={"zero_shot"})))

    def md4(*arguments: object) -> None:
        monkeypatch.setattr(sys, "argv", ["md4", "evaluate", str(path), *map(str, arguments)])
        main()

    monkeypatch.setenv("MD4_RESULTS", str(table))
    md4("--suite", file)
    said = capsys.readouterr().out
    assert "likelihood/set/validation" in said
    assert f"figures to {table}" in said
    (attempt,) = {one.attempt for one in results.read(table)}
    assert all(math.isfinite(one.value) and Path(one.report or "").is_file() for one in results.read(table))
    md4("--suite", file)  # as a clock does it
    said = capsys.readouterr().out
    assert f"already ({attempt})" in said
    assert "likelihood/set/validation" in said
    with pytest.raises(SystemExit, match="2"):
        md4("--suite", file, "--rows", 3)
    assert "--rows is said in the suite: leave it out, or leave out --suite" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="2"):
        md4("--again")
    assert "--again is about suites: it needs --suite FILE" in capsys.readouterr().err
