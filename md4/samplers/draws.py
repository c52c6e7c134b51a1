"""From logits to tokens: temperature, top-p, and a categorical draw that is exact in float64.

Shapes: N positions that are drawn together (of any rows), V real tokens.
"""

import torch
from torch import Tensor

from md4 import noise
from md4.errors import UserError

# A draw needs a few float64 copies of its logits: with this many numbers at a time they stay in the cache.
_CHUNK = 1 << 18


def filter_top_p(logits: Tensor, p: float | Tensor) -> Tensor:
    """Keep the smallest set of most probable tokens that holds probability `p`; the others become -inf.

    logits: `[..., V]`, floating; p: a number, or a tensor `[...]` with one p for each distribution, in (0, 1].
    The set is {v : mu_v >= tau} for the largest tau whose set reaches p, so all tokens tied at tau stay in
    (the reference's rule). p = 1 keeps everything. Probabilities are summed in float64; the result has logits' dtype.

    Raises `UserError` if p lies outside (0, 1].
    """
    p = torch.as_tensor(p, dtype=torch.float64, device=logits.device)
    if not bool(((p > 0) & (p <= 1)).all()):
        raise UserError(f"top_p is {p.tolist()}; it must lie in (0, 1]")
    if bool((p == 1).all()):
        return logits
    p = p.expand(logits.shape[:-1])[..., None]
    probabilities = torch.softmax(logits.double(), dim=-1)
    falling = probabilities.sort(dim=-1, descending=True).values
    # How many of the most probable tokens fall short of p: the next one is the last that is needed. Rounding may leave
    # the full sum below p; then every token is needed.
    short = (falling.cumsum(dim=-1) < p).sum(dim=-1, keepdim=True).clamp(max=logits.shape[-1] - 1)
    tau = falling.gather(-1, short)
    keep = (probabilities >= tau) | (p == 1)
    return logits.masked_fill(~keep, -torch.inf)


def categorical(logits: Tensor, keys: Tensor) -> Tensor:
    """One token from softmax(logits) for each position: argmax of mu_v / E_v with standard exponentials E_v.

    logits: `[N, V]`, -inf where a token is impossible; keys: `[N]` int64, the noise stream of each position, of which
    number v goes to token v. Returns `[N]` int64. Race and noise are float64: float32 exponentials live on a lattice
    of 2^-24 that drops the tail of the distribution (arXiv 2409.02908). A position's token depends on nothing but its
    own logits and key, and a perturbation of the logits changes it with probability at most twice the total variation.
    """
    count, vocabulary = logits.shape
    tokens = torch.empty(count, dtype=torch.int64, device=logits.device)
    index = torch.arange(vocabulary, device=logits.device)
    rows = max(1, _CHUNK // vocabulary)
    for start in range(0, count, rows):
        part = logits[start : start + rows].double()
        # Unnormalised probabilities do: the race is won by the same token.
        weights = torch.exp(part - part.amax(dim=-1, keepdim=True))
        clocks = noise.exponential(keys[start : start + rows, None], index)
        tokens[start : start + rows] = (weights / clocks).argmax(dim=-1)
    return tokens


def filter_top_k(logits: Tensor, k: Tensor) -> Tensor:
    """Keep the k most probable tokens and those tied with the last of them; the others become -inf.

    logits: `[N, V]`; k: `[N]` int64, 0 or at least V keeps everything.
    """
    vocabulary = logits.shape[1]
    if not bool(((k > 0) & (k < vocabulary)).any()):
        return logits
    k = torch.where(k > 0, k, vocabulary).clamp(max=vocabulary)
    falling = logits.topk(int(k.where(k < vocabulary, 1).max()), dim=1).values
    last = falling.gather(1, (k - 1).clamp(max=falling.shape[1] - 1)[:, None])
    return logits.masked_fill((logits < last) & (k < vocabulary)[:, None], -torch.inf)


def log_weights(logits: Tensor, temperature: Tensor) -> Tensor:
    """Unnormalised log-probabilities `[N, V]` float64, at most 0, of logits [N, V] at temperatures [N] (> 0)."""
    # Relative to the largest logit, so that no temperature, however low, makes an infinity of two tokens.
    logits = logits.double()
    return (logits - logits.amax(dim=-1, keepdim=True)) / temperature.double()[:, None]


def filtered(weights: Tensor, top_p: Tensor, top_k: Tensor) -> Tensor:
    """`weights` [N, V] (logarithms) with top-k and then top-p applied, each position by its own: [N] both."""
    return filter_top_p(filter_top_k(weights, top_k), top_p)
