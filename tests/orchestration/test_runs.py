"""Run folders: made once, resumed only as what they are, read with ordinary tools."""

import json

import pytest
import yaml

import md4
from md4.errors import UserError
from orchestration.config import load
from orchestration.evaluation import open_subject
from orchestration.runs import Run, export, load_model, rewind
from orchestration.sampling import sample
from tests.orchestration.small_run import write_run


def test_a_new_run_stores_its_configuration_and_is_never_shared(tiny):
    config = tiny("train.steps=3")
    run = Run.create(config)
    assert Run(run.path).config == config
    with pytest.raises(UserError, match="exists already: continue it with --resume"):
        Run.create(config)


def test_resuming_accepts_what_changes_nothing_and_refuses_the_rest(tiny):
    Run.create(tiny("train.steps=3"))
    said: list[str] = []
    run = Run.resume(tiny("train.steps=3", "train.workers=4", "evaluation.every=1"), said.append)
    assert run.config.train.workers == 4
    assert said == ["resuming with changed train.workers, evaluation.every"]
    with pytest.raises(UserError, match=r"optimizer\.learning_rate: the run has 0\.01, given is 0\.5"):
        Run.resume(tiny("train.steps=3", "optimizer.learning_rate=0.5"), said.append)
    assert Run(run.path).config.optimizer.learning_rate == 0.01


def test_what_is_not_a_run_is_named_beside_the_runs_there(tiny):
    run = Run.create(tiny("train.steps=3"))
    with pytest.raises(UserError, match=r"other is not a run's folder.*runs there: tiny"):
        Run(run.path.parent / "other")
    with pytest.raises(UserError, match="no sound checkpoint"):
        load_model(run.path)


def test_metrics_are_cut_back_to_a_step_and_a_torn_line_is_passed_over(tiny):
    run = Run.create(tiny("train.steps=3"))
    rows = [{"kind": "train", "step": step, "x": step} for step in range(1, 6)]
    run.metrics_file.write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"kind": "tra')
    assert run.metrics("train") == rows
    rewind(run.metrics_file, 3)
    assert run.metrics() == rows[:3]
    assert run.metrics_file.read_text().endswith("\n")


def test_an_exported_run_answers_as_the_run_does(tmp_path):
    path = write_run(tmp_path / "runs")
    folder = export(path, tmp_path / "export")
    loaded, run = md4.load(folder), load_model(path)
    tokens = loaded.sample(2, seed=5)
    report = sample(run, count=2, seed=5)
    assert loaded.text(tokens) == [one.text for one in report.samples]
    assert loaded.card.source == {"run": "small", "step": 7, "averaged": False, "weights_hash": run.weights_hash}
    with pytest.raises(UserError, match="exists already"):
        export(path, folder)


@pytest.mark.parametrize(("name", "called"), [("my model", "my-model"), (".größe_2", "gr-e_2"), ("模型", "exported")])
def test_an_exported_folder_may_have_any_name(tmp_path, name, called):
    """Its model can be sampled, by suites, too: what isn't allowed in the name of a run is left out."""
    folder = export(write_run(tmp_path / "runs"), tmp_path / name, report=lambda _: None)
    subject = open_subject(folder)
    assert subject.to_sample is not None
    assert (subject.to_sample().config.name, subject.provenance.run) == (called, name)


def test_progress_is_told_once_though_a_restart_cuts_the_metrics_back(tiny):
    from orchestration.train import _Follower

    run = Run.create(tiny("train.steps=9"))
    rows = [
        {"kind": "checkpoint", "step": n, "time": float(n), "path": f"step-{n}", "seconds": 0.1, "blocked": 0.0}
        for n in range(1, 6)
    ]
    run.metrics_file.write_text("".join(json.dumps(row) + "\n" for row in rows[:2]))
    said: list[str] = []
    follower = _Follower(run, run.config, said.append)
    follower._print_new()
    assert said == []  # of an earlier attempt
    with run.metrics_file.open("a") as file:
        file.write("".join(json.dumps(row) + "\n" for row in rows[2:]))
    follower._print_new()
    rewind(run.metrics_file, 3)
    with run.metrics_file.open("a") as file:
        file.write(json.dumps({**rows[3], "time": 7.0, "path": "again-4"}) + '\n{"kind": "torn')
    follower._print_new()
    assert [line.split("checkpoint ")[1].split()[0] for line in said] == ["step-3", "step-4", "step-5", "again-4"]


def test_the_sets_of_a_mixture_may_move_and_be_renamed_but_not_change(tmp_path):
    def config(*mixture: str):
        return load("pydocs-tiny", [f"runs={tmp_path}", *([f"data.mixture=[{', '.join(mixture)}]"] if mixture else [])])

    Run.create(config("{weight: 2}", "{source: text, path: a.txt}"))
    Run.resume(config("{weight: 2, name: docs}", "{source: text, path: a.txt, directory: elsewhere}"), print)
    for other in (
        config("{weight: 3}", "{source: text, path: a.txt}"),
        config("{weight: 2}", "{source: text, path: b.txt}"),
        config("{weight: 2}"),
        config(),
    ):
        with pytest.raises(UserError, match=r"can't be resumed with another configuration:\ndata\.mixture"):
            Run.resume(other, print)


def test_settings_that_there_are_no_more_are_passed_over_in_runs_that_have_them(tmp_path):
    path = write_run(tmp_path)
    file = path / "config.yaml"
    tree = yaml.safe_load(file.read_text())
    tree["serving"] |= {"max_batch_size": 16, "batch_wait_ms": 10.0, "max_rows": 64}
    file.write_text(yaml.safe_dump(tree))
    assert Run(path).config.serving.replicas == 1
    file.write_text(yaml.safe_dump(tree | {"serving": {"max_bach_size": 16}}))
    with pytest.raises(UserError, match=r"serving\.max_bach_size"):
        Run(path)
