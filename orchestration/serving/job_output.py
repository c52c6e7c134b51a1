"""What a job writes: a record for each request, in their order, as lines of JSON or as a table.

Records are always written as lines first, each at once, so that whatever ends the job leaves what it has done. Of a
table the lines stand beside it, in OUTPUT.lines, until all are there; then it is written whole, and they go.
"""

import fcntl
import json
import os
from collections.abc import Container, Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import BaseModel, Field
from pydantic_core import from_json, to_json

from md4.errors import UserError
from orchestration.sampling import ModelFacts
from orchestration.serving.job_input import CARRIED, JobInput
from orchestration.serving.messages import Drawn
from pipelines.storage import sync_folder

_ROWS = 512  # of a row group


class JobProblem(BaseModel):
    """Why there are no samples."""

    status: int = Field(description="what HTTP would have answered")
    detail: str


class JobRecord(BaseModel):
    """What became of a request."""

    index: int = Field(description="of the request in the input, from 0")
    id: Any = Field(default=None, description="what the request gave")
    metadata: Any = Field(default=None, description="what the request gave")
    samples: list[Drawn] | None = Field(default=None, description="null if there is an error")
    model: ModelFacts
    error: JobProblem | None = None

    def line(self) -> bytes:
        """JSON, with the end of the line. What JSON has no form for becomes text; bytes base64, no number null."""
        written = to_json(self.model_dump(), bytes_mode="base64", inf_nan_mode="null", fallback=str)
        return written + b"\n"


# Columns of a table, those that a request gives apart.
_SAMPLE = pa.struct(
    {
        "text": pa.string(),
        "seed": pa.int64(),
        "calls": pa.int64(),
        "draws": pa.int64(),
        "counted": pa.map_(pa.string(), pa.int64()),
        "stopped": pa.bool_(),
        "order": pa.list_(pa.int64()),
        "prompt_tokens": pa.int64(),
        "completion_tokens": pa.int64(),
        "completion": pa.string(),
        "png": pa.string(),
    }
)
_COLUMNS = {
    "samples": pa.list_(_SAMPLE),
    "model": pa.struct({"hash": pa.string(), "step": pa.int64()}),
    "error": pa.struct({"status": pa.int64(), "detail": pa.string()}),
}


class Lines:
    """A file of records that only grows. One process has it at a time."""

    def __init__(self, path: Path):
        self.path = path
        self.answered = self.refused = 0
        self.problem: str | None = None  # the first one
        with _writable(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = path.open("a+b", buffering=0)
            try:
                fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                self._file.close()
                raise UserError(f"{path} is being written by another job") from None
        try:
            self._find_end()
        except BaseException:
            self._file.close()
            raise

    @property
    def count(self) -> int:
        """Records in the file."""
        return self.answered + self.refused

    def write(self, record: JobRecord) -> None:
        with _writable(self.path):
            left = memoryview(record.line())
            while left:
                left = left[self._file.write(left) :]
        self._note(None if record.error is None else record.error.detail)

    def close(self) -> None:
        """Once more than before: the disk has it, too."""
        with _writable(self.path):
            os.fsync(self._file.fileno())
            self._file.close()
            sync_folder(self.path.parent)

    def _note(self, problem: str | None) -> None:
        self.answered += problem is None
        self.refused += problem is not None
        if self.problem is None:
            self.problem = problem

    def _find_end(self) -> None:
        """Count what is there, and cut off a line that was not finished."""
        end = 0
        with self.path.open("rb") as file:
            for line in file:
                if not line.endswith(b"\n"):
                    break
                try:
                    record = JobRecord.model_validate(from_json(line))
                except ValueError:
                    record = None
                if record is None or record.index != self.count:
                    raise UserError(f"{self.path}: line {self.count + 1} is not what a job has written there")
                self._note(None if record.error is None else record.error.detail)
                end += len(line)
        with _writable(self.path):
            self._file.truncate(end)


def write_table(lines: Path, source: JobInput, path: Path) -> None:
    """The records in `lines` as a table at `path`, which is there completely or not at all.

    `id` and `metadata` keep their types if the requests came in a table; else they are text, JSON if they were none.
    """
    types = source.carried_types
    columns = {"index": pa.int64(), **{name: types.get(name, pa.string()) for name in CARRIED}, **_COLUMNS}
    schema = pa.schema(list(columns.items()))
    temporary = path.with_name(f"{path.name}.tmp")
    with _writable(path):
        try:
            with lines.open("rb") as file, pq.ParquetWriter(temporary, schema, compression="zstd") as writer:
                for rows, given in source.carried(_ROWS):
                    records = [_plain(from_json(line), types) for line in islice(file, rows)]
                    table = pa.Table.from_pylist(records, schema)
                    for name, column in given.items():
                        table = table.set_column(schema.get_field_index(name), schema.field(name), column)
                    writer.write_table(table)
            with temporary.open("rb") as file:
                os.fsync(file.fileno())
            os.replace(temporary, path)
            sync_folder(path.parent)
        finally:
            temporary.unlink(missing_ok=True)


def _plain(record: dict[str, Any], types: Container[str]) -> dict[str, Any]:
    for name in CARRIED:
        value = None if name in types else record[name]
        record[name] = value if value is None or isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return record


@contextmanager
def _writable(path: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, pa.ArrowException) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise UserError(f"can't write {path}: {reason}; once it can be, --resume goes on") from None
