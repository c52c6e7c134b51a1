"""What the losses need of the network's prediction, without the logits of a whole batch.

Only hidden positions enter the loss, and of their logits only a number or two each. `Head` therefore projects the
hidden positions alone, some hundred at a time, keeps those numbers, and computes each chunk's logits again in the
backward pass. No tensor [B, L, V] exists, and with half the positions hidden the matrix products are 4/2 instead of 3
times one projection of all positions, although one is done twice.

How many positions are hidden is known on the device alone, and asking for it would make the host wait until the device
has done all that was queued. So the question is put *before* the network's body is queued and the answer read *after*:
the host waits until the device has reached the body, which is then still full of work. The count is rounded up to a
multiple of `GRAIN`, so that shapes are few, and there is no capacity that a batch could exceed: small micro-batches,
whose share of hidden positions is anything between 0 and 1, cost what they must and no more.

Up to `PLAIN_UP_TO` tokens the plain form is used: the logits are then no larger than what a single block keeps for its
backward pass, and one large matrix product is faster.

Shape letters: B examples, L positions, N hidden positions (rows), D width, V real tokens.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd.function import once_differentiable

IGNORED = -100  # the target of a visible position: it costs nothing and gets no gradient
PLAIN_UP_TO = 1024  # tokens of a vocabulary whose logits are not worth avoiding
CHUNK = 2**25  # logits computed at a time: 128 MiB
GRAIN = 64  # the number of rows is a multiple of it


class Scores(NamedTuple):
    """What the losses need of mu = softmax(logits); 0 at visible positions."""

    log_likelihood: Tensor  # [B, L] float32: ln mu of the target, at most 0
    power: Tensor | None  # [B, L] float32: sum_v powers_v mu_v, if powers were given


def plain_scores(logits: Tensor, targets: Tensor, powers: Tensor | None = None) -> Scores:
    """The scores from all logits: the definition that the chunked form is tested against.

    Args:
        logits: `[B, L, V]`.
        targets: true tokens `[B, L]` where hidden, `IGNORED` where visible.
        powers: `[V]`, of learned schedules.
    """
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    nats = F.cross_entropy(logits.flatten(0, -2), targets.flatten(), ignore_index=IGNORED, reduction="none")
    if powers is None:
        return Scores(-nats.view_as(targets), None)
    mean = logits.softmax(dim=-1) @ powers.to(logits.dtype)
    return Scores(-nats.view_as(targets), torch.where(targets == IGNORED, 0.0, mean))


class Hidden:
    """The hidden positions of a batch, by their flat numbers; made early, read late (see above).

    Of tensors without contents (torch's fake ones, for planning) all positions are: the most there can be.
    """

    def __init__(self, targets: Tensor):
        """`targets` [B, L]: `IGNORED` where visible."""
        visible = targets.flatten() == IGNORED
        self._hidden_first = visible.to(torch.uint8).argsort(stable=True)
        count = visible.numel() - visible.sum()
        self._arrived: torch.cuda.Event | None = None
        if count.is_cuda:
            self._count = torch.empty((), dtype=count.dtype, pin_memory=True)
            self._count.copy_(count, non_blocking=True)
            self._arrived = torch.cuda.Event()
            self._arrived.record()
        else:
            self._count = count

    def rows(self) -> Tensor:
        """Numbers `[N]` of the hidden positions, filled up to a multiple of `GRAIN` with visible ones; never empty."""
        if isinstance(self._count, FakeTensor):
            return self._hidden_first
        if self._arrived is not None:
            self._arrived.synchronize()
        wanted = max(1, -(-int(self._count) // GRAIN)) * GRAIN
        return self._hidden_first[:wanted]


class _Chunked(torch.autograd.Function):
    """Scores of rows x [N, D] under the projection weight [V, D], targets [N], powers [V] or None."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, targets: Tensor, powers: Tensor | None) -> Any:
        with torch.autocast(x.device.type, enabled=False):
            kind = torch.promote_types(x.dtype, torch.float32)
            rows, matrix = x.to(kind), weight.to(kind)
            valid = targets != IGNORED
            columns = targets.clamp(min=0)[:, None]
            likelihood, largest, total = (torch.empty(len(x), dtype=kind, device=x.device) for _ in range(3))
            mean = None if powers is None else torch.empty_like(likelihood)
            for part, logits in _chunks(rows, matrix):
                # The exponentials take the place of the logits: a second buffer would double the peak. The two parts
                # of the normaliser stay apart, since their sum would lose the digits of the small one.
                chosen = logits.gather(1, columns[part])[:, 0]
                largest[part] = logits.amax(dim=1)
                total[part] = logits.sub_(largest[part, None]).exp_().sum(dim=1)
                likelihood[part] = chosen - largest[part] - total[part].log()
                if mean is not None and powers is not None:
                    mean[part] = logits @ powers.to(kind) / total[part]
            ctx.save_for_backward(x, weight, targets, powers, largest, total, mean)
            likelihood = torch.where(valid, likelihood, 0.0)
            return likelihood, None if mean is None else torch.where(valid, mean, 0.0)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_likelihood: Tensor, d_mean: Tensor | None) -> Any:
        """With g and h the gradients of a row's two scores, that of its logits is
        g (e_target - mu) + h mu * (powers - mean), and that of the powers the sum of h mu over all rows."""
        x, weight, targets, powers, largest, total, mean = ctx.saved_tensors
        need_x, need_weight, *_ = ctx.needs_input_grad
        with torch.autocast(x.device.type, enabled=False):
            kind = total.dtype
            rows, matrix = x.to(kind), weight.to(kind)
            valid = targets != IGNORED
            columns = targets.clamp(min=0)[:, None]
            g = torch.where(valid, d_likelihood, 0.0)
            d_x = torch.empty_like(rows) if need_x else None
            d_weight = torch.zeros_like(matrix) if need_weight else None
            d_powers = None if powers is None else torch.zeros_like(powers, dtype=kind)
            for part, logits in _chunks(rows, matrix):
                mu = logits.sub_(largest[part, None]).exp_()  # times `total`, by which the factors are divided instead
                if powers is None or d_powers is None or d_mean is None:
                    slope = mu.mul_(-(g[part] / total[part])[:, None])
                else:
                    h = torch.where(valid[part], d_mean[part], 0.0)
                    own = -((g[part] + h * mean[part]) / total[part])[:, None]
                    h = h / total[part]
                    d_powers += h @ mu
                    slope = mu.mul_(torch.addcmul(own, h[:, None], powers.to(kind)))
                slope.scatter_add_(1, columns[part], g[part, None])
                if d_x is not None:
                    torch.mm(slope, matrix, out=d_x[part])
                if d_weight is not None:
                    d_weight.addmm_(slope.t(), rows[part])
        return (
            None if d_x is None else d_x.to(x.dtype),
            None if d_weight is None else d_weight.to(weight.dtype),
            None,
            None if powers is None or d_powers is None else d_powers.to(powers.dtype),
        )


def _chunks(rows: Tensor, matrix: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Yield (slice of the rows, their logits) chunk by chunk; the logits' memory is used again for the next chunk."""
    size = max(1, CHUNK // len(matrix) // GRAIN) * GRAIN
    buffer = rows.new_empty(min(size, len(rows)), len(matrix))
    for start in range(0, len(rows), size):
        part = slice(start, min(start + size, len(rows)))
        yield part, torch.mm(rows[part], matrix.t(), out=buffer[: part.stop - part.start])


class Head(nn.Linear):
    """The projection to the vocabulary. Its weight is used inside its own `forward` alone, where ZeRO-3 gathers it."""

    def __init__(self, width: int, vocab_size: int):
        super().__init__(width, vocab_size, bias=False)

    def forward(self, x: Tensor, targets: Tensor | None = None, powers: Tensor | None = None) -> Any:
        """Logits `[..., V]` of x [..., D]; or, with targets [N], the scores `[N]` of x [N, D], as a pair."""
        if targets is None:
            return super().forward(x)
        return _Chunked.apply(x, self.weight, targets, powers)


def spread(scores: Any, rows: Tensor, like: Tensor) -> Scores:
    """A pair of scores `[N]` of the positions numbered by `rows` [N] -> `Scores` in the shape of `like` [B, L]."""

    def place(values: Tensor | None) -> Tensor | None:
        if values is None:
            return None
        return values.new_zeros(like.numel()).index_copy(0, rows, values).view(like.shape)

    likelihood = place(scores[0])
    assert likelihood is not None
    return Scores(likelihood, place(scores[1]))
