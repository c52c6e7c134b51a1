"""Every backend takes the same rows and keeps them where its own tools find them."""

import json

import pytest

from orchestration.runs import Run
from orchestration.tracking import Trackers

ROWS = [
    {"kind": "train", "step": 1, "bits_per_token": 4.5, "gradient_norm": None},
    {"kind": "train", "step": 2, "bits_per_token": 4.25, "gradient_norm": 1.5},
    {"kind": "checkpoint", "step": 2, "path": "step-2", "seconds": 0.5, "blocked": 0.1},
]


@pytest.fixture
def run(tiny):
    return Run.create(tiny("train.steps=3", "tracking.tensorboard=true", "tracking.wandb=offline"))


def test_rows_reach_every_backend(run, monkeypatch):
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("WANDB_SERVICE", "that of a driver, which is not to be used")
    trackers = Trackers(run.config, run.path, first_step=0)
    for row in ROWS:
        trackers.log(row)
        assert json.loads(run.metrics_file.read_text().splitlines()[-1]) == row  # on the disk at once
    trackers.close()
    assert run.metrics() == ROWS

    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run.path / "tensorboard"))
    events.Reload()
    assert [(e.step, e.value) for e in events.Scalars("train/bits_per_token")] == [(1, 4.5), (2, 4.25)]
    assert [(e.step, e.value) for e in events.Scalars("train/gradient_norm")] == [(2, 1.5)]
    files = list((run.path / "wandb").glob("offline-run-*/run-*.wandb"))
    assert len(files) == 1
    assert files[0].stat().st_size > 0
