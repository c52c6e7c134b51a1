"""When a training step is not to be believed: the loss or the gradient is no number, or the loss leaps.

The rule sees what is the same on all workers, and its memory is part of a checkpoint: whatever happens to a run, the
same steps are judged in the same way.
"""

import math
from collections import deque
from collections.abc import Mapping
from statistics import median
from typing import Any

_WINDOW = 64  # steps whose median is the usual loss
_FEWEST = 16  # of them, before which a leap cannot be told


class Spikes:
    """Judges the steps of a run, one after the other.

    factor: a loss above so many times the running median is a spike; 0: only what is not finite.
    dumped: `dump()` of the run that is gone on with.
    """

    def __init__(self, factor: float, dumped: Mapping[str, Any] | None = None):
        dumped = dumped or {}
        self._factor = factor
        self._recent: deque[float] = deque(dumped.get("recent", ()), maxlen=_WINDOW)
        self.skipped: int = dumped.get("skipped", 0)
        self.in_a_row: int = dumped.get("in_a_row", 0)

    @property
    def usual(self) -> float | None:
        """The running median of the loss; None as long as there is none."""
        return median(self._recent) if len(self._recent) >= _FEWEST else None

    def of_loss(self, loss: float) -> str | None:
        """Why a step with this loss is not to be made; None: it may be."""
        if not math.isfinite(loss):
            return f"the loss is {loss}"
        usual = self.usual
        if self._factor and usual is not None and loss > self._factor * usual:
            return (
                f"the loss is {loss:.4g} bits per token, {loss / usual:.1f} times the median {usual:.4g} of the last "
                f"{len(self._recent)} steps (train.spike={self._factor:g})"
            )
        return None

    def made(self, loss: float) -> None:
        """The step was made."""
        self._recent.append(loss)
        self.in_a_row = 0

    def skip(self) -> None:
        """The step was skipped."""
        self.skipped += 1
        self.in_a_row += 1

    def dump(self) -> dict[str, Any]:
        """What a checkpoint keeps, as JSON values."""
        return {"recent": list(self._recent), "skipped": self.skipped, "in_a_row": self.in_a_row}
