"""How good are samples of images? FID and KID, in the features of a network that the caller gives.

The customary network is Inception v3, but any will do to compare runs with each other; it comes as a file, and nothing
is downloaded. Its contract: images `[B, C, H, W]` uint8, 0 to 255, in; features `[B, D]` out, with resizing and
normalising inside. Grey images are given as they are, or repeated to three channels if the network refuses one.

    FID   distance of two Gaussians fitted to the features (Heusel et al., arXiv 1706.08500)
    KID   squared MMD with a cubic kernel, the mean over random subsets (Binkowski et al., arXiv 1801.01401)

FID falls with the number of images, and below D images its covariances have no full rank: compare equal numbers only.
Shapes: N images of H x W pixels with C channels, D features.
"""

import hashlib
import math
import warnings
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn

from md4.errors import UserError
from pipelines.extras import extra

SUBSETS = 100
LARGEST_SUBSET = 1000  # the size in the KID paper


class ImageQuality(BaseModel):
    """FID and KID with everything that they depend on."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    fid: float
    kid: float
    kid_deviation: float = Field(description="standard deviation between subsets; not a standard error")
    kid_subsets: int
    kid_subset_size: int
    references: int = Field(description="real images compared with")
    features: str = Field(description="file of the network")
    features_sha256: str
    feature_size: int = Field(description="D; FID of fewer images than this is not comparable with other numbers")
    channels: int = Field(description="that the network was given")


class FeatureNetwork:
    """A network in a file of TorchScript, as `torch.jit.save` writes it. `UserError` for any other, or none.

    TorchScript alone, because loading it runs no Python: `torch.export.load` may unpickle what a file holds.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        if not self.path.is_file():
            raise UserError(f"no such file of a feature network: {str(path)!r}")
        with self.path.open("rb") as file:
            self.sha256 = hashlib.file_digest(file, "sha256").hexdigest()
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.network = self._load()
        self.channels: int | None = None  # known after the first images

    def _load(self) -> Any:
        try:
            if not zipfile.is_zipfile(self.path):
                raise ValueError("it is no archive")
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", DeprecationWarning)  # the format is not developed further
                return torch.jit.load(self.path, map_location=self.device).eval()
        except (RuntimeError, ValueError) as error:
            raise UserError(
                f"{str(self.path)!r} is not a network in TorchScript, as torch.jit.save writes it ({_short(error)})"
            ) from None

    @torch.inference_mode()
    def __call__(self, images: np.ndarray, batch_size: int = 64) -> Tensor:
        """Features `[N, D]` float64, on the CPU, of images `[N, H, W, C]` uint8."""
        pixels = torch.from_numpy(np.ascontiguousarray(images)).permute(0, 3, 1, 2)
        if self.channels is None:
            self.channels = self._fitting(pixels[:2])
        pixels = pixels.expand(-1, self.channels, -1, -1)
        parts = [self._features(pixels[start : start + batch_size]) for start in range(0, len(pixels), batch_size)]
        features = torch.cat(parts)
        if not bool(features.isfinite().all()):
            raise UserError(f"the feature network {self.path.name!r} answered with NaN or infinity")
        return features

    def _fitting(self, pixels: Tensor) -> int:
        """Channels that the network takes: the images' own, or three for grey ones."""
        own = pixels.shape[1]
        problem = ""
        for channels in dict.fromkeys((own, 3 if own == 1 else own)):
            try:
                self._features(pixels.expand(-1, channels, -1, -1))
                return channels
            except UserError:
                raise
            except Exception as error:  # whatever a network says to the wrong shape
                problem = _short(error)
        shape = list(pixels.shape[1:])
        raise UserError(
            f"the feature network {self.path.name!r} doesn't take uint8 images [B, C, H, W] of {shape} ({problem})"
        )

    def _features(self, pixels: Tensor) -> Tensor:
        found = self.network(pixels.contiguous().to(self.device))
        if not isinstance(found, Tensor) or found.ndim != 2 or len(found) != len(pixels):
            shape = list(found.shape) if isinstance(found, Tensor) else type(found).__name__
            raise UserError(
                f"the feature network {self.path.name!r} gives {shape} for {len(pixels)} images; needed is [B, D]"
            )
        return found.double().cpu()


class _Given(nn.Module):
    """Stands where the metrics want a network, for features that are there already."""

    def __init__(self, size: int):
        super().__init__()
        self.num_features = size

    def forward(self, features: Tensor) -> Tensor:
        return features


def subset_size(images: int, references: int, wanted: int | None = None) -> int:
    """Images in a subset of KID: `wanted`, else half of the smaller set and at most 1000.

    UserError, before anything is computed, if there are fewer than 4 images of either, or fewer than `wanted`.
    """
    least = min(images, references)
    if least < 4:
        raise UserError(f"FID and KID need at least 4 images of each: there are {images} samples, {references} real")
    if wanted is None:
        return min(least // 2, LARGEST_SUBSET)
    if not 2 <= wanted <= least:
        raise UserError(
            f"KID's subset size is {wanted}; of {images} samples and {references} real images 2 to {least} are allowed"
        )
    return wanted


def compare(
    samples: Tensor, references: Tensor, network: FeatureNetwork, *, subset: int | None = None, seed: int = 0
) -> ImageQuality:
    """FID and KID between features of samples `[N, D]` and of real images `[M, D]`, float64, from `network`.

    subset: see `subset_size`. seed: of KID's random subsets. Raises `UserError` as `subset_size` does.
    """
    size = subset_size(len(samples), len(references), subset)
    extra("torchmetrics", "FID and KID")
    from torchmetrics.image.fid import FrechetInceptionDistance
    from torchmetrics.image.kid import KernelInceptionDistance

    given = _Given(samples.shape[1])
    with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
        warnings.filterwarnings("ignore", message="Metric `Kernel Inception Distance` will save")  # they fit
        torch.manual_seed(seed)  # the subsets are drawn from the global generator
        fid = FrechetInceptionDistance(feature=given)
        kid = KernelInceptionDistance(feature=given, subsets=SUBSETS, subset_size=size)
        for metric in (fid, kid):
            metric.update(references, real=True)
            metric.update(samples, real=False)
        distance = float(fid.compute())
        mean, deviation = (float(value) for value in kid.compute())
    if not all(map(math.isfinite, (distance, mean, deviation))):
        raise UserError("FID or KID is not finite: the features have no spread or are too large")
    return ImageQuality(
        fid=distance,
        kid=mean,
        kid_deviation=deviation,
        kid_subsets=SUBSETS,
        kid_subset_size=size,
        references=len(references),
        features=network.path.name,
        features_sha256=network.sha256,
        feature_size=samples.shape[1],
        channels=network.channels or 0,
    )


def _short(error: Exception) -> str:
    """What is wrong, without the trace through a network's code that comes before it."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{lines[-1] if lines else type(error).__name__:.200}"
