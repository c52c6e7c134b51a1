"""Random numbers as a pure function of (seed, purpose, step or event, sample, position) - contract C2.

No generator carries state. A *key* names a stream (`key(seed, "mask", step)`), `derive` forks it per sample, and the
i-th number of a stream is read at index i, in any order, on any device, by any worker, with the same bits. The
generator is SplitMix64 (Steele, Lea, Flood 2014) used as a counter-based hash: int64 arithmetic that wraps, hence
identical on CPU and CUDA. It is not meant for cryptography.
"""

import hashlib

import torch
from torch import Tensor

_GOLDEN = 0x9E3779B97F4A7C15 - 2**64  # odd, 2^64 / golden ratio, as a signed 64-bit integer
_MIX_1 = 0xBF58476D1CE4E5B9 - 2**64
_MIX_2 = 0x94D049BB133111EB - 2**64


def _shift_right(x: Tensor, n: int) -> Tensor:
    """Logical right shift of int64 (torch's `>>` keeps the sign)."""
    return (x >> n).bitwise_and_((1 << (64 - n)) - 1)


def _mix(x: Tensor) -> Tensor:
    """SplitMix64's finaliser, elementwise: a bijection of 64-bit words. Leaves x alone, but needs little beside it."""
    x = _shift_right(x, 30).bitwise_xor_(x).mul_(_MIX_1)
    x = _shift_right(x, 27).bitwise_xor_(x).mul_(_MIX_2)
    return _shift_right(x, 31).bitwise_xor_(x)


def _word(word: int | str | Tensor) -> Tensor:
    if isinstance(word, Tensor):
        return word.to(torch.int64)
    if isinstance(word, str):
        word = int.from_bytes(hashlib.blake2b(word.encode(), digest_size=8).digest(), "little")
    word %= 2**64
    return torch.tensor(word - 2**64 if word >= 2**63 else word, dtype=torch.int64)


def derive(key: int | Tensor, word: int | str | Tensor) -> Tensor:
    """Fork a stream: key(s) `[...]` and word(s) `[...]` broadcast to keys `[...]`, int64."""
    return _mix(_word(key) + _mix(_word(word) ^ _GOLDEN))


def key(seed: int, *words: int | str) -> int:
    """The stream of a run seed and any number of words, e.g. `key(seed, "time", step)`, as a Python int."""
    state = _mix(_word(seed))
    for word in words:
        state = derive(state, word)
    return int(state)


def bits(key: int | Tensor, index: Tensor) -> Tensor:
    """64 random bits (int64) at `index` of the stream(s) `key`; both broadcast."""
    return _mix(_word(key).to(index.device) + (index + 1) * _GOLDEN)


def uniform(key: int | Tensor, index: Tensor) -> Tensor:
    """Uniform float64 strictly inside (0, 1): the 2^52 midpoints of equal cells, so logarithms are finite."""
    return _shift_right(bits(key, index), 12).to(torch.float64).add_(0.5).mul_(2.0**-52)


def lattice_uniform(key: int | Tensor, index: Tensor, digits: int | Tensor) -> Tensor:
    """Uniform float32 on the multiples 0, 1 .. 2^digits - 1 of 2^-digits, as generators of float32 make them.

    digits: 1 .. 24, broadcasts. To reproduce what such numbers do (md4.samplers.joint); elsewhere use `uniform`.
    """
    digits = torch.as_tensor(digits, device=index.device)
    return ((bits(key, index) >> (64 - digits)) & ((1 << digits) - 1)).float() * (0.5**digits).float()


def exponential(key: int | Tensor, index: Tensor) -> Tensor:
    """Standard exponential float64, from `uniform` by inversion; between 1.1e-16 and 36.7."""
    return uniform(key, index).log_().neg_()


def permutation(key: int, n: int) -> Tensor:
    """A permutation of 0..n-1, int64 `[n]`: the order of n hashed indices (ties, 2^-64 each, by index)."""
    return torch.argsort(bits(key, torch.arange(n)), stable=True)
