"""How a worker's share of a global batch goes through the network, so that the gradient is that of the global mean.

Workers may have unequal shares, but ZeRO's collectives need as many passes from each, and DeepSpeed the same size of
them. So a share is filled up to the largest one, and that to whole passes, with copies of its last row, whose loss
counts nothing.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor, arange

from pipelines.order import largest_share


@dataclass(frozen=True)
class Passes:
    """The passes of one optimizer update on one worker."""

    batch_size: int  # B, rows of the global batch
    slices: int
    world: int
    micro_batch: int | None = None  # rows of a pass; None: all in one

    @property
    def places(self) -> int:
        """Rows of the largest share of the global batch."""
        return largest_share(self.world, self.slices) * (self.batch_size // self.slices)

    @property
    def size(self) -> int:
        """Rows of one pass."""
        return self.micro_batch or self.places

    @property
    def count(self) -> int:
        """Passes of an update, the same on every worker."""
        return -(-self.places // self.size)

    def parts(self, rows: int) -> Iterator[tuple[Tensor, int]]:
        """For each pass, the numbers `[size]` of its rows among a worker's, and how many of them, the first, count."""
        for start in range(0, self.count * self.size, self.size):
            yield arange(start, start + self.size).clamp(max=rows - 1), min(max(rows - start, 0), self.size)

    def loss(self, bits: Tensor, real: int) -> Tensor:
        """What to backpropagate for losses `[size]` of a pass, the first `real` of which count.

        The engine averages over workers and passes: the mean of these numbers over all of them is the global batch's.
        """
        return bits[:real].sum() * (self.world * self.count / self.batch_size)
