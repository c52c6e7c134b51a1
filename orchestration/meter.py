"""What is measured in training steps between two lines of metrics.

Of each step every worker has a few sums, its *figures*, which all workers tell each other at the end of the step
together with the leader's orders (`orchestration.leader`): one small exchange, which also brings to light that the loss
is not what it should be, before the weights are changed. The sums of all workers, added in their order, are the same
everywhere.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

BUCKETS = 10  # of the times t
_PARTS = 5 + 2 * BUCKETS


class Step:
    """The figures of one step: of a worker, or of all of them."""

    def __init__(self, values: list[float]):
        self.bits, self.weight, self.hidden, self.tokens, self.rows = values[:5]
        self.values = values

    @property
    def loss(self) -> float:
        """Bits per token of the global batch, as an upper bound."""
        return self.bits / self.weight


class Meter:
    """Sums over the steps since the last line of metrics, of all workers, and the gradient norm.

    dumped: `dump()` of the workers that made the first part of them.
    """

    def __init__(self, dumped: Mapping[str, Any] | None = None):
        dumped = dumped or {}
        self._sums: list[float] = dumped.get("sums", [0.0] * _PARTS)
        self.steps: int = dumped.get("steps", 0)
        self.skipped: int = dumped.get("skipped", 0)
        self.gradient_norm: float | None = None
        self._own = torch.zeros(0)
        self._waited = 0.0
        self.clear_timing()

    def clear(self) -> None:
        """A line of metrics was written."""
        self._sums = [0.0] * _PARTS
        self.steps = self.skipped = 0
        self.clear_timing()

    def clear_timing(self) -> None:
        self.timed_steps, self.waited, self.timed_tokens, self.flops = 0, 0.0, 0.0, 0.0

    # -- one step ------------------------------------------------------------------------------------------------------

    def begin(self, waited: float, device: torch.device) -> None:
        """A step begins, whose data came after `waited` seconds."""
        self._waited = waited
        self._own = torch.zeros(_PARTS, dtype=torch.float64, device=device)

    def add(
        self,
        bits: Tensor,
        hidden: Tensor,
        t: Tensor,
        weight: Tensor | int,
        tokens_of_a_row: Tensor | int,
        density: Tensor | int = 1,
    ) -> None:
        """Note examples: bits per token, hidden tokens and times, each `[n]`, where they are, without waiting for them.

        weight: of each example's bits; tokens_of_a_row: of the global batch, on average; density: `[n]`, that the
        times were drawn from, by which the bits are divided already.
        """
        bucket = (t * BUCKETS).long().clamp(0, BUCKETS - 1)
        weighted = bits.double() * weight
        weights = torch.ones_like(weighted) * weight
        rows = torch.ones_like(weighted)
        sums = torch.stack([weighted.sum(), weights.sum(), hidden.sum().double(), (rows * tokens_of_a_row).sum()])
        self._own[:4] += sums
        self._own[4] += len(bits)
        self._own[5 : 5 + BUCKETS].index_add_(0, bucket, weighted)
        self._own[5 + BUCKETS :].index_add_(0, bucket, weights / density)

    def own(self) -> Tensor:
        """This worker's figures of the step, and the seconds that it waited: float64 on the CPU. Waits for them."""
        return torch.cat([torch.tensor([self._waited], dtype=torch.float64), self._own.cpu()])

    @staticmethod
    def together(everyone: Tensor) -> tuple[Step, float]:
        """The figures of all workers, from `own` of each `[workers, n]`, and the longest wait of any."""
        waits, figures = everyone[:, 0], everyone[:, 1:]
        return Step(figures.sum(0).tolist()), float(waits.max())

    def take(self, step: Step, waited: float, flops: float) -> None:
        """The step is one of those that count."""
        self._sums = [one + other for one, other in zip(self._sums, step.values, strict=True)]
        self.steps += 1
        self._time(step, waited, flops)

    def skip(self, step: Step, waited: float, flops: float) -> None:
        """The step was made, but nothing of what it found is to be told: it may be no number."""
        self.skipped += 1
        self._time(step, waited, flops)

    def _time(self, step: Step, waited: float, flops: float) -> None:
        self.timed_steps += 1
        self.waited += waited
        self.timed_tokens += step.tokens
        self.flops += flops

    # -- all of them ---------------------------------------------------------------------------------------------------

    def figures(self) -> dict[str, Any]:
        """Loss, loss by time and mask ratio of the steps since the last line; None of what no step showed."""
        sums = Step(self._sums)
        buckets = zip(self._sums[5 : 5 + BUCKETS], self._sums[5 + BUCKETS :], strict=True)
        return {
            "bits_per_token": sums.loss if sums.weight else None,
            "bits_by_time": [bits / weight if weight else None for bits, weight in buckets],
            "mask_ratio": sums.hidden / sums.tokens if sums.tokens else None,
            **({"skipped": self.skipped} if self.skipped else {}),
        }

    def dump(self) -> dict[str, Any]:
        """What has been summed so far, as JSON values, so that a resumed run writes the same next line."""
        return {"sums": self._sums, "steps": self.steps, "skipped": self.skipped}
