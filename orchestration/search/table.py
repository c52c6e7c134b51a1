"""The live table of a study; plain lines where there is no terminal."""

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.table import Table as Grid

from orchestration.search.study import Study
from orchestration.search.trial import METRIC, TIME


@dataclass
class _Row:
    values: dict[str, Any]
    state: str = "waiting"
    round: int = 0
    tokens: int = 0
    bits: float | None = None
    error: float = 0.0


@dataclass
class Table:
    """What trials are doing, best first."""

    console: Console
    rows: dict[int, _Row] = field(default_factory=dict)
    _live: Live | None = None
    _study: Study | None = None

    @contextmanager
    def showing(self, study: Study) -> Iterator[None]:
        """Show it while the study runs."""
        self._study = study
        for trial in study.trials:
            record, known = trial.record(), trial.rounds(upto_checkpoint=True)
            points = study.space.search.algorithm != "optuna"
            row = _Row(record.values if record else study.space.point(trial.number) if points else {})
            if record is not None:
                row.state = record.ended.how if record.ended else "interrupted"
            if known:
                row.round, row.tokens, row.bits = known[-1].number, known[-1].tokens, known[-1].bits
                row.error = known[-1].error
            self.rows[trial.number] = row
        if not self.console.is_terminal:
            yield
            return
        with Live(self._grid(), console=self.console, refresh_per_second=2, get_renderable=self._grid) as live:
            self._live = live
            try:
                yield
            finally:
                self._live = None

    def began(self, number: int) -> None:
        """A trial's process is there, for the first time or again."""
        row = self._refresh(number)
        if row.state not in ("finished", "stopped"):
            row.state = "running"
            self._say(f"trial {number:03d} begins: " + _told(row.values))

    def measured(self, number: int, result: Mapping[str, Any]) -> None:
        """A trial has told a round."""
        row = self._refresh(number)
        row.round, row.tokens = result[TIME], result["tokens"]
        row.bits, row.error = result[METRIC], result["standard_error"]
        if not result["replayed"]:
            self._say(
                f"trial {number:03d} round {row.round}/{self._rounds}  {row.tokens:,} tokens  "
                f"<= {row.bits:.4f} +- {row.error:.4f}"
            )

    def ended(self, number: int) -> None:
        """A trial is over."""
        row, before = self._refresh(number), self.rows[number].state
        record = self._study.trials[number].record() if self._study else None
        if record is not None and record.ended is not None:
            row.state = record.ended.how
            why = f": {record.ended.why}" if record.ended.why else ""
            if before not in ("finished", "stopped"):
                self._say(f"trial {number:03d} {row.state}{why}")

    @property
    def _rounds(self) -> int:
        return self._study.space.search.rounds if self._study else 0

    def _refresh(self, number: int) -> _Row:
        row = self.rows.setdefault(number, _Row({}))
        record = self._study.trials[number].record() if self._study else None
        if record is not None:
            row.values = record.values
        return row

    def _say(self, line: str) -> None:
        if self._live is None:
            self.console.print(line, markup=False)

    def _grid(self) -> Grid:
        keys = list(self._study.space.space) if self._study else []
        grid = Grid(box=None, pad_edge=False)
        for name in ("trial", "state", "round", "tokens", "bits/token", "", *(key.rsplit(".", 1)[-1] for key in keys)):
            grid.add_column(name, justify="left" if name in ("trial", "state") else "right", no_wrap=True)
        order = sorted(self.rows, key=lambda number: (_sortable(self.rows[number].bits), number))
        for number in order:
            row = self.rows[number]
            figures = ["-", ""] if row.bits is None else [f"{row.bits:.4f}", f"± {row.error:.4f}"]
            grid.add_row(
                f"{number:03d}", row.state, f"{row.round}/{self._rounds}", f"{row.tokens:,}", *figures,
                *(str(row.values.get(key, "-")) for key in keys),
            )  # fmt: skip
        return grid


def _sortable(bits: float | None) -> tuple[int, float]:
    """Trials without a figure last, before them those whose figure is no finite number."""
    if bits is None:
        return 2, 0.0
    return (0, bits) if math.isfinite(bits) else (1, 0.0)


def _told(values: Mapping[str, Any]) -> str:
    return "  ".join(f"{key}={value}" for key, value in values.items())
