"""The pixel yardstick: the Fréchet distance against its definition by another root, and its error."""

import numpy as np
import pytest
import scipy.linalg

from md4.errors import UserError
from pipelines.pixel_moments import Moments, pixel_features


def test_the_distance_is_its_definition():
    draw = np.random.default_rng(0)
    one, other = draw.normal(size=(200, 5)), draw.normal(size=(150, 5)) @ draw.normal(size=(5, 5)) + 0.3
    found, error = Moments.of(one).distance(other)
    first, second = np.cov(one, rowvar=False), np.cov(other, rowvar=False)
    root = scipy.linalg.sqrtm(first @ second).real
    gap = one.mean(0) - other.mean(0)
    assert found == pytest.approx(gap @ gap + np.trace(first + second - 2 * root))
    assert 0 < error < found
    assert Moments.of(one).distance(one)[0] == pytest.approx(0, abs=1e-10)


def test_the_error_is_the_spread_of_repeated_draws():
    """Within a factor of 1.5 for 60 draws of 100 images."""
    draw = np.random.default_rng(1)
    real = Moments.of(draw.normal(size=(5000, 4)))
    found = np.array([real.distance(draw.normal(0.3, 1.2, size=(100, 4))) for _ in range(60)])
    assert found[:, 1].mean() == pytest.approx(found[:, 0].std(ddof=1), rel=0.5)


def test_pixels_are_what_they_are_and_large_images_are_averaged():
    images = np.random.default_rng(2).integers(0, 256, (3, 4, 2, 1)).astype(np.uint8)
    assert pixel_features(images) == pytest.approx(images.reshape(3, 8) / 255)
    large = np.arange(2 * 16 * 16 * 3).reshape(2, 16, 16, 3).astype(np.uint8)
    found = pixel_features(large)
    assert found.shape == (2, 8 * 8 * 3)
    assert found[1, 0] == pytest.approx(large[1, :2, :2, 0].mean() / 255)


def test_too_few_images_are_refused():
    with pytest.raises(UserError, match="at least 2 images"):
        Moments.of(np.zeros((1, 4)))
    with pytest.raises(UserError, match="at least 3 images"):
        Moments.of(np.eye(4)).distance(np.zeros((2, 4)))
