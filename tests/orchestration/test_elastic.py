"""Runs whose machines come and go: a real cluster of several nodes, a driver of its own, real kills.

Whatever happens, the run ends with the rows of the undisturbed one, step by step, and its losses.
"""

import os
import signal
import time
from pathlib import Path

import pytest

from md4.errors import UserError
from orchestration.policies import Budget, Preempted, causes
from orchestration.runs import Run
from orchestration.train import train
from tests.nodes import nodes
from tests.orchestration.driver import Driver, wait_for
from tests.s3 import BUCKET

STEPS = 150
SETTINGS = [  # many small passes: steps so long that a node can join before the last
    "name=elastic", f"train.steps={STEPS}", "train.batch_size=64", "train.micro_batch=4", "train.workers=1..2",
    "train.max_restarts=2",
    # Not the others' 1e-2: there a difference of 1e-8, the same through both resizes, grew to 1e-3 after step 50.
    "optimizer.learning_rate=1e-3",
    "evaluation.every=0", "checkpoint.every=5", "checkpoint.keep=2",
]  # fmt: skip


@pytest.fixture(scope="module")
def cluster(ray_cluster):
    with nodes(1) as cluster:
        yield cluster


@pytest.fixture(scope="module")
def undisturbed(corpus, data_directory, tmp_path_factory, ray_cluster) -> Run:
    """One worker that nothing happens to."""
    from orchestration.config import load
    from tests.orchestration.conftest import tiny_settings

    overrides = tiny_settings(corpus, data_directory, tmp_path_factory.mktemp("runs"))
    return train(load("pydocs-tiny", [*overrides, *SETTINGS, "train.workers=1"]), report=print).run


@pytest.fixture
def drive(tiny, cluster):
    """`drive("key=value", ...)` -> Driver of the tiny run on the cluster."""
    drivers: list[Driver] = []

    def start(*overrides: str, options: tuple[str, ...] = (), home: Path | None = None) -> Driver:
        drivers.append(Driver(tiny(*SETTINGS, *overrides), cluster.address, *options, home=home))
        return drivers[-1]

    yield start
    for driver in drivers:
        driver.stop()


def assert_same(run: Run, expected: Run) -> None:
    """The same rows in every step, and the losses to 1e-5."""
    ours, theirs = run.metrics("train"), expected.metrics("train")
    assert [row["step"] for row in ours] == list(range(1, STEPS + 1))
    assert [row["ledger"] for row in ours] == [row["ledger"] for row in theirs]
    for one, two in zip(ours, theirs, strict=True):
        assert abs(one["bits_per_token"] - two["bits_per_token"]) <= 1e-5 * two["bits_per_token"]


def workers_since(driver: Driver, time: float) -> list[dict]:
    return [one for one in driver.events.read("workers") if one["time"] > time]


# -- policies, without Ray -------------------------------------------------------------------------------------------


def failed(*errors: Exception) -> Exception:
    """What Ray's controller makes of workers that raised these."""
    from ray.train.v2._internal.exceptions import UserExceptionWithTraceback
    from ray.train.v2.api.exceptions import WorkerGroupError

    wrapped = {rank: UserExceptionWithTraceback(error, "") for rank, error in enumerate(errors)}
    return WorkerGroupError("failed", wrapped)  # type: ignore[arg-type]


def commit(folder, step: int) -> None:
    attempt = folder / f"step-{step:08d}-abcdef"
    attempt.mkdir(parents=True)
    (attempt / "manifest.json").write_text("{}")


def test_restarts_are_counted_from_the_last_checkpoint_on(tmp_path):
    budget = Budget(str(tmp_path), str(tmp_path / "checkpoints"), max_restarts=2)
    decisions = [budget.make_decision(failed(RuntimeError("x"))).name for _ in range(3)]
    assert decisions == ["RETRY", "RETRY", "RAISE"]
    commit(tmp_path / "checkpoints", 5)
    assert [budget.make_decision(failed(RuntimeError("x"))).name for _ in range(3)] == ["RETRY", "RETRY", "RAISE"]


def test_preemption_costs_nothing_and_a_mistake_ends_a_run_at_once(tmp_path):
    budget = Budget(str(tmp_path), str(tmp_path / "checkpoints"), max_restarts=0)
    for _ in range(3):
        assert budget.make_decision(failed(Preempted("spot"), RuntimeError("connection reset"))).name == "RETRY"
    generous = Budget(str(tmp_path), str(tmp_path / "checkpoints"), max_restarts=9)
    error = failed(RuntimeError("connection reset"), UserError("another network"))
    assert generous.make_decision(error).name == "RAISE"
    assert [str(one) for one in causes(error) if isinstance(one, UserError)] == ["another network"]


# -- on a cluster ----------------------------------------------------------------------------------------------------


@pytest.mark.ray
@pytest.mark.timeout(600)
def test_a_run_grows_with_a_new_node_and_outlives_the_loss_of_one(drive, cluster, undisturbed):
    driver = drive()
    driver.wait_for_event("state", state="RUNNING")
    node = cluster.add()
    grown = driver.wait_for_event("workers", workers=2)
    assert driver.events.read("resize")[-1]["saved"]
    assert grown["lost"] == 0
    driver.wait_for_step(grown["step"] + 7)  # a checkpoint of two workers is committed
    killed = time.time()
    cluster.kill(node)
    run = driver.finish()
    shrunk = workers_since(driver, killed)
    assert [one["workers"] for one in shrunk] == [1]
    assert grown["step"] < shrunk[0]["step"] < STEPS
    assert_same(run, undisturbed)


@pytest.fixture
def second_node(cluster):
    """One more node, which may be lost in the test."""
    node = cluster.add()
    yield node
    cluster.kill(node)


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.timeout(900)
def test_a_killed_worker_is_replaced(drive, second_node, undisturbed):
    driver = drive("train.workers=2")
    driver.wait_for_step(12)
    os.kill(driver.workers()[1], signal.SIGKILL)
    run = driver.finish()
    assert [one["workers"] for one in driver.events.read("workers")] == [2, 2]
    assert [one["spent"] for one in driver.events.read("failure")] == [1]
    assert_same(run, undisturbed)


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.timeout(900)
def test_a_worker_that_hangs_is_named_within_a_minute_and_the_run_goes_on(drive, second_node, undisturbed):
    driver = drive("train.workers=2", "train.patience=10")
    driver.wait_for_step(12)
    stopped = time.time()
    os.kill(driver.workers()[1], signal.SIGSTOP)
    hang = driver.wait_for_event("hang", 60)
    assert hang["time"] - stopped < 60
    assert "worker 1" in hang["reason"]
    assert_same(driver.finish(), undisturbed)


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.timeout(900)
def test_a_notice_of_preemption_costs_no_step_and_no_restart(drive, cluster, second_node, undisturbed):
    driver = drive("checkpoint.every=0", "train.max_restarts=0")
    driver.wait_for_step(12)
    drained = time.time()
    cluster.drain(second_node, 60)
    run = driver.finish()
    assert driver.events.read("preempted")[0]["time"] - drained < 20
    after = workers_since(driver, drained)
    assert [(one["workers"], one["lost"]) for one in after] == [(1, 0)]
    assert_same(run, undisturbed)


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.timeout(900)
def test_a_killed_driver_is_resumed(drive, second_node, undisturbed):
    first = drive("train.workers=2")
    first.wait_for_step(12)
    first.stop()
    run = drive("train.workers=2", options=("--resume",)).finish()
    started = first.events.read("workers")
    assert [one["workers"] for one in started] == [2, 2]
    assert started[1]["step"] >= 10
    assert_same(run, undisturbed)


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.timeout(900)
def test_a_run_in_s3_moves_to_machines_that_share_nothing(drive, cluster, s3, tmp_path, undisturbed):
    """Driver and first worker on different machines, each with temporary files of its own; then all of them are lost,
    and others go on. A twentieth of the requests fail."""
    s3.fails(0.05, seed=1)
    runs = f"runs=s3://{BUCKET}/runs"
    for name in ("laptop", "a", "other laptop", "b"):
        (tmp_path / name).mkdir()
    cluster.ensure(0)
    node = cluster.add(TMPDIR=str(tmp_path / "a"))
    first = drive(runs, "train.workers=1", home=tmp_path / "laptop")
    first.wait_for_step(12)
    first.stop()
    cluster.kill(node)
    cluster.add(TMPDIR=str(tmp_path / "b"))
    second = drive(runs, "train.workers=1", options=("--resume",), home=tmp_path / "other laptop")
    run = second.finish()
    assert f"continuing {run.place} from step" in second.said
    assert_same(run, undisturbed)
    assert [one["bits_per_token"] for one in run.metrics("train")] == [
        one["bits_per_token"] for one in undisturbed.metrics("train")
    ]
    started = run.metrics("start")
    assert len(started) == len(second.events.read("workers")) == 2
    assert started[1]["step"] >= 10
    assert 0 <= second.events.read("workers")[1]["lost"] <= 40
    # Only the first worker's machines have something of the run, and nothing that others read.
    written = [
        sorted((tmp_path / name).glob("md4-runs-*/elastic-*/metrics.jsonl"))
        for name in ("a", "b", "laptop", "other laptop")
    ]
    assert [len(one) for one in written] == [1, 1, 0, 0]


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.timeout(900)
def test_a_run_that_gets_nowhere_is_given_up(drive, second_node):
    """Three kills, a checkpoint between none of them; two restarts are allowed."""
    driver = drive("train.workers=2", "checkpoint.every=0")
    for number in (1, 2, 3):
        wait_for(lambda number=number: len(driver.events.read("workers")) == number, 240, f"group {number}")
        driver.wait_for_step(1)
        os.kill(driver.workers()[0], signal.SIGKILL)
    assert driver.process.wait(200) == 2
    assert "training failed for good" in driver.said
    assert "--resume" in driver.said
