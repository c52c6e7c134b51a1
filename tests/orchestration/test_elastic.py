"""Runs whose machines come and go: a real cluster of several nodes, a driver of its own, real kills.

Whatever happens, the run ends with the rows of the undisturbed one, step by step, and its losses.
"""

import os
import signal
import subprocess
import time

import pytest

from md4.errors import UserError
from orchestration.policies import Budget, Preempted, causes
from orchestration.runs import Run
from orchestration.train import train
from tests.orchestration.nodes import Driver, nodes

STEPS = 100
SETTINGS = [
    "name=elastic", f"train.steps={STEPS}", "train.micro_batch=4", "train.workers=1..2", "train.max_restarts=2",
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

    def start(*overrides: str, options: tuple[str, ...] = ()) -> Driver:
        drivers.append(Driver(tiny(*SETTINGS, *overrides), cluster.address, *options))
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
