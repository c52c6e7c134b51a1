"""FID and KID against their definitions, on a small network; what networks and numbers are refused."""

import hashlib

import numpy as np
import pytest
import torch
from scipy.linalg import sqrtm
from torch import nn

from md4.errors import UserError
from pipelines.image_quality import FeatureNetwork, compare, subset_size
from tests.pipelines.small_judge import Features, write_features


def images(count: int, channels: int, seed: int, low: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(low, 256, (count, 8, 8, channels)).astype(np.uint8)


def frechet(one: np.ndarray, two: np.ndarray) -> float:
    """|m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2)), arXiv 1706.08500, equation 6."""
    first, second = np.cov(one.T), np.cov(two.T)
    root = np.real(sqrtm(first @ second))
    return float(np.sum((one.mean(0) - two.mean(0)) ** 2) + np.trace(first + second - 2 * root))


def unbiased_mmd(one: np.ndarray, two: np.ndarray) -> float:
    """The unbiased estimate of MMD^2 with the kernel (x.y / D + 1)^3, arXiv 1801.01401, section 4."""

    def kernel(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        return (a @ b.T / a.shape[1] + 1) ** 3

    n = len(one)
    within = sum((k.sum() - np.trace(k)) / (n * (n - 1)) for k in (kernel(one, one), kernel(two, two)))
    return float(within - 2 * kernel(one, two).mean())


@pytest.mark.parametrize("channels", [1, 3])
def test_values_are_those_of_the_definitions(tmp_path, channels):
    network = Features(channels)
    loaded = FeatureNetwork(write_features(tmp_path / "features.pt", network, channels))
    real, new = images(80, channels, 0), images(80, channels, 1, low=60)
    one, two = (loaded(pixels, batch_size=32) for pixels in (new, real))
    with torch.inference_mode():
        expected = [network(torch.from_numpy(pixels).permute(0, 3, 1, 2)).double().numpy() for pixels in (new, real)]
    assert np.allclose(one, expected[0], atol=1e-6)
    found = compare(one, two, loaded, subset=80)  # every subset is the whole
    assert found.fid == pytest.approx(frechet(*expected), rel=1e-5)
    assert found.kid == pytest.approx(unbiased_mmd(*expected), rel=1e-5)
    assert found.kid_deviation == pytest.approx(0, abs=1e-9)
    assert (found.feature_size, found.channels, found.references, found.kid_subset_size) == (5, channels, 80, 80)
    assert found.features_sha256 == hashlib.sha256((tmp_path / "features.pt").read_bytes()).hexdigest()
    assert compare(two, two, loaded).fid == pytest.approx(0, abs=1e-6)


def test_subsets_follow_the_seed_and_leave_other_draws_alone(tmp_path):
    loaded = FeatureNetwork(write_features(tmp_path / "features.pt", Features(3), 3))
    one, two = (loaded(images(40, 3, seed)) for seed in (0, 1))
    torch.manual_seed(7)
    before = torch.get_rng_state()
    first, again, other = (compare(one, two, loaded, subset=10, seed=seed) for seed in (3, 3, 4))
    assert torch.equal(before, torch.get_rng_state())
    assert first == again
    assert first.fid == other.fid
    assert first.kid != other.kid
    assert first.kid_deviation > 0


def test_grey_images_are_repeated_for_a_network_that_wants_colour(tmp_path):
    loaded = FeatureNetwork(write_features(tmp_path / "features.pt", Features(3), 3))
    grey = images(6, 1, 0)
    assert torch.equal(loaded(grey), FeatureNetwork(loaded.path)(np.repeat(grey, 3, axis=3)))
    assert loaded.channels == 3
    with pytest.raises(UserError, match=r"doesn't take uint8 images \[B, C, H, W\] of \[4, 8, 8\]"):
        FeatureNetwork(loaded.path)(images(6, 4, 0))


def test_what_is_no_network_is_refused(tmp_path):
    with pytest.raises(UserError, match="no such file"):
        FeatureNetwork(tmp_path / "absent.pt")
    (tmp_path / "text.pt").write_text("not a network")
    with pytest.raises(UserError, match="not a network in TorchScript"):
        FeatureNetwork(tmp_path / "text.pt")
    torch.save({"weights": torch.zeros(2)}, tmp_path / "weights.pt")
    with pytest.raises(UserError, match="not a network in TorchScript"):
        FeatureNetwork(tmp_path / "weights.pt")

    class Map(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.float()

    with pytest.raises(UserError, match=r"gives \[2, 3, 8, 8\] for 2 images; needed is \[B, D\]"):
        FeatureNetwork(write_features(tmp_path / "map.pt", Map(), 3))(images(4, 3, 0))


def test_subset_sizes():
    assert subset_size(64, 100) == 32
    assert subset_size(50_000, 10_000) == 1000
    assert subset_size(64, 100, 64) == 64
    with pytest.raises(UserError, match=r"subset size is 65; of 64 samples and 100 real images 2 to 64"):
        subset_size(64, 100, 65)
    with pytest.raises(UserError, match="at least 4 images of each: there are 3 samples, 100 real"):
        subset_size(3, 100)
