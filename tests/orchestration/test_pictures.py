"""Pictures of a run on images: what they show, on a real run's folder and a real prepared set."""

from collections import Counter

import numpy as np
import pytest
import torch
from PIL import Image

from md4.errors import UserError
from md4.model import build
from md4.samplers import Samples, SamplingConfig
from orchestration.config import load
from orchestration.pictures import HIDDEN, _frame, _one_of_each, draw_samples, draw_story, tiles
from orchestration.runs import Run, load_model
from orchestration.sampling import sample
from pipelines.prepare import prepare
from pipelines.shards import ShardSet
from tests.orchestration.small_run import disturbed, write_checkpoint, write_run


def test_tiles_go_from_black_to_white_and_hidden_is_blue():
    grey = tiles(np.array([[0, 16, 8, 17]]), (2, 2, 1), 17)
    assert grey.shape == (1, 2, 2, 3)
    assert grey.dtype == np.uint8
    assert grey[0].reshape(4, 3).tolist() == [[0] * 3, [255] * 3, [128] * 3, list(HIDDEN)]
    colour = tiles(np.array([[1, 2, 3, 256, 5, 256]]), (1, 2, 3), 256)
    assert colour[0, 0].tolist() == [[1, 2, 3], [HIDDEN[0], 5, HIDDEN[2]]]


def test_frames_reveal_in_the_order_of_the_sampler():
    """Events of one row; the second position was known from the start."""
    found = Samples(
        tokens=torch.tensor([[5, 6, 7, 8, 9]]),
        event=torch.tensor([[3, -1, 1, 1, 7]]),
        calls=torch.tensor([3]),
        row_draws=torch.tensor([4]),
        broken=torch.tensor([False]),
        settings=SamplingConfig(),
        network_calls=3,
        seconds=0.0,
    )
    assert _frame(found, 0.25, 10).tolist() == [[10, 6, 7, 8, 10]]
    assert _frame(found, 0.5, 10).tolist() == [[10, 6, 7, 8, 10]]
    assert _frame(found, 0.6, 10).tolist() == [[5, 6, 7, 8, 10]]
    assert _frame(found, 1.0, 10).tolist() == [[5, 6, 7, 8, 9]]


def write_image_run(folder, *overrides: str):
    config = load(
        "digits-tiny", [f"runs={folder}", "name=small", "model.network.layers=1", "sampling.steps=8", *overrides]
    )
    run = Run.create(config)
    write_checkpoint(run, disturbed(build(config.model), 0, 0.05), step=3)  # type: ignore[arg-type]
    return load_model(run.path)


@pytest.fixture(scope="module")
def digits(ray_cluster, data_directory):
    config = load("digits-tiny", [f"data.directory={data_directory}"])
    return ShardSet(prepare(config.data, lambda _: None), "validation")


@pytest.mark.ray
def test_one_of_each_class(digits):
    labels = digits.read_labelled(_one_of_each(digits, 10))[1]
    assert labels.tolist() == list(range(10))
    labels = digits.read_labelled(_one_of_each(digits, 25))[1]
    assert Counter(labels.tolist()) == {label: 3 if label < 5 else 2 for label in range(10)}


@pytest.mark.ray
@pytest.mark.parametrize("classes", [0, 10])
def test_a_story(digits, tmp_path, classes):
    loaded = write_image_run(tmp_path, f"model.classes={classes}", "model.network.feature_dim=64")
    path = draw_story(loaded, digits, tmp_path / "reports" / "story.png", columns=4, samples=2, note="a note")
    picture = np.asarray(Image.open(path).convert("RGB"))
    lines = (picture == HIDDEN).all(2).any(1)
    # Rows with hidden positions stand together: noised and partly denoised ones, then those from nothing.
    assert np.flatnonzero(np.diff(lines.astype(int)) == 1).size >= 7
    hidden = (picture == HIDDEN).all(2).mean()
    assert 0.05 < hidden < 0.6
    again = draw_story(loaded, digits, tmp_path / "again.png", columns=4, samples=2, note="a note")
    assert np.array_equal(picture, np.asarray(Image.open(again).convert("RGB")))


def test_samples_of_the_command_line_become_a_picture(tmp_path):
    loaded = write_image_run(tmp_path)
    report = sample(loaded, count=12, seed=1)
    path = draw_samples([one.text for one in report.samples], loaded, tmp_path / "samples.png", columns=5)
    picture = np.asarray(Image.open(path).convert("RGB"))
    assert not (picture == HIDDEN).all(2).any()
    assert ((picture == 0).all(2)).mean() > 0.01


def test_images_have_one_size(tmp_path):
    with pytest.raises(UserError, match="length is 10; this model makes images of 8 x 8 x 1: 64 tokens"):
        sample(write_image_run(tmp_path), length=10)


def test_text_has_no_pictures(tmp_path):
    loaded = load_model(write_run(tmp_path))
    with pytest.raises(UserError, match="models text8, not images"):
        draw_samples(["a b"], loaded, tmp_path / "a.png")
