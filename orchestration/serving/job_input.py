"""Requests in a file, one at a time: lines of JSON, or rows of Parquet whose columns are the fields.

    {"prompt": "the _{8} of", "count": 2, "id": "a-17", "metadata": {"split": "dev"}}

`id` and `metadata` are the user's own, and come back with the answer. In a table null means that nothing is said.
"""

import codecs
import hashlib
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Annotated, Any

import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import Field
from pydantic_core import from_json

from md4.errors import UserError
from md4.samplers import wording
from orchestration.serving.errors import Refused
from orchestration.serving.messages import SampleWish

LONGEST_LINE = 1 << 24  # bytes
CARRIED = ("id", "metadata")
_BATCH = 256  # rows of a table that are unpacked at once


class JobRequest(SampleWish):
    """A line or a row."""

    id: Annotated[Any, Field(description="whatever names the line for its author")] = None
    metadata: Annotated[Any, Field(description="whatever else its author wants back")] = None


FIELDS = tuple(JobRequest.model_fields)


@dataclass(frozen=True)
class Row:
    """What stands in a line or a row."""

    content: dict[str, Any] | Refused  # fields, or why there are none
    size: int  # bytes, about


class JobInput(ABC):
    """A file of requests. `count` of them, in `rows`, any number skipped."""

    strict: bool  # whether a number in quotation marks is a mistake

    def __init__(self, path: Path):
        self.path = path
        with _readable(path), path.open("rb") as file:
            self.sha256 = hashlib.file_digest(file, "sha256").hexdigest()
            self.bytes = file.tell()

    @property
    @abstractmethod
    def count(self) -> int: ...

    @abstractmethod
    def rows(self, skip: int = 0) -> Iterator[Row]: ...

    @property
    def carried_types(self) -> dict[str, pa.DataType]:
        """Of `id` and `metadata`, where they are columns."""
        return {}

    def carried(self, rows: int) -> Iterator[tuple[int, dict[str, pa.Array]]]:
        """All rows, so many at once: how many they are, and of them the columns that have a type."""
        for begin in range(0, self.count, rows):
            yield min(rows, self.count - begin), {}


def open_input(path: Path) -> JobInput:
    """The requests in a file; its name says of what kind it is. UserError for what can't be read or is none."""
    return LinesInput(path) if kind_of(path, "--input") in LINES else TableInput(path)


LINES, TABLES = (".jsonl", ".ndjson"), (".parquet",)


def kind_of(path: Path, option: str) -> str:
    """The ending of a file's name, if it is one that is known."""
    ending = path.suffix.lower()
    if ending not in LINES + TABLES:
        raise UserError(f"{option} {path}: the name must end in {', '.join(LINES + TABLES)}")
    return ending


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, pa.ArrowException) as error:
        reason = getattr(error, "strerror", None) or next(iter(str(error).splitlines()), type(error).__name__)
        raise UserError(f"can't read {path}: {reason}") from None


class LinesInput(JobInput):
    """JSON objects, one a line. Empty lines count for nothing."""

    strict = True

    def __init__(self, path: Path):
        super().__init__(path)
        self._count = sum(1 for _ in self._lines())

    @property
    def count(self) -> int:
        return self._count

    def rows(self, skip: int = 0) -> Iterator[Row]:
        for line in islice(self._lines(), skip, None):
            size = LONGEST_LINE if line is None else len(line)
            yield Row(_object(line), size)

    def _lines(self) -> Iterator[bytes | None]:
        """Lines that are not empty; None for one that is too long to be read."""
        with _readable(self.path), self.path.open("rb") as file:
            if file.read(len(codecs.BOM_UTF8)) != codecs.BOM_UTF8:
                file.seek(0)
            while line := file.readline(LONGEST_LINE):
                if len(line) == LONGEST_LINE and not line.endswith(b"\n"):
                    while line and not line.endswith(b"\n"):
                        line = file.readline(LONGEST_LINE)
                    yield None
                elif not line.isspace():
                    yield line


def _object(line: bytes | None) -> dict[str, Any] | Refused:
    if line is None:
        return Refused(413, f"the line is longer than {LONGEST_LINE:,} bytes")
    try:
        found = from_json(line.decode().strip(), allow_inf_nan=False)
    except UnicodeDecodeError as error:
        return Refused(422, f"the line is not UTF-8: byte {line[error.start]:#04x} at {error.start}")
    except ValueError as error:
        return Refused(422, f"not valid JSON: {error}".replace(" at line 1 column ", " at character "))
    return found if isinstance(found, dict) else Refused(422, "a JSON object is wanted")


class TableInput(JobInput):
    """Rows of a Parquet file. Its columns are looked at before anything is started."""

    strict = False  # a column of whole numbers that has nulls often comes as one of floating-point numbers

    def __init__(self, path: Path):
        super().__init__(path)
        with self._table() as table:
            self._count = table.metadata.num_rows
            names = table.schema_arrow.names
            self._types = {field.name: field.type for field in table.schema_arrow if field.name in CARRIED}
        problems = [wording.unknown(name, FIELDS, "column") for name in names if name not in FIELDS]
        problems += [f"there are two columns {name!r}" for name in dict.fromkeys(names) if names.count(name) > 1]
        if problems:
            raise UserError(f"{path}: {'; '.join(problems)}. A column of your own can travel inside of 'metadata'")

    @property
    def count(self) -> int:
        return self._count

    def rows(self, skip: int = 0) -> Iterator[Row]:
        with self._table() as table:
            for batch in _from(table, skip, _BATCH):
                size = batch.nbytes // batch.num_rows
                for place in range(batch.num_rows):
                    yield Row(_fields(batch.slice(place, 1)), size)

    @property
    def carried_types(self) -> dict[str, pa.DataType]:
        return self._types

    def carried(self, rows: int) -> Iterator[tuple[int, dict[str, pa.Array]]]:
        if not self._types:
            yield from super().carried(rows)
            return
        with self._table() as table:
            for batch in table.iter_batches(rows, columns=list(self._types)):
                yield batch.num_rows, {name: batch[name] for name in self._types}

    @contextmanager
    def _table(self) -> Iterator[pq.ParquetFile]:
        with _readable(self.path), pq.ParquetFile(self.path) as table:
            yield table


def _from(table: pq.ParquetFile, skip: int, rows: int) -> Iterator[pa.RecordBatch]:
    """The rows behind the first `skip`, in batches; row groups that lie before them are not read."""
    first = 0
    while first < table.num_row_groups and skip >= table.metadata.row_group(first).num_rows:
        skip -= table.metadata.row_group(first).num_rows
        first += 1
    for batch in table.iter_batches(rows, row_groups=range(first, table.num_row_groups)):
        passed = min(skip, batch.num_rows)
        skip -= passed
        if passed < batch.num_rows:
            yield batch.slice(passed)


def _fields(row: pa.RecordBatch) -> dict[str, Any] | Refused:
    """What a row says. Of settings, too, null is not said: a column of structs has a place for each in every row."""
    try:
        (found,) = row.to_pylist(maps_as_pydicts="lossy")
    except ValueError as error:  # text that is not UTF-8; dates that Python has not
        return Refused(422, f"the row can't be read: {error}")
    said = {name: value for name, value in found.items() if value is not None}
    sampling = said.get("sampling")
    if isinstance(sampling, dict):
        said["sampling"] = {name: value for name, value in sampling.items() if value is not None}
    return said
