"""`md4 watch`: a run's status that keeps itself up to date, with the curve of its loss; in the terminal, from its
folder alone. The run may be in another process or on another machine, and may be started again meanwhile."""

import time
from collections.abc import Sequence
from itertools import pairwise

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.text import Text

from orchestration.status import Status, status, table
from pipelines.storage import Place

_BARS = "▁▂▃▄▅▆▇█"


def sparkline(values: Sequence[float], width: int) -> str:
    """At most `width` characters whose heights follow `values`: means of equal stretches, the last one up to date."""
    if not values:
        return ""
    count = min(width, len(values))
    edges = [len(values) * i // count for i in range(count + 1)]
    means = [sum(values[a:b]) / (b - a) for a, b in pairwise(edges)]
    low, high = min(means), max(means)
    scale = (len(_BARS) - 1) / (high - low) if high > low else 0.0
    return "".join(_BARS[round((mean - low) * scale)] for mean in means)


def view(found: Status, width: int) -> RenderableType:
    """One picture of the screen."""
    parts: list[RenderableType] = [ProgressBar(total=found.steps, completed=found.step, width=width - 6)]
    if found.losses:
        low, high = min(found.losses), max(found.losses)
        parts += [Text(sparkline(found.losses, width - 6), style="cyan")]
        parts += [Text(f"loss of {len(found.losses)} lines, {low:.3f} to {high:.3f} {found.unit}", style="dim")]
    colour = {"running": "green", "finished": "green", "silent": "red", "failed": "red", "stopped": "red"}
    return Panel(Group(*parts, table(found)), title=found.state, border_style=colour.get(found.state, "yellow"))


def watch(folder: Place, every: float = 1.0, console: Console | None = None) -> Status:
    """Show the run until it is over, or until interrupted; returns the last status."""
    console = console or Console()
    found = status(folder)
    with Live(view(found, console.width), console=console, auto_refresh=False) as live:
        while not found.over:
            time.sleep(every)
            found = status(folder)
            live.update(view(found, console.width), refresh=True)
    return found
