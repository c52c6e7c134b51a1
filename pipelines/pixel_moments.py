"""A yardstick for images that needs no network: means and covariances of their pixels.

The Fréchet distance of two Gaussians that have the moments of the images, |m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2)),
of pixels between 0 and 1. That is FID with pixels in the place of features: it sees brightness, strokes and how pixels
go together in pairs, not what is drawn. Large images are averaged to at most 8 x 8 pixels first. It falls with the
number of images: compare equal numbers, and with real images of that number.

Shapes: N images of H x W pixels with C channels, D numbers of an image.
"""

from dataclasses import dataclass

import numpy as np
import torch

from md4.errors import UserError
from pipelines.ngram_model import GROUPS, jackknife_error

SIDE = 8


def pixel_features(images: np.ndarray) -> np.ndarray:
    """Images `[N, H, W, C]` uint8 as `[N, D]` float64 in [0, 1], averaged over areas if they are larger than 8 x 8."""
    pixels = torch.from_numpy(np.ascontiguousarray(images)).permute(0, 3, 1, 2).double() / 255
    size = (min(SIDE, pixels.shape[2]), min(SIDE, pixels.shape[3]))
    return torch.nn.functional.adaptive_avg_pool2d(pixels, size).flatten(1).numpy()


@dataclass(frozen=True)
class Moments:
    """Mean and covariance of the features of real images."""

    mean: np.ndarray  # [D]
    covariance: np.ndarray  # [D, D]
    root: np.ndarray  # [D, D], of the covariance

    @classmethod
    def of(cls, features: np.ndarray) -> "Moments":
        """Of `[N, D]`. UserError for fewer than two images."""
        if len(features) < 2:
            raise UserError(f"at least 2 images are needed for a covariance, there is {len(features)}")
        covariance = np.cov(features, rowvar=False).reshape(features.shape[1], -1)
        values, vectors = np.linalg.eigh(covariance)
        root = (vectors * np.sqrt(values.clip(min=0))) @ vectors.T
        return cls(features.mean(0), covariance, root)

    def distance(self, features: np.ndarray) -> tuple[float, float]:
        """Fréchet distance of images' features `[N, D]`, and its standard error, a jackknife's over groups of images.

        UserError for fewer than three images.
        """
        if len(features) < 3:
            raise UserError(f"at least 3 images are needed for a standard error, there are {len(features)}")
        groups = min(GROUPS, len(features))
        group = np.arange(len(features)) % groups
        without = [self._distance(features[group != left]) for left in range(groups)]
        return self._distance(features), jackknife_error(without)

    def _distance(self, features: np.ndarray) -> float:
        other = np.cov(features, rowvar=False).reshape(self.covariance.shape)
        cross = np.linalg.eigvalsh(self.root @ other @ self.root).clip(min=0)
        gap = self.mean - features.mean(0)
        return float(gap @ gap + np.trace(self.covariance) + np.trace(other) - 2 * np.sqrt(cross).sum())
