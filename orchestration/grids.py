"""`md4 grid`: the time grid that suits a run's model best, found on rows of its own data."""

from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from time import perf_counter
from typing import Literal

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, Field

from md4 import documents
from md4.errors import UserError
from md4.likelihood import mean_and_error, ratio_and_error
from md4.objectives import bits_per_token
from md4.samplers.grid_search import Costs, candidates, estimate_costs, search
from md4.samplers.grids import GRIDS, time_grid
from orchestration.run_mirror import deliver
from orchestration.runs import Loaded, load_model
from pipelines.config import prepared_path
from pipelines.reports import Provenance, Report, write
from pipelines.shards import ShardSet
from pipelines.storage import Place


@dataclass(frozen=True)
class Search:
    """What to search, and with how much data."""

    steps: int
    rows: int = 64
    draws: int = 1
    points: int = 128
    seed: int = 0
    ema: bool = True
    split: str = "validation"


class Bound(BaseModel):
    """The bound of a sampler with one grid, in bits per token."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    searched: float = Field(description="on the rows that the search saw")
    checked: float = Field(description="on as many others")
    standard_error: float = Field(description="of `checked`, from the spread between rows")
    gain: float = Field(description="by how much `checked` is below that of the uniform grid, on the same rows")
    gain_error: float = Field(description="standard error of `gain`")


class GridReport(Report):
    """A searched grid, and what it is worth beside the named ones."""

    kind: Literal["grid"] = "grid"
    steps: int
    points: int = Field(description="even times that the search could choose from, beside those of the named grids")
    draws: int = Field(description="masks of each row at each time")
    rows: int = Field(description="rows of the search, and of the check")
    uniform: Bound
    cosine: Bound
    found: Bound
    times: tuple[float, ...] = Field(description="the grid, from 1 down to 0: what the setting `grid` takes")

    @property
    def name(self) -> str:
        step = "" if self.model.step is None else f"-step-{self.model.step:08d}"
        return f"grid-{self.steps}{step}-seed-{self.seed}"

    def headline(self) -> str:
        return (
            f"{self.steps} steps: at most {self.found.checked:.4f} +- {self.found.standard_error:.4f} bits per token, "
            f"{self.found.gain:.4f} +- {self.found.gain_error:.4f} below the uniform grid (on rows not searched with)."
        )

    def table(self) -> str:
        """The bounds of the three grids, for a reader."""
        lines = [f"{self.steps} steps, bound in bits per token  search rows  other rows        below uniform"]
        for grid in ("uniform", "cosine", "found"):
            bound: Bound = getattr(self, grid)
            title = {"found": "searched"}.get(grid, grid)
            lines.append(
                f"  {title:<32}  {bound.searched:11.4f}  {bound.checked:.4f} +- {bound.standard_error:.4f}  "
                f"{bound.gain:.4f} +- {bound.gain_error:.4f}"
            )
        return "\n".join(lines)

    def markdown(self) -> str:
        """The table, and everything else as in the JSON file."""
        rest = self.model_dump_json(indent=1, exclude={"uniform", "cosine", "found"})
        return f"# {self.steps} steps\n\n{self.headline()}\n\n```\n{self.table()}\n```\n\n```json\n{rest}\n```\n"


def run(path: Place, wanted: Search, report: Callable[[str], None] = print) -> tuple[GridReport, str]:
    """Search a grid for the model of a run's newest sound checkpoint; writes the report, returns it and its file.

    Every second row finds the grid, the others measure again what it is worth: of the rows of a search the best grid
    always looks a little too good.

    Raises `UserError` for a run without checkpoint or data, a GenMD4 model, or too few rows.
    """
    began = perf_counter()
    if wanted.rows < 1:
        raise UserError(f"rows is {wanted.rows}; at least 1 is needed")
    times = candidates(wanted.points, wanted.steps)
    loaded = load_model(path, ema=wanted.ema, report=report)
    data = ShardSet(prepared_path(loaded.config.data), wanted.split)
    rows = min(wanted.rows, data.rows // 2)
    if rows < 1:
        raise UserError(f"{data.root} has {data.rows} rows in {wanted.split}; at least 2 are needed")
    ids = np.arange(2 * rows) * data.rows // (2 * rows)
    costs = _costs(loaded, data, ids[::2], times, wanted)
    grids = {kind: tuple(time_grid(kind, wanted.steps).tolist()) for kind in GRIDS} | {
        "found": search(costs, wanted.steps)
    }
    used = torch.tensor(sorted({time for grid in grids.values() for time in grid}, reverse=True), dtype=torch.float64)
    checked = _costs(loaded, data, ids[1::2], used, wanted)

    bounds = {kind: _bound(costs, checked, grid, grids["uniform"], data.length) for kind, grid in grids.items()}
    result = GridReport(
        created=datetime.now(UTC),
        model=Provenance(run=loaded.config.name, step=loaded.step, weights_hash=loaded.weights_hash),
        data_fingerprint=data.fingerprint,
        split=wanted.split,
        vocabulary=loaded.vocabulary.name,
        seed=wanted.seed,
        seconds=perf_counter() - began,
        steps=wanted.steps,
        points=wanted.points,
        draws=wanted.draws,
        rows=rows,
        times=grids["found"],
        uniform=bounds["uniform"],
        cosine=bounds["cosine"],
        found=bounds["found"],
    )
    return result, deliver(path, "reports", partial(write, result))[0]


def _bound(costs: Costs, checked: Costs, grid: tuple[float, ...], uniform: tuple[float, ...], length: int) -> Bound:
    """What a grid is worth on the rows of both tables, and beside the uniform one."""
    mean, error = _bits(checked, checked.bound(grid), length)
    gain, gain_error = _bits(checked, checked.bound(uniform) - checked.bound(grid), length)
    searched, _ = _bits(costs, costs.bound(grid), length)
    return Bound(searched=searched, checked=mean, standard_error=error, gain=gain, gain_error=gain_error)


def _bits(costs: Costs, nats: torch.Tensor, length: int) -> tuple[float, float]:
    """Nats of rows `[B]` as bits per token, padding aside, and the standard error."""
    if costs.tokens is None:
        return mean_and_error(bits_per_token(nats, length))
    return ratio_and_error(bits_per_token(nats, 1), costs.tokens, torch.arange(len(nats)))


def _costs(loaded: Loaded, data: ShardSet, ids: np.ndarray, times: torch.Tensor, wanted: Search) -> Costs:
    tokens, labels = data.read_labelled(ids)
    known = None
    if loaded.config.model.classes:
        if labels is None:
            raise UserError("the model is told a class, but the rows have no labels")
        known = torch.from_numpy(labels.astype(np.int64))
    rows, end = torch.from_numpy(tokens.astype(np.int64)), data.end_of_rows
    real = None if end is None else documents.no_padding(rows, end)
    return estimate_costs(loaded.model, rows, times, draws=wanted.draws, seed=wanted.seed, labels=known, real=real)
