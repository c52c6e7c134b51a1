"""How well a model knows a prepared set: its likelihood bound in bits per token, with everything needed to repeat it.

`evaluate` gives a report, `write` puts it into a folder as JSON (for programs) and Markdown (for people). A number
never stands without its estimator, the number of draws and its standard error (contract C7).
"""

import hashlib
import math
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from time import perf_counter
from typing import Literal

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, Field
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from md4.errors import UserError
from md4.likelihood import estimator_name, mean_and_error, nelbo
from md4.objectives import MD4
from pipelines.shards import ShardSet, write_atomically


class Provenance(BaseModel):
    """Which weights were looked at."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    run: str | None = Field(default=None, description="name of the run")
    step: int | None = Field(default=None, description="training step of the checkpoint")
    weights_hash: str | None = Field(default=None, description="of the checkpoint's tensors")


class Report(BaseModel):
    """What every report says; each kind adds its own results."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    kind: str
    created: datetime
    model: Provenance
    data_fingerprint: str = Field(description="of the prepared set")
    split: str
    vocabulary: str
    seed: int
    seconds: float

    @property
    def name(self) -> str:
        """Stem of the report's files: a later checkpoint, another split or another seed doesn't overwrite it."""
        step = "" if self.model.step is None else f"-step-{self.model.step:08d}"
        return f"{self.kind}-{self.split}{step}-seed-{self.seed}"

    def headline(self) -> str:
        """The result in one sentence."""
        raise NotImplementedError

    def markdown(self) -> str:
        """The report for people: the result, then all facts."""
        facts = {**self.model_dump(mode="json", exclude={"model"}), **self.model.model_dump(mode="json")}
        rows = "\n".join(f"| {name.replace('_', ' ')} | {_show(value)} |" for name, value in facts.items())
        return f"# {self.kind.capitalize()} on {self.split}\n\n{self.headline()}\n\n| | |\n|---|---|\n{rows}\n"


class LikelihoodReport(Report):
    """The negative ELBO, an upper bound on the negative log-likelihood."""

    kind: Literal["likelihood"] = "likelihood"
    estimator: str = Field(description="of the bound, see md4.likelihood; different ones are not to be compared")
    draws: int = Field(description="Monte Carlo draws for each row, stratified")
    rows: int = Field(description="rows evaluated")
    rows_available: int
    window: int = Field(description="tokens of a row: what the model sees at once")
    bits_per_token: float = Field(description="of text8's characters: bits per character")
    standard_error: float = Field(description="of bits_per_token, from the spread between rows")
    perplexity: float = Field(description="per token: 2 ^ bits_per_token")
    perplexity_error: float = Field(description="standard error of the perplexity")

    def headline(self) -> str:
        unit = "bits per character" if self.vocabulary == "text8" else "bits per token"
        return (
            f"At most {self.bits_per_token:.4f} +- {self.standard_error:.4f} {unit} "
            f"({self.estimator}, {self.rows:,} rows, {self.draws} draws each)."
        )


def evaluate(
    model: MD4,
    data: ShardSet | np.ndarray,
    *,
    draws: int = 16,
    limit: int | None = None,
    batch_size: int = 64,
    seed: int = 0,
    estimator: str = "mask_count",
    provenance: Provenance | None = None,
    vocabulary: str = "unknown",
    progress: bool = True,
) -> LikelihoodReport:
    """Estimate the bound on the rows of a prepared split, or on rows of tokens `[N, L]`.

    limit: evaluate this many rows, evenly spaced over the set; all if None. batch_size: rows that go through the
    network at once; doesn't change the result. vocabulary: named in the report where `data` is an array.

    A row's noise depends on the seed and the row's id alone. Raises `UserError` for an empty set, tokens that the model
    doesn't know, numbers below 1, an unknown estimator, or a network whose answer is not finite.
    """
    began = perf_counter()
    source = _Array(data, vocabulary) if isinstance(data, np.ndarray) else _Split(data)
    for name, value in {"limit": limit, "batch_size": batch_size}.items():
        if value is not None and value < 1:
            raise UserError(f"{name} is {value}; at least 1 is needed")
    if source.rows == 0:
        raise UserError(f"the {source.split} split has no rows to evaluate")
    count = source.rows if limit is None else min(limit, source.rows)
    ids = np.arange(count, dtype=np.int64) * source.rows // count

    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    per_row = []
    for part in _shown(ids, batch_size, progress):
        tokens = torch.from_numpy(source.read(part).astype(np.int64))
        if tokens.max() >= model.vocab_size:
            raise UserError(f"the set holds token {int(tokens.max())}, the model knows 0..{model.vocab_size - 1}")
        nats = nelbo(model, tokens.to(device), draws=draws, seed=seed, ids=torch.from_numpy(part), estimator=estimator)
        per_row.append(nats.mean(dim=1).cpu())

    nats, error = mean_and_error(torch.cat(per_row) / source.window)
    return LikelihoodReport(
        created=datetime.now(UTC),
        model=provenance or Provenance(),
        data_fingerprint=source.fingerprint,
        split=source.split,
        vocabulary=source.vocabulary,
        seed=seed,
        seconds=perf_counter() - began,
        estimator=estimator_name(model, estimator),
        draws=draws,
        rows=count,
        rows_available=source.rows,
        window=source.window,
        bits_per_token=nats / math.log(2),
        standard_error=error / math.log(2),
        perplexity=math.exp(nats),
        perplexity_error=math.exp(nats) * error,
    )


def write(report: Report, folder: str | Path) -> tuple[Path, Path]:
    """Put a report into `folder` (made if need be) as NAME.json and NAME.md; returns both paths."""
    stem = Path(folder) / report.name
    json_file, markdown_file = stem.with_name(f"{stem.name}.json"), stem.with_name(f"{stem.name}.md")
    write_atomically(json_file, (report.model_dump_json(indent=2) + "\n").encode())
    write_atomically(markdown_file, report.markdown().encode())
    return json_file, markdown_file


class _Split:
    """A split of a prepared set, as `evaluate` sees it."""

    def __init__(self, shards: ShardSet) -> None:
        self.rows, self.window, self.split = shards.rows, shards.length, shards.split
        self.fingerprint, self.vocabulary = shards.fingerprint, shards.vocabulary.name
        self.read = shards.read


class _Array:
    """Rows in memory `[N, L]`, as `evaluate` sees them."""

    def __init__(self, rows: np.ndarray, vocabulary: str) -> None:
        if rows.ndim != 2:
            raise UserError(f"rows have the shape [N, L], not {list(rows.shape)}")
        self._array = rows
        self.rows, self.window, self.split = len(rows), rows.shape[1], "array"
        self.fingerprint = hashlib.sha256(np.ascontiguousarray(rows).tobytes()).hexdigest()
        self.vocabulary = vocabulary

    def read(self, ids: np.ndarray) -> np.ndarray:
        return self._array[ids]


def _shown(ids: np.ndarray, batch_size: int, progress: bool) -> Iterator[np.ndarray]:
    """The ids in batches, with a progress bar on a terminal."""
    console = Console(stderr=True)
    columns = (TextColumn("evaluating"), BarColumn(), MofNCompleteColumn(), TextColumn("rows"), TimeRemainingColumn())
    with Progress(*columns, console=console, disable=not (progress and console.is_terminal), transient=True) as bar:
        task = bar.add_task("", total=len(ids))
        for start in range(0, len(ids), batch_size):
            part = ids[start : start + batch_size]
            yield part
            bar.advance(task, len(part))


def _show(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.6g}"
    return "-" if value is None else f"{value:,}" if isinstance(value, int) else str(value)
