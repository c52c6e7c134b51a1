"""A number that tells whether two tensors have the same bits, and that can be computed from parts of them.

    sum over i of bits(x_i) * (h(i) | 1)   mod 2^64

where h is the counter-based hash of `md4.noise`. The sum over disjoint parts is the whole's, so workers that hold parts
of a tensor add their numbers up, whatever the parts are. A single flipped bit always changes it, since the factors are
odd; other damage goes unseen once in 2^64. It guards against mistakes, not against malice: for that there is sha256.
"""

import torch
from torch import Tensor

from md4 import noise

_KEY = noise.key(0, "content sum")
_CHUNK = 2**20  # elements at a time: 8 MiB of factors
_first_factors: dict[torch.device, Tensor] = {}


def content_sum(part: Tensor, start: int = 0) -> Tensor:
    """The number of elements `start ..` of a tensor, given as float32 `[n]`: int64, a scalar on the same device."""
    bits = part.reshape(-1).view(torch.int32)
    total = torch.zeros((), dtype=torch.int64, device=part.device)
    for lo in range(0, len(bits), _CHUNK):
        chunk = bits[lo : lo + _CHUNK].to(torch.int64)
        total += (chunk * _factors(start + lo, len(chunk), part.device)).sum()
    return total


def _factors(start: int, count: int, device: torch.device) -> Tensor:
    if start + count <= _CHUNK:  # most tensors are small, and begin at 0
        if device not in _first_factors:
            _first_factors[device] = _made(0, _CHUNK, device)
        return _first_factors[device][start : start + count]
    return _made(start, count, device)


def _made(start: int, count: int, device: torch.device) -> Tensor:
    return noise.bits(_KEY, torch.arange(start, start + count, device=device)) | 1
