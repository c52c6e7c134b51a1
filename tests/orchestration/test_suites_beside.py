"""A suite beside a training: on its checkpoints, in a task of its own; the training neither waits nor fails for it."""

import json
from collections import Counter

import pytest

from md4.errors import UserError
from md4.model import build
from orchestration import checkpoints, holds, results
from orchestration.checkpoint_writer import Retention, retire
from orchestration.config import load, override, read_assignments
from orchestration.events import Events
from orchestration.runs import Run, add_metrics, rewind
from orchestration.suites import beside
from orchestration.suites.beside import Beside
from orchestration.train import check, train
from tests.orchestration.small_run import disturbed, make_run, write_checkpoint, write_run
from tests.pipelines.small import some_rows, write_set

SUITE = """
likelihood: [{rows: 8, draws: 2}]
quality: [{count: 4, settings: {steps: 4}}]
prompts: [{count: 2, settings: {steps: 4}, texts: [a_c]}]
"""


@pytest.fixture
def suite(tmp_path):
    file = tmp_path / "small.yaml"
    file.write_text(SUITE)
    return file


def names(run: Run) -> list[str]:
    return [folder.name for folder in checkpoints.committed_in(run.checkpoints)]


def write_model(run: Run, step: int) -> str:
    """A checkpoint of a step; returns the name of its folder."""
    write_checkpoint(run, disturbed(build(run.config.model), step), step)
    return f"step-{step:08d}-abcdef"


def test_what_is_held_is_not_retired(tmp_path):
    run = Run(write_run(tmp_path, step=1))
    for step in (2, 3, 4):
        write_model(run, step)
    holds.put(run.checkpoints, "step-00000002-abcdef")
    holds.put(run.checkpoints, "step-00000009-gone00")
    retire(run.checkpoints, Retention(last=1))
    assert names(run) == ["step-00000004-abcdef", "step-00000002-abcdef"]
    assert holds.names(run.checkpoints) == ["step-00000002-abcdef", "step-00000009-gone00"]
    holds.release(run.checkpoints, "step-00000002-abcdef")
    holds.release(run.checkpoints, "step-00000002-abcdef")
    retire(run.checkpoints, Retention(last=1))
    assert names(run) == ["step-00000004-abcdef"]


def test_rows_of_metrics_from_elsewhere(tmp_path):
    """Appended beside the workers' own, and cut back with them."""
    file = tmp_path / "metrics.jsonl"
    add_metrics(file, {"kind": "suite", "step": 2})
    add_metrics(file, {"kind": "suite", "step": 4})
    rewind(file, 3)
    assert [json.loads(line) for line in file.read_text().splitlines()] == [{"kind": "suite", "step": 2}]


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["evaluation.suite_every=5"], "suite_every=5 is about a suite: name one by evaluation.suite=FILE"),
        (["evaluation.suite=absent.yaml"], "can't read the suite absent.yaml"),
        (["evaluation.suite=pydocs", "evaluation.suite_pending=some"], "should be 'newest' or 'all'"),
    ],
)
def test_mistakes_are_told_before_anything_starts(tmp_path, overrides, expected):
    with pytest.raises(UserError, match=expected):
        check(load("pydocs-tiny", [f"runs={tmp_path}", f"data.directory={tmp_path}", *overrides]), False, print)


@pytest.mark.ray
@pytest.mark.usefixtures("ray_cluster")
class TestBeside:
    def test_a_run_with_a_suite(self, tiny, suite, tmp_path):
        """Every fifth step and the last; one checkpoint is kept, and none was retired too early. The table, the run's
        metrics and reports, its TensorBoard and its events tell the same."""
        config = tiny(
            "train.workers=1", "train.steps=12", "checkpoint.every=3", "checkpoint.keep=1", "evaluation.every=0",
            f"evaluation.suite={suite}", "evaluation.suite_every=5", "evaluation.suite_pending=all",
            f"evaluation.suite_results={tmp_path}/results", "tracking.tensorboard=true",
        )  # fmt: skip
        said: list[str] = []
        run = train(config, report=said.append).run
        # Checkpoints are at 3, 6, 9 and 12: the first after 5 is that of 6, the first after 10 that of 12.
        rows = run.metrics("suite")
        assert [row["step"] for row in rows] == [6, 12]
        found = results.read(tmp_path / "results", model="tiny")
        assert {one.step for one in found} == {6, 12}
        for row in rows:
            of_step = {one.metric: one for one in found if one.step == row["step"]}
            assert {"likelihood/text/validation", "quality/entropy", "prompts/entropy"} <= of_step.keys()
            for metric, one in of_step.items():
                assert (row[metric], row.get(f"{metric}/error")) == (one.value, one.standard_error)
            assert list((run.path / "reports").glob(f"suite-small-step-{row['step']:08d}-{row['attempt']}.json"))
        assert [row["step"] for row in run.metrics("train")] == list(range(1, 13))
        assert Counter(one["did"] for one in Events(run.path).read("suite")) == {"began": 2, "done": 2}
        assert holds.names(run.checkpoints) == []
        assert any("suite small: likelihood/text/validation" in line for line in said)
        assert list((run.path / "tensorboard" / "suite").iterdir())
        assert len(names(run)) <= 2  # the last, and the one that was released after it came

    def test_what_was_held_is_done_by_who_continues(self, suite, tmp_path):
        """Of two that wait, the newest alone, unless all are wanted; each is released; figures come once."""
        for pending, expected in (("newest", [9]), ("all", [8, 9])):
            run, driver = self.driver(tmp_path / pending, suite, f"evaluation.suite_pending={pending}")
            for step in (8, 9):
                holds.put(run.checkpoints, write_model(run, step))
            holds.put(run.checkpoints, "step-00000010-nevcom")  # not committed: nobody's turn
            with driver:
                driver.finish()
            assert [row["step"] for row in run.metrics("suite")] == expected
            assert {one.step for one in results.read(tmp_path / pending / "results")} == set(expected)
            assert holds.names(run.checkpoints) == ["step-00000010-nevcom"]
            passed = [one["step"] for one in Events(run.path).read("suite") if one["did"] == "passed over"]
            assert passed == ([8] if pending == "newest" else [])
        holds.put(run.checkpoints, "step-00000009-abcdef")
        with self.beside(run, suite) as again:
            again.finish()
        assert [row["step"] for row in run.metrics("suite")] == [8, 9]

    def test_a_run_in_s3(self, s3, suite, tmp_path):
        """Report, row and TensorBoard arrive there; the row when the workers have ended, whose the metrics are."""
        run, driver = self.driver("s3://bucket/here", suite, data=tmp_path)
        holds.put(run.checkpoints, "step-00000007-abcdef")
        with driver:
            driver.finish()
        assert [one["did"] for one in Events(run.place).read("suite")] == ["began", "done"]
        (row,) = run.metrics("suite")
        found = results.read("s3://bucket/here/results", model="small")
        assert row["likelihood/set/validation"] == found[0].value
        assert row["attempt"] == found[0].attempt
        names = list(run.place.list())
        assert f"reports/suite-small-step-00000007-{row['attempt']}.json" in names
        assert any(name.startswith("tensorboard/suite/events") for name in names)
        assert {one.report for one in found if one.report}  # urls
        assert all(str(one.report).startswith(f"{run.place}/reports/") for one in found)
        assert holds.names(run.checkpoints) == []

    def test_a_failure_is_told_and_no_more(self, suite, tmp_path):
        """A suite that the model can't serve: an event with the reason, no row; the next one may try again."""
        suite.write_text("likelihood: [{data: absent}]")
        run, driver = self.driver(tmp_path, suite)
        holds.put(run.checkpoints, "step-00000007-abcdef")
        with driver:
            driver.finish()
        assert [one["did"] for one in Events(run.path).read("suite")] == ["began", "failed"]
        assert "absent' is not a prepared set" in Events(run.path).read("suite")[-1]["reason"]
        assert run.metrics("suite") == []
        assert holds.names(run.checkpoints) == []

    def test_the_end_of_a_run_waits_no_longer_than_it_may(self, suite, tmp_path, monkeypatch):
        """A task for which there are never enough CPUs: given up, said, and the checkpoint is not held for ever."""
        monkeypatch.setattr(beside, "_LOOK_SECONDS", 0.05)
        said: list[str] = []
        run, driver = self.driver(
            tmp_path, suite, "evaluation.suite_cpus=999", "evaluation.suite_seconds=1", say=said.append
        )
        holds.put(run.checkpoints, "step-00000007-abcdef")
        with driver:
            driver.finish()
        assert any("not done" in line for line in said)
        assert run.metrics("suite") == []

    @staticmethod
    def beside(run: Run, suite, *overrides: str, say=lambda _: None) -> Beside:
        place = run.place.url.removesuffix("/runs/small") + "/results"
        settings = [f"evaluation.suite={suite}", f"evaluation.suite_results={place}", *overrides]
        return Beside(run, override(run.config, read_assignments(settings)), say)

    def driver(self, folder, suite, *overrides: str, say=lambda _: None, data=None) -> tuple[Run, Beside]:
        """A small run with a checkpoint at step 7, and what its driver does for the suite, on another set."""
        run = make_run(f"{folder}/runs")
        if "absent" not in suite.read_text():
            data = data or folder
            write_set(data / "set", [some_rows(12, 32)], 4, split="validation")
            suite.write_text(SUITE.replace("{rows: 8", f"{{data: {data}/set, rows: 8"))
        return run, self.beside(run, suite, *overrides, say=say)
