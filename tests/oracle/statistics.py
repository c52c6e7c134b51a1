"""p-values beside those of Pearson's test, and distances between laws."""

import math

import torch
from torch import Tensor


def tail(z: float) -> float:
    """Probability that a standard normal number is above z."""
    return 0.5 * math.erfc(z / math.sqrt(2))


def kolmogorov(values: Tensor) -> float:
    """p-value of the Kolmogorov-Smirnov test of iid `values` [N] in (0, 1) against the uniform law; for large N."""
    count = len(values)
    ranked = values.sort().values
    index = torch.arange(count, dtype=torch.float64)
    distance = torch.maximum((index + 1) / count - ranked, ranked - index / count).max().item()
    x = distance * (math.sqrt(count) + 0.12 + 0.11 / math.sqrt(count))
    if x < 0.3:
        return 1.0
    return min(1.0, max(0.0, 2 * sum((-1) ** (k - 1) * math.exp(-2 * (k * x) ** 2) for k in range(1, 101))))


def divergence(counts: Tensor, law: Tensor) -> tuple[float, float]:
    """Unbiased estimate of sum (q - p)^2 / p from counts `[X]` of samples of q, p being `law` [X]; and its variance."""
    n = counts.sum().double()
    q = counts / n
    estimate = (((q - law) ** 2 - q * (1 - q) / (n - 1)) / law).sum()
    slope = 2 * (q - law) / law
    variance = ((q * slope**2).sum() - (q * slope).sum() ** 2) / n + 2 * (q**2 / law**2).sum() / n**2
    return estimate.item(), variance.item()


def below(counts: Tensor, factor: float, other: Tensor, law: Tensor) -> float:
    """p-value of the claim that the divergence behind `counts` is at most `factor` times that behind `other`."""
    (first, spread), (second, other_spread) = divergence(counts, law), divergence(other, law)
    return tail((first - factor * second) / math.sqrt(spread + factor**2 * other_spread))


def total_variation(p: Tensor, q: Tensor) -> float:
    return ((p - q).abs().sum() / 2).item()
