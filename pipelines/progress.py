"""How far a long pass over data is: a bar on a terminal, a line every few seconds elsewhere."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

_SECONDS = 10.0  # between two lines


@contextmanager
def progress(what: str, total: int, say: Callable[[str], None]) -> Iterator[Callable[[int], None]]:
    """Gives the function that is told of bytes that are done; `total` bytes are to be done.

    say: takes the lines, where there is no terminal.
    """
    console = Console(stderr=True)
    if not console.is_terminal:
        yield Lines(what, total, say).advance
        return
    columns = (TextColumn(what), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task(what, total=total)
        yield lambda amount: bar.advance(task, amount)


class Lines:
    """Says how far a pass is, at most every ten seconds. The clock is an argument so that tests need not wait."""

    def __init__(self, what: str, total: int, say: Callable[[str], None], clock: Callable[[], float] = time.monotonic):
        self._what, self._total, self._say, self._clock = what, total, say, clock
        self._done = 0
        self._began = self._last = clock()

    def advance(self, amount: int) -> None:
        """So many more bytes are done."""
        self._done += amount
        now = self._clock()
        if now - self._last < _SECONDS or self._done >= self._total:
            return
        self._last = now
        rate = self._done / (now - self._began)
        left = round((self._total - self._done) / rate) if rate else None
        eta = "unknown" if left is None else f"{left // 60}:{left % 60:02d}"
        self._say(
            f"{self._what}: {self._done / 1e6:,.1f} of {self._total / 1e6:,.1f} MB, {rate / 1e6:,.2f} MB/s, {eta} left"
        )
