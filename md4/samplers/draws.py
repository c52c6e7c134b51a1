"""From logits to tokens: temperature, top-p, and a categorical draw that is exact in float64.

Shapes: N positions that are drawn together (of any rows), V real tokens.
"""

import torch
from torch import Tensor

from md4 import noise
from md4.errors import UserError

# A draw needs a few float64 copies of its logits: this many numbers at a time keep them below some 100 MB.
_CHUNK = 1 << 21


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


def draw_tokens(logits: Tensor, keys: Tensor, temperature: Tensor, top_p: Tensor) -> Tensor:
    """Tokens `[N]` from logits `[N, V]` at each position's own temperature `[N]` (> 0) and top_p `[N]`, in that order.

    Temperature 1 and top_p 1 draw from the network's own probabilities. The arithmetic is float64 throughout.
    """
    # Relative to the largest logit, so that no temperature, however low, makes an infinity of two tokens.
    scaled = (logits.double() - logits.double().amax(dim=-1, keepdim=True)) / temperature.double()[:, None]
    return categorical(filter_top_p(scaled, top_p), keys)
