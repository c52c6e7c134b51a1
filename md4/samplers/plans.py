"""A plan: which positions of each row are revealed together, in what order, and at which time the network is asked.

Shapes: B rows, L positions.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

KNOWN = -1  # the event of a position that stands from the start
_NEVER = torch.iinfo(torch.int64).max


@dataclass(frozen=True)
class Call:
    """What a row does with its next network call."""

    reveal: Tensor  # [B, L] bool: the positions that get their tokens
    time: Tensor  # [B] float64: the time the network is shown
    event: Tensor  # [B] int64: the number of the event, which names its noise


@dataclass
class Plan:
    """A plan that is known before the first network call: reveal times don't depend on tokens.

    Position (b, l) is revealed in event `event[b, l]`, at which the network is shown `time[b, l]`; a row's events
    happen in rising order and only those that reveal something exist, so a step in which nothing happens costs nothing.
    Rows are independent: each has its own events and times.
    """

    event: Tensor  # [B, L] int64, KNOWN where the token stands from the start
    time: Tensor  # [B, L] float64, the same for all positions of one event

    def next(self, masked: Tensor) -> Call:
        """The next call of rows of which `masked` `[B, L]` is still hidden; full rows reveal nothing."""
        pending = torch.where(masked, self.event, _NEVER)
        event, first = pending.min(dim=1)
        return Call(
            reveal=masked & (pending == event[:, None]),
            time=self.time.gather(1, first[:, None])[:, 0],
            event=event,
        )
