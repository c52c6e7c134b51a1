"""What evaluations have found, in one table: a folder of parquet files, here or in S3, that is only ever added to.

    results/
        5c1f09e2a7b34d10.parquet          the figures of one evaluation, a row each: see `Result`
        _rows/5c1f09e2a7b34d10.parquet    what single rows and samples contributed to them: see `Contributions`

A file is named by its evaluation's id, a digest of all that was asked for, and is never changed: any number of writers
may add at once, and an evaluation that is made twice counts once. Names that begin with `_` are no data to pyarrow,
pandas and Ray Data, so that the folder is one data set to them, and `results/*.parquet` to DuckDB.
"""

import hashlib
import io
import json
import math
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.dataset as ds
import pyarrow.parquet as pq
from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, ValidationError

from md4.errors import UserError
from pipelines.storage import Folder, Place

PLACE = "MD4_RESULTS"  # the variable that says where the table is
_ROWS = "_rows"
_FILE = "__filename"  # what pyarrow calls the column that says which file a row is of
_SCHEMA = pa.schema(
    [
        ("created", pa.timestamp("us", tz="UTC")),
        ("suite", pa.string()),
        ("model", pa.string()),
        ("version", pa.int64()),
        ("step", pa.int64()),
        ("weights_hash", pa.string()),
        ("metric", pa.string()),
        ("value", pa.float64()),
        ("standard_error", pa.float64()),
        ("unit", pa.string()),
        ("better", pa.string()),
        ("samples", pa.int64()),
        ("data_fingerprint", pa.string()),
        ("settings", pa.string()),
        ("report", pa.string()),
        ("attempt", pa.string()),
    ]
)
_ROW_SCHEMA = pa.schema(
    [("metric", pa.string()), ("row", pa.int64()), ("value", pa.float64()), ("influence", pa.float64())]
)


class Result(BaseModel):
    """One figure: of which weights, of what, and how sure it is."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    created: datetime = Field(description="when it was measured, UTC")
    suite: str
    model: str = Field(description="of a run its name, else the name of the registered model or of the folder")
    version: int | None = Field(None, description="in the registry")
    step: int | None = Field(None, description="training step")
    weights_hash: str
    metric: str = Field(description="such as likelihood/pydocs/validation, quality/entropy")
    value: FiniteFloat
    standard_error: float | None = Field(None, ge=0, description="of `value`; None where none is known")
    unit: str
    better: Literal["lower", "higher", "neither"]
    samples: int | None = Field(None, description="rows, samples or texts that it was measured on")
    data_fingerprint: str | None = None
    settings: str = Field(description="digest of how it was measured: only equal ones are to be compared")
    report: str | None = Field(None, description="path or url of the report with everything else")
    attempt: str = Field(description="id of the evaluation: the same for the same weights, suite and data")

    @property
    def series(self) -> tuple[str, str, str, str | None]:
        """What figures must have in common to be compared."""
        return self.metric, self.unit, self.settings, self.data_fingerprint


@dataclass(frozen=True)
class Contributions:
    """What each row, document or sample contributed to a figure.

    The influences are the figure's linearised dependence on each of its N independent parts: they sum to zero, and the
    standard error is sqrt(N / (N - 1) sum influence^2). Two evaluations of the same rows with the same seeds are
    compared by the differences of their influences: what makes a row hard for both drops out.
    """

    rows: np.ndarray  # [N] int64, ids
    values: np.ndarray  # [N] float64, of each row in the figure's unit
    influences: np.ndarray  # [N] float64

    @property
    def standard_error(self) -> float | None:
        """Of the figure; None for a single row."""
        return _spread(self.influences)

    @classmethod
    def of_mean(cls, values: np.ndarray, rows: np.ndarray | None = None) -> "Contributions":
        """To the mean of values `[N]`; rows: `[N]` ids, by default 0 to N-1."""
        values = np.asarray(values, np.float64)
        ids = np.arange(len(values)) if rows is None else rows
        return cls(ids.astype(np.int64), values, (values - values.mean()) / len(values))

    @classmethod
    def of_ratio(cls, totals: np.ndarray, sizes: np.ndarray, clusters: np.ndarray) -> "Contributions":
        """To sum(totals) / sum(sizes), of parts `[N]` of which only those of different clusters are independent."""
        ids, member = np.unique(clusters, return_inverse=True)
        sums, counts = (np.bincount(member, part.astype(np.float64), len(ids)) for part in (totals, sizes))
        ratio = sums.sum() / counts.sum()
        values = np.divide(sums, counts, out=np.full(len(ids), np.nan), where=counts > 0)
        return cls(ids.astype(np.int64), values, (sums - ratio * counts) / counts.sum())

    def through(self, change: Callable[[np.ndarray], np.ndarray], slope: float) -> "Contributions":
        """To a function of the figure, whose derivative there is `slope`: such as a perplexity."""
        return Contributions(self.rows, change(self.values), slope * self.influences)


@dataclass(frozen=True)
class Difference:
    """How much one figure is above another."""

    value: float
    standard_error: float
    paired: bool = False  # whether the error is that of differences row by row
    freedom: float = math.inf  # degrees of freedom of the error: of few rows it is itself uncertain

    @property
    def z(self) -> float:
        """The difference in standard errors; 0 for none at all."""
        if self.value == 0:
            return 0.0
        return self.value / self.standard_error if self.standard_error else math.copysign(math.inf, self.value)


def place(given: str | None = None) -> Folder:
    """Where the table is: as given, else as MD4_RESULTS says, else in results/."""
    return Folder(given or os.environ.get(PLACE) or "results")


def digest(facts: Any) -> str:
    """Short hash of plain facts (JSON): of settings, and of what an evaluation was asked for."""
    text = json.dumps(facts, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def append(table: Place, results: Iterable[Result], rows: dict[str, Contributions] | None = None) -> bool:
    """Add the figures of one evaluation, and the contributions of their rows by metric; False if it is there already.

    Visible completely or not at all: the figures come last. UserError if they are of several evaluations, or none, or
    if two have the same metric.
    """
    found, folder = list(results), Folder(table)
    attempts = sorted({one.attempt for one in found})
    if len(attempts) != 1:
        raise UserError(f"figures of one evaluation are added at once, these are of {', '.join(attempts) or 'none'}")
    (attempt,) = attempts
    metrics = [one.metric for one in found]
    if twice := sorted({metric for metric in metrics if metrics.count(metric) > 1}):
        raise UserError(f"evaluation {attempt} has two figures called {twice[0]}: each needs a name of its own")
    if has(folder, attempt):
        return False
    if rows:
        _create(folder / _ROWS, attempt, _row_table(rows))
    columns = {name: [getattr(one, name) for one in found] for name in _SCHEMA.names}
    return _create(folder, attempt, pa.table(columns, schema=_SCHEMA))


def has(table: Place, attempt: str) -> bool:
    """Is that evaluation in the table?"""
    return Folder(table).exists(f"{attempt}.parquet")


def read(
    table: Place,
    *,
    model: str | None = None,
    suite: str | None = None,
    metric: str | None = None,
    attempt: str | None = None,
) -> list[Result]:
    """The figures, the oldest first: all, or those of one model, suite, metric or evaluation. UserError that names the
    file if one can't be read, or is no part of the table."""
    folder = Folder(table)
    files, path = folder.arrow()
    names = [name for name in folder.list() if "/" not in name and name.endswith(".parquet")]
    if not names:
        return []
    wanted = {"model": model, "suite": suite, "metric": metric, "attempt": attempt}
    rule: Any = None
    for name, value in wanted.items():
        if value is not None:
            one = ds.field(name) == value
            rule = one if rule is None else rule & one
    try:
        found = _rows_of(files, [f"{path}/{name}" for name in names], rule)
    except (pa.ArrowException, OSError) as error:
        for name in names:  # which of them?
            try:
                _rows_of(files, [f"{path}/{name}"], None)
            except (pa.ArrowException, OSError) as found:
                raise _stranger(folder, name, f"it can't be read: {found}") from None
        raise UserError(f"the table of results in {folder} can't be read: {error}") from None
    rows = []
    for one in found:
        name = one.pop(_FILE).rpartition("/")[2]
        try:
            rows.append(Result.model_validate(one))
        except ValidationError as error:
            wrong = error.errors()[0]
            why = f"{wrong['loc'][0]} is {wrong['input']!r}: {wrong['msg']}"
            raise _stranger(folder, name, why) from None
    return sorted(rows, key=lambda one: (one.created, one.attempt))


def _rows_of(files: Any, paths: list[str], rule: Any) -> list[dict[str, Any]]:
    data = ds.dataset(paths, schema=_SCHEMA, filesystem=files, format="parquet")
    return data.to_table(columns=[*_SCHEMA.names, _FILE], filter=rule).to_pylist()


def _stranger(folder: Folder, name: str, why: str) -> UserError:
    return UserError(f"{folder.path(name)} is no file of a table of results ({why}): move it to another folder")


def contributions(table: Place, attempt: str) -> dict[str, Contributions]:
    """What single rows contributed, by metric; empty if that was not kept."""
    try:
        data = pq.read_table(io.BytesIO((Folder(table) / _ROWS).read(f"{attempt}.parquet")))
    except FileNotFoundError:
        return {}
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"{_ROWS}/{attempt}.parquet in {Folder(table)} can't be read: {error}") from None
    columns = {name: data[name].to_numpy() for name in ("row", "value", "influence")}
    metrics = np.array(data["metric"].to_pylist(), object)
    parts = {metric: np.flatnonzero(metrics == metric) for metric in dict.fromkeys(metrics)}
    return {metric: Contributions(*(column[part] for column in columns.values())) for metric, part in parts.items()}


def compare(a: Result, b: Result, table: Place | None = None) -> Difference:
    """How much `a` is above `b`.

    table: where both are from; where their rows are kept there and are the same, the error is that of the differences
    row by row, which is far smaller. UserError for figures that were not measured alike, or without an error.
    """
    kept = None if table is None else [contributions(table, one.attempt).get(one.metric) for one in (a, b)]
    return difference(a, b, kept)


def difference(a: Result, b: Result, rows: Sequence[Contributions | None] | None = None) -> Difference:
    """The same, with the contributions to both, if they are at hand."""
    for what in ("metric", "unit", "settings", "data_fingerprint"):
        mine, other = getattr(a, what), getattr(b, what)
        if mine != other:
            raise UserError(
                f"{_name(a)} and {_name(b)} can't be compared: {what} is {mine!r} of one, {other!r} of the other"
            )
    if rows is not None:
        first, second = rows
        if first is not None and second is not None and np.array_equal(first.rows, second.rows):
            error = _spread(first.influences - second.influences)
            if error or (error is not None and a.value == b.value):
                return Difference(a.value - b.value, error, paired=True, freedom=len(first.rows) - 1)
    if a.standard_error is None or b.standard_error is None:
        raise UserError(
            f"{a.metric} has no standard error: {_name(a)} and {_name(b)} can't be told apart by statistics"
        )
    return Difference(a.value - b.value, math.hypot(a.standard_error, b.standard_error), freedom=_welch(a, b))


def _welch(a: Result, b: Result) -> float:
    """Degrees of freedom of the error of a difference (Welch-Satterthwaite)."""
    parts = [((one.standard_error or 0) ** 2, (one.samples or 0) - 1) for one in (a, b)]
    spread = sum(square**2 / freedom for square, freedom in parts if freedom > 0)
    return sum(square for square, _ in parts) ** 2 / spread if spread else math.inf


def _name(one: Result) -> str:
    version = "" if one.version is None else f" version {one.version}"
    step = "" if one.step is None else f" step {one.step}"
    return f"{one.metric} of {one.model}{version}{step}"


def _spread(influences: np.ndarray) -> float | None:
    count = len(influences)
    return None if count < 2 else math.sqrt(count / (count - 1) * float(np.square(influences).sum()))


def _row_table(rows: dict[str, Contributions]) -> pa.Table:
    parts = [
        pa.table(
            {"metric": [metric] * len(one.rows), "row": one.rows, "value": one.values, "influence": one.influences},
            schema=_ROW_SCHEMA,
        )
        for metric, one in rows.items()
    ]
    return pa.concat_tables(parts)


def _create(folder: Folder, attempt: str, data: pa.Table) -> bool:
    """Write a file that is not there yet; False if there is one: of another writer, who measured the same."""
    out = io.BytesIO()
    pq.write_table(data, out, compression="zstd")
    try:
        folder.create(f"{attempt}.parquet", out.getvalue())
    except FileExistsError:
        return False
    return True
