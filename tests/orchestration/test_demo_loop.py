"""The loop of `make demo-loop`: search, train, evaluate by the clock, promote by rule, serve, refuse, roll back."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta

import pytest
import yaml

from orchestration import cli, demo_loop, results
from orchestration.config import read_assignments
from orchestration.cron import Store
from orchestration.cron.service import SystemClock
from orchestration.demo_loop import MODEL, NAME, Loop, Sizes
from orchestration.phases import Demo
from orchestration.registry import Registry
from orchestration.serving import app, sources
from tests.nodes import ROOT
from tests.orchestration.conftest import tiny_settings
from tests.orchestration.jobs.conftest import cache, head, sender  # noqa: F401 - fixtures
from tests.orchestration.search.conftest import STEP_TOKENS

ROUND = 20  # steps


class Here(Demo):
    """Its commands are run in this process, its service on this process's Ray: all that is left out are imports."""

    def run_command(self, arguments: Sequence[str]) -> int:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, "argv", ["md4", *arguments])
            try:
                cli.main()
            except SystemExit as end:
                return int(end.code or 0)
        return 0

    @contextmanager
    def serving(self, *arguments: str) -> Iterator[str]:
        model, *settings = arguments
        tree = read_assignments([f"serving.{one}" for one in settings])["serving"]
        server = app.serve_run(model, sources.settings(model, {**tree, "port": 0}), registry="registry")
        try:
            yield server.url
        finally:
            server.stop()


@pytest.mark.ray
@pytest.mark.timeout(400)
def test_the_loop_with_two_trials(ray_cluster, sender, corpus, data_directory, tmp_path, monkeypatch):  # noqa: F811
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MD4_PLACE", str(tmp_path))
    monkeypatch.setattr(demo_loop, "wait_for_the_next_minute", lambda: advance(monkeypatch))
    write("space.yaml", {"space": {"optimizer.learning_rate": [1e-3, 1e-5]}, "search": {"algorithm": "grid"}})
    parts = {"rows": 64, "draws": 4}
    write("small.yaml", {"likelihood": [{"split": "validation", **parts}, {"split": "test", **parts}],
                         "quality": [{"count": 16, "settings": {"steps": 8}}]})  # fmt: skip
    own = [one for one in tiny_settings(corpus, data_directory, tmp_path) if not one.startswith(("name=", "runs="))]
    sizes = Sizes(
        settings=tuple(one for one in (*own, "train.workers=1") if not one.startswith("optimizer.learning_rate")),
        searches=(("asha", "space.yaml", "search.reduction=2", "search.concurrent=1"),),
        search=("search.rounds=2", f"search.budget={2 * ROUND * STEP_TOKENS}"),
        longer=(f"train.steps={6 * ROUND}",),
        suite=str(tmp_path / "small.yaml"),
        requests=16,
    )
    found = Loop(sizes, Here(tmp_path)).play()
    report = json.loads((tmp_path / "studies" / "loop-asha" / "report.json").read_text())
    assert [(one["trial"], one["state"], one["tokens"]) for one in report["trials"]] == [
        (0, "finished", 2 * ROUND * STEP_TOKENS),
        (1, "stopped", ROUND * STEP_TOKENS),  # with the CPU that it gave back the winner was trained
    ]
    check(found, sizes)


def advance(patch: pytest.MonkeyPatch) -> None:
    """The clock of `md4 cron run` is a minute ahead from now on."""
    patch.setattr(SystemClock, "now", lambda self: datetime.now(UTC) + timedelta(minutes=1))


def write(file: str, tree: dict) -> None:
    with open(file, "w") as out:
        yaml.safe_dump(tree, out)


def check(found: dict, sizes: Sizes) -> None:
    """What the loop leaves in the current folder, and says, is what is to come of it."""
    (record,) = (one for one in Store("cron").history("evaluation") if one.submission_id == found["job"])
    assert record.status == "succeeded"
    registry = Registry("registry")
    assert [one.number for one in registry.versions(MODEL)] == [1, 2, 3, 4]
    story = [(one.action, one.version) for one in registry.name(MODEL, NAME).history]
    assert story == [("promote", 1), ("candidate", 2), ("confirm", 2), ("candidate", 4), ("drop", 4)]
    assert registry.name(MODEL, NAME).version == 2
    # The job's figures are those that the rule read: of the winner's weights, better than version 1, and 3 is worse.
    bounds = {}
    for number in (1, 2, 3):
        weights = registry.version(MODEL, number).manifest.weights
        figures = (one for one in results.read("results") if one.weights_hash in weights)
        bounds[number] = {one.metric: one.value for one in figures if one.metric.startswith("likelihood/")}
    assert all(len(one) == 2 for one in bounds.values())
    assert all(bounds[2][metric] < bounds[1][metric] < bounds[3][metric] for metric in bounds[2])
    assert found["canary"]["2"] > 0
    assert set(found["rollback"]) == {"2"}
    assert sum(found["canary"].values()) + sum(found["rollback"].values()) == found["asked"]
    assert found["why"].startswith(("errors: ", "quality: "))


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_the_loop_in_full(tmp_path, monkeypatch):
    """`make demo-loop`: eight trials by each of two schedulers, every step a process of its own."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    for name in ("RAY_ADDRESS", "RAY_AUTH_MODE", "MD4_PLACE", "MD4_RESULTS", "MD4_REGISTRY"):
        environment.pop(name, None)
    subprocess.run([sys.executable, "-m", "orchestration.demo_loop"], cwd=tmp_path, env=environment, check=True)
    monkeypatch.chdir(tmp_path / "loop")
    with open("summary.json") as file:
        found = json.load(file)
    assert found["trials"] == 16
    check(found, Sizes())
