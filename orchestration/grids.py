"""`md4 grid`: the time grids that suit a run's model best, found on rows of its own data and kept with the run."""

from collections.abc import Callable, Iterable, Sequence
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
from md4.samplers import SamplingConfig
from md4.samplers.grid_costs import Costs, by_count, estimate_costs
from md4.samplers.grid_search import candidates, search
from md4.samplers.grids import GRIDS, time_grid
from md4.samplers.saved import FOLDER, SavedSettings, check_name
from orchestration.run_mirror import deliver
from orchestration.runs import Loaded, load_model
from pipelines.config import prepared_path
from pipelines.reports import Provenance, Report, write
from pipelines.shards import ShardSet
from pipelines.storage import Folder, Place

POINTS, FREE_POINTS = 128, 512  # times to choose from, where each costs network calls and where none does


@dataclass(frozen=True)
class Search:
    """What to search, and with how much data."""

    steps: tuple[int, ...]
    rows: int = 64
    draws: int = 1
    points: int | None = None  # times to choose from; as many as cost nothing, or 128, if None
    seed: int = 0
    ema: bool = True
    split: str = "validation"
    name: str = "searched"


class Bound(BaseModel):
    """The bound of a sampler with one grid, in bits per token."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    searched: float = Field(description="on the rows that the search saw")
    checked: float = Field(description="on as many others")
    standard_error: float = Field(description="of `checked`, from the spread between rows")


class Gain(BaseModel):
    """By how much the found grid's bound is below another's, on the same rows that the search didn't see."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    bits: float = Field(description="per token")
    standard_error: float = Field(description="from the spread of the difference between rows")


class GridReport(Report):
    """A searched grid, and what it is worth beside the named ones."""

    kind: Literal["grid"] = "grid"
    grid: str = Field(description="name under which it is kept")
    steps: int
    points: int = Field(description="even times that the search could choose from, beside those of the named grids")
    draws: int = Field(description="masks of each row at each time")
    rows: int = Field(description="rows of the search, and of the check")
    uniform: Bound
    cosine: Bound
    found: Bound
    below_uniform: Gain
    below_cosine: Gain
    times: tuple[float, ...] = Field(description="the grid, from 1 down to 0: what the setting `grid` takes")

    @property
    def name(self) -> str:
        step = "" if self.model.step is None else f"-step-{self.model.step:08d}"
        named = "" if self.grid == "searched" else f"{self.grid.removeprefix('searched')}"
        return f"grid{named}-{self.steps}{step}-seed-{self.seed}"

    def headline(self) -> str:
        return (
            f"{self.steps} steps: at most {self.found.checked:.4f} +- {self.found.standard_error:.4f} bits per token, "
            f"{_words(self.below_uniform)} below the uniform grid, {_words(self.below_cosine)} below the cosine grid "
            f"(on rows not searched with)."
        )

    def table(self) -> str:
        """The bounds of the three grids, for a reader."""
        lines = [f"{self.steps} steps, bound in bits per token  search rows  other rows        searched is below by"]
        for grid in (*GRIDS, "found"):
            bound: Bound = getattr(self, grid)
            gain: Gain | None = getattr(self, f"below_{grid}", None)
            lines.append(
                f"  {self.grid if grid == 'found' else grid:<32}  {bound.searched:11.4f}  "
                f"{bound.checked:.4f} +- {bound.standard_error:.4f}  {'' if gain is None else _words(gain)}".rstrip()
            )
        return "\n".join(lines)

    def markdown(self) -> str:
        """The table, and everything else as in the JSON file."""
        rest = self.model_dump_json(indent=1, exclude={"uniform", "cosine", "found", "below_uniform", "below_cosine"})
        return f"# {self.steps} steps\n\n{self.headline()}\n\n```\n{self.table()}\n```\n\n```json\n{rest}\n```\n"


def _words(gain: Gain) -> str:
    return f"{gain.bits:.4f} +- {gain.standard_error:.4f}"


@dataclass(frozen=True)
class Rows:
    """Rows of data in two halves: one finds grids, the other measures again what they are worth.

    Of the rows of a search the best grid always looks a little too good.
    """

    data: ShardSet
    search: np.ndarray  # [R] ids
    check: np.ndarray  # [R] ids

    @classmethod
    def of(cls, loaded: Loaded, split: str, rows: int) -> "Rows":
        """Up to `rows` for either half, in turns, evenly spaced over the split. UserError for too few."""
        if rows < 1:
            raise UserError(f"rows is {rows}; at least 1 is needed")
        data = ShardSet(prepared_path(loaded.config.data), split)
        count = min(rows, data.rows // 2)
        if count < 1:
            raise UserError(f"{data.root} has {data.rows} rows in {split}; at least 2 are needed")
        ids = np.arange(2 * count) * data.rows // (2 * count)
        return cls(data, ids[::2], ids[1::2])

    def costs(
        self, loaded: Loaded, ids: np.ndarray, times: torch.Tensor, draws: int, seed: int, exact: bool = True
    ) -> Costs:
        """The costs of steps between `times` for rows `ids` [R], see `estimate_costs`."""
        tokens, labels = self.data.read_labelled(ids)
        device, known = next(loaded.model.parameters()).device, None
        if loaded.config.model.classes:
            if labels is None:
                raise UserError("the model is told a class, but the rows have no labels")
            known = torch.from_numpy(labels.astype(np.int64)).to(device)
        rows, end = torch.from_numpy(tokens.astype(np.int64)).to(device), self.data.end_of_rows
        real = None if end is None else documents.no_padding(rows, end)
        return estimate_costs(loaded.model, rows, times, draws=draws, seed=seed, labels=known, real=real, exact=exact)

    def bits(self, costs: Costs, nats: torch.Tensor) -> tuple[float, float]:
        """Nats of rows `[R]` as bits per token, padding aside, and the standard error."""
        if costs.tokens is None:
            return mean_and_error(bits_per_token(nats, self.data.length))
        return ratio_and_error(bits_per_token(nats, 1), costs.tokens, torch.arange(len(nats)))


def run(path: Place, wanted: Search, report: Callable[[str], None] = print) -> list[tuple[GridReport, str]]:
    """Search a grid of each number of steps for the model of a run's newest sound checkpoint.

    Each is kept with the run by its name and steps (`md4.samplers.saved`), and its report written; returns the reports
    and their files. Costs are estimated once for all.

    Raises `UserError` for a run without checkpoint or data, or too few rows, points or steps.
    """
    began = perf_counter()
    check_name(wanted.name)
    if not wanted.steps:
        raise UserError("steps names no number of steps")
    candidates(1 if wanted.points is None else wanted.points, wanted.steps)  # refuses what can't be
    loaded = load_model(path, ema=wanted.ema, report=report)
    points = wanted.points or (FREE_POINTS if by_count(loaded.model, loaded.config.model.length) else POINTS)
    times = candidates(points, wanted.steps)
    if torch.cuda.is_available():
        loaded.model.to("cuda")
    rows = Rows.of(loaded, wanted.split, wanted.rows)
    costs = rows.costs(loaded, rows.search, times, wanted.draws, wanted.seed, exact=False)
    grids = {steps: named_grids(steps) | {"found": search(costs, steps)} for steps in wanted.steps}
    used = union(grid for kinds in grids.values() for grid in kinds.values())
    checked = rows.costs(loaded, rows.check, used, wanted.draws, wanted.seed)
    results = []
    for steps, kinds in grids.items():
        bounds = {kind: _bound(rows, costs, checked, grid) for kind, grid in kinds.items()}
        result = GridReport(
            created=datetime.now(UTC),
            model=Provenance(run=loaded.config.name, step=loaded.step, weights_hash=loaded.weights_hash),
            data_fingerprint=rows.data.fingerprint,
            split=wanted.split,
            vocabulary=loaded.vocabulary.name,
            seed=wanted.seed,
            seconds=perf_counter() - began,
            grid=wanted.name,
            steps=steps,
            points=points,
            draws=wanted.draws,
            rows=len(rows.search),
            times=kinds["found"],
            uniform=bounds["uniform"],
            cosine=bounds["cosine"],
            found=bounds["found"],
            below_uniform=_gain(rows, checked, kinds["found"], kinds["uniform"]),
            below_cosine=_gain(rows, checked, kinds["found"], kinds["cosine"]),
        )
        file = deliver(path, "reports", partial(write, result))[0]
        keep(path, _kept(result, file))
        results.append((result, file))
    return results


def named_grids(steps: int) -> dict[str, tuple[float, ...]]:
    """The grids with a name of their own, of so many steps."""
    return {kind: tuple(time_grid(kind, steps).tolist()) for kind in GRIDS}


def union(grids: Iterable[Sequence[float]]) -> torch.Tensor:
    """All times of some grids, float64 from 1 down to 0."""
    return torch.tensor(sorted({time for grid in grids for time in grid}, reverse=True), dtype=torch.float64)


def keep(run: Place, found: SavedSettings) -> str:
    """Put settings into a run's folder, in the place of those with their name and steps; the file's path below it."""
    file = f"{FOLDER}/{found.file}"
    Folder(run).write(file, found.content())
    return file


def _kept(report: GridReport, file: str) -> SavedSettings:
    facts = report.model_dump(
        mode="json",
        include={"created", "model", "data_fingerprint", "split", "rows", "found", "below_uniform", "below_cosine"},
    )
    return SavedSettings(
        name=report.grid,
        steps=report.steps,
        settings=SamplingConfig(grid=report.times),
        facts={**facts, "report": file.rpartition("/")[2], "unit": "bits per token"},
    )


def _bound(rows: Rows, costs: Costs, checked: Costs, grid: Sequence[float]) -> Bound:
    """What a grid is worth on the rows of both tables."""
    mean, error = rows.bits(checked, checked.bound(grid))
    return Bound(searched=rows.bits(costs, costs.bound(grid))[0], checked=mean, standard_error=error)


def _gain(rows: Rows, checked: Costs, found: Sequence[float], other: Sequence[float]) -> Gain:
    bits, error = rows.bits(checked, checked.bound(other) - checked.bound(found))
    return Gain(bits=bits, standard_error=error)
