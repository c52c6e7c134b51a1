"""From a folder with weights to reports: runs and exported models, prepared sets and zero-shot sets, with actors."""

import json

import numpy as np
import pytest

from md4 import weights
from md4.errors import UserError
from md4.model import build
from orchestration.evaluation import Evaluation, ZeroShot, open_subject, run
from orchestration.runs import Run
from pipelines.config import prepared_path
from pipelines.reports import LikelihoodReport
from tests.orchestration.small_run import LENGTH, disturbed, write_run
from tests.orchestration.test_cli import md4
from tests.pipelines.small import some_rows, write_set

TEXTS = ["“Once upon a time,” she said, and there was a 2nd time.", "Short.", "The quick brown fox " * 6]


@pytest.fixture
def folder(tmp_path):
    """A folder of data with LAMBADA in it: three passages."""
    file = tmp_path / "data" / "lambada" / "lambada_test.jsonl"
    file.parent.mkdir(parents=True)
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS), encoding="utf-8")
    return tmp_path / "data"


def figures(report: LikelihoodReport) -> dict:
    return report.model_dump(exclude={"created", "seconds", "model"})


def test_a_run_and_its_export_give_the_same(tmp_path, folder):
    """The same weights: bit for bit the same numbers, under the name and the hash of each."""
    path = write_run(tmp_path / "runs")
    subject = open_subject(path)
    weights.export(tmp_path / "out", subject.model, Run(path).config.model, vocabulary="text8")
    wanted = Evaluation(data=folder, draws=2, zero_shot=ZeroShot(("lambada",)))
    said: list[str] = []
    (of_run,) = run(path, wanted, said.append)
    (of_export,) = run(tmp_path / "out", wanted, said.append)
    assert figures(of_run) == figures(of_export)
    assert (of_run.model.run, of_run.model.step, of_export.model.run) == ("small", 7, "out")
    assert of_export.model.weights_hash == json.loads((tmp_path / "out" / "config.json").read_text())["sha256"][:16]
    assert of_run.zero_shot is not None
    assert (of_run.zero_shot.data_set, of_run.zero_shot.protocol, of_run.window) == ("lambada", "md4", LENGTH)
    stored = path / "reports" / "likelihood-test-step-00000007-seed-0-lambada-md4.json"
    assert LikelihoodReport.model_validate_json(stored.read_text()) == of_run
    assert str(stored) in said[-2] + said[-1]


@pytest.mark.ray
def test_actors_load_the_run_and_give_the_same(tmp_path, folder, ray_cluster):
    """Two actors, each with the weights from the run's folder; bit for bit the numbers of one process."""
    path = write_run(tmp_path / "runs")
    wanted = {"data": folder, "draws": 2, "zero_shot": ZeroShot(("lambada",))}
    (alone,) = run(path, Evaluation(**wanted), print)
    (shared,) = run(path, Evaluation(**wanted, workers=2, batch_size=3), print)
    assert figures(shared) == figures(alone)
    assert shared.model == alone.model


def test_genmd4_gets_its_own_estimator(tmp_path, folder):
    """And whole windows: what doesn't fill one is left out, and the report says so."""
    path = write_run(tmp_path / "runs", "model.objective=genmd4", "evaluation.estimator=continuous")
    (report,) = run(path, Evaluation(data=folder, draws=1, zero_shot=ZeroShot(("lambada",))), print)
    assert report.estimator == "continuous, GenMD4"
    assert report.zero_shot is not None
    assert report.zero_shot.dropped_tokens == sum(map(len, encoded(TEXTS))) - report.tokens > 0


def encoded(texts: list[str]) -> list[np.ndarray]:
    from pipelines.vocabularies import Characters

    words = Characters()
    return words.encode_documents(words.normalise(text) for text in texts)


def test_another_prepared_set(tmp_path):
    """Its rows must be those of the model; timesteps alone choose the bound of discrete time."""
    path = write_run(tmp_path / "runs")
    write_set(tmp_path / "set", [some_rows(9, LENGTH)], 4, split="test")
    wanted = Evaluation(data=tmp_path / "set", split="test", rows=5, draws=1, timesteps=12)
    (report,) = run(path, wanted, print)
    assert (report.split, report.rows, report.rows_available, report.estimator) == ("test", 5, 9, "discrete, T = 12")
    write_set(tmp_path / "other", [some_rows(9, 8)], 4, split="test")
    with pytest.raises(UserError, match=f"rows of 8 tokens of a vocabulary of 27, the model rows of {LENGTH}"):
        list(run(path, Evaluation(data=tmp_path / "other", split="test"), print))


@pytest.fixture
def mixed(tmp_path):
    """A run on two sets, small and large, each with a validation split of its own."""
    sets = [{"name": name, "source": "text", "path": str(tmp_path / f"{name}.txt")} for name in ("small", "large/r")]
    path = write_run(tmp_path / "runs", f"data.directory={tmp_path}/sets", f"data.mixture={json.dumps(sets)}")
    for rows, (_, one) in zip((6, 9), Run(path).config.data.sets(), strict=True):
        write_set(prepared_path(one), [some_rows(rows, LENGTH, seed=rows)], 4, split="validation")
    return path


def test_every_set_of_a_mixture(mixed):
    """Each by its name, or all of them; the figures are those of the set named by its folder."""
    said: list[str] = []
    reports = list(run(mixed, Evaluation(draws=1, sets="all"), said.append))
    assert [(report.data_set, report.rows) for report in reports] == [("small", 6), ("large/r", 9)]
    files = {file.name for file in (mixed / "reports").glob("*.json")}
    stem = "likelihood-validation-step-00000007-seed-0-set"
    assert files == {f"{stem}-small.json", f"{stem}-large%2Fr.json"}
    assert "(large/r, mask_count, 9 rows" in reports[1].headline()
    for place, report in zip(Run(mixed).config.data.sets(), reports, strict=True):
        (alone,) = run(mixed, Evaluation(draws=1, data=str(prepared_path(place[1]))), said.append)
        assert figures(alone) == figures(report) | {"data_set": None}
    (named,) = run(mixed, Evaluation(draws=1, sets="large/r"), said.append)
    (first,) = run(mixed, Evaluation(draws=1), said.append)
    assert [figures(named), figures(first)] == [figures(reports[1]), figures(reports[0])]


def test_a_set_that_the_mixture_does_not_have(mixed, tmp_path):
    for wanted, expected in (
        (Evaluation(sets="larg"), "--set larg: the run's sets are called small, large/r; or say all"),
        (Evaluation(sets="small", data=tmp_path), "leave out --data and --zero-shot"),
    ):
        with pytest.raises(UserError, match=expected):
            list(run(mixed, wanted, print))
    done = md4("evaluate", str(mixed), "--set", "none", cwd=tmp_path)
    assert (done.returncode, "the run's sets are called small, large/r" in done.stderr) == (2, True)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--zero-shot", "lambada"], "--zero-shot needs --data"),
        (["--zero-shot", ",", "--data", "data"], "names no data set"),
        (["--zero-shot", "lamda", "--data", "data"], "known are lambada"),
        (["--zero-shot", "ptb", "--data", "data"], "no files of ptb"),
        (["--zero-shot", "lambada", "--data", "data", "--protocol", "mdlm"], "this vocabulary has none: use md4"),
        (["--zero-shot", "lambada", "--data", "data", "--tokenizer", "x"], "the model's vocabulary is text8"),
        (["--protocol", "mdlm"], "--protocol is about zero-shot data sets"),
        (["--data", "absent"], "not a prepared set"),
    ],
)
def test_mistakes_are_named(tmp_path, folder, arguments, expected):
    """By the verb, with exit code 2 (one of them through a real command line, for the time that takes)."""
    path = write_run(tmp_path / "runs")
    if arguments[0] == "--protocol":
        done = md4("evaluate", str(path), *arguments, cwd=tmp_path)
        assert (done.returncode, "Traceback" in done.stderr) == (2, False)
        assert expected in done.stderr
        return
    options = dict(zip(arguments[::2], arguments[1::2], strict=True))
    chosen = None
    if "--zero-shot" in options:
        names = tuple(name for name in options["--zero-shot"].split(",") if name)
        chosen = ZeroShot(names, options.get("--protocol", "md4"), tokenizer=options.get("--tokenizer"))
    data = tmp_path / options["--data"] if "--data" in options else None
    with pytest.raises(UserError, match=expected):
        list(run(path, Evaluation(data=data, zero_shot=chosen), print))


def test_an_exported_model_without_data_or_vocabulary(tmp_path, folder):
    config = Run(write_run(tmp_path / "runs")).config.model
    weights.export(tmp_path / "out", disturbed(build(config), 0), config)
    with pytest.raises(UserError, match="has no data of its own"):
        list(run(tmp_path / "out", Evaluation(), print))
    with pytest.raises(UserError, match="doesn't say what its vocabulary is"):
        list(run(tmp_path / "out", Evaluation(data=folder, zero_shot=ZeroShot(("lambada",))), print))


def test_the_verb(tmp_path, folder):
    path = write_run(tmp_path / "runs")
    done = md4("evaluate", str(path), "--zero-shot", "lambada", "--data", str(folder), "--draws", "1", "--rows", "3")
    assert done.returncode == 0, done.stderr
    assert "lambada test, protocol md4, mask_count, 3 rows, 1 draws each" in done.stdout
    assert "Perplexity at most" in done.stdout
