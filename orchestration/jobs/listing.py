"""Jobs as a table for people."""

from collections.abc import Sequence
from datetime import datetime

from rich.table import Table

from orchestration.jobs.client import Known
from orchestration.jobs.spec import State

_STYLES = {State.RUNNING: "cyan", State.SUCCEEDED: "green", State.FAILED: "red", State.STOPPED: "yellow"}


def table(jobs: Sequence[Known]) -> Table:
    """A row a job, times in this machine's zone."""
    found = Table(box=None, pad_edge=False)
    for title in ("name", "attempt", "verb", "state", "began", "took", "labels", "place"):
        found.add_column(title, justify="right" if title in ("attempt", "took") else "left", no_wrap=True)
    for one in jobs:
        code = f" ({one.exit_code})" if one.exit_code else ""
        found.add_row(
            one.name,
            "-" if one.attempt is None else str(one.attempt),
            one.verb,
            f"{one.state.lower()}{code}",
            _time(one.began),
            _took(one),
            " ".join(f"{key}={value}" for key, value in sorted(one.labels.items())),
            one.place or "",
            style=_STYLES.get(one.state),
        )
    return found


def _time(seconds: float | None) -> str:
    return "" if seconds is None else datetime.fromtimestamp(seconds).astimezone().strftime("%Y-%m-%d %H:%M:%S")


def _took(one: Known) -> str:
    if one.began is None or one.ended is None:
        return ""
    minutes, seconds = divmod(round(one.ended - one.began), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{seconds:02d}"
