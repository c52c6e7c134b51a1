"""Images and their classes through a real Ray Train and DeepSpeed: the same pipeline as for text."""

import numpy as np
import pytest

from md4.errors import UserError
from md4.model import build
from orchestration.config import load
from orchestration.runs import Run, load_model
from orchestration.train import train
from tests.shared import shared

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_cluster")]

CLASSES = ["model.classes=10", "model.label_dropout=0.2", "model.network.layers=1", "model.network.feature_dim=64"]


def digits(data_directory, runs, *overrides: str):
    return load(
        "digits-tiny",
        [
            f"runs={runs}", f"data.directory={data_directory}", "name=digits", "train.steps=25", "train.batch_size=16",
            "train.log_every=1", "train.precision=float32", "train.max_restarts=0", "optimizer.warmup=5",
            "optimizer.ema=0.8", "evaluation.every=25", "evaluation.rows=40", "evaluation.draws=2",
            "tracking.tensorboard=false", *overrides,
        ],
    )  # fmt: skip


def losses(run: Run) -> list[float]:
    return [row["bits_per_token"] for row in run.metrics("train")]


def test_labelled_images_train(data_directory, tmp_path):
    """With 25 steps a class-conditional model gets from log2(17) bits per dimension to about the histogram's 2.97."""
    said: list[str] = []
    run = train(
        digits(data_directory, tmp_path, *CLASSES, "train.workers=1", "optimizer.weight_decay=0"), report=said.append
    ).run
    before, after = (row["bits_per_token"] for row in run.metrics("evaluation"))
    assert before == pytest.approx(np.log2(17), abs=1e-3)
    assert np.mean(losses(run)[-5:]) < 3.2
    assert after < before - 0.5
    assert any("bits/dim" in line for line in said)

    # Every class has been seen: without weight decay only a gradient moves its row of the table.
    name = "network.conditioning.class_embed.weight"
    start = build(run.config.model, seed=run.config.seed).state_dict()[name]
    moved = load_model(run.path).model.state_dict()[name] - start
    assert moved.shape == (10, 64)
    assert moved.abs().amax(1).min() > 1e-5


def test_classes_need_labels(data_directory, tmp_path):
    config = digits(data_directory, tmp_path, "model.classes=3", "model.network.feature_dim=64")
    with pytest.raises(UserError, match=r"model\.classes=3, but the data in .* have 10 classes"):
        train(config, report=lambda _: None)


@pytest.mark.slow
def test_classes_are_the_same_on_two_workers(data_directory, tmp_path):
    """Classes, and which of them are hidden, are functions of the step and the slot, not of the layout."""
    one = train(digits(data_directory, tmp_path / "one", *CLASSES, "train.workers=1"), report=print).run
    two = train(digits(data_directory, tmp_path / "two", *CLASSES, "train.workers=2"), report=print).run
    assert losses(one) == pytest.approx(losses(two), abs=2e-3)


@pytest.mark.slow
def test_mnist_trains(data_directory, tmp_path):
    """Some steps on the real MNIST get below its histogram's entropy."""
    overrides = [
        "data.source=idx", f"data.path={shared('data', 'mnist')}", "data.validation=0.05", "data.test=0",
        "train.workers=2", "train.steps=40", "train.batch_size=16", "model.network.layers=1",
        "model.network.time_input=true", "evaluation.every=40", "optimizer.learning_rate=4e-3",
    ]  # fmt: skip
    run = train(digits(data_directory, tmp_path, *overrides), report=print).run
    before, after = (row["bits_per_token"] for row in run.metrics("evaluation"))
    assert before == pytest.approx(8, abs=1e-3)
    assert after < before - 2
    assert np.mean(losses(run)[-5:]) < 2.5
