"""Tables with a column of text: parquet files, and the arrow files that Hugging Face's `datasets` writes.

Of parquet, a unit is a run of row groups; of arrow, which has no index, a file.
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager

import pyarrow as pa
import pyarrow.parquet as pq

from md4.errors import UserError
from pipelines.archives import FREE_BYTES, RATIO
from pipelines.documents import Document, Rejected
from pipelines.roots import File, Root, opened
from pipelines.storage import Pieces
from pipelines.text.names import splits_of
from pipelines.text.recipe import Recipe
from pipelines.units import SPLIT_NAMES, Unit, pieces

_FOOTER = 2**16  # bytes at the end that pyarrow reads first


@contextmanager
def _readable(name: str, what: str) -> Iterator[None]:
    try:
        yield
    except (pa.ArrowException, OSError) as error:
        message = next(iter(str(error).splitlines()), type(error).__name__)
        raise UserError(f"{name!r} cannot be read as {what}: {message}") from error


def _check_column(name: str, schema: pa.Schema, column: str) -> None:
    if column not in schema.names or not _is_text(schema.field(column).type):
        there = ", ".join(f"{field.name} ({field.type})" for field in schema) or "nothing"
        raise UserError(f"{name!r} has no column {column!r} of text (data.text_column); it has {there}")


def _is_text(kind: pa.DataType) -> bool:
    if pa.types.is_dictionary(kind):
        return _is_text(kind.value_type)
    return pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)


def _texts(column: pa.ChunkedArray, unit: Unit, first: int) -> Iterator[Document | Rejected]:
    for row, value in enumerate(column, first):
        name = f"{unit.name}:{row}"
        try:
            text = value.as_py()
        except UnicodeDecodeError as error:
            yield Rejected(name, "not UTF-8", f"byte {error.object[error.start]:#04x} at {error.start} of the text")
            continue
        yield Rejected(name, "no text", "it is null") if text is None else Document(text, name)


# -- parquet ---------------------------------------------------------------------------------------------------------


def list_parquet(root: Root, piece: int, recipe: Recipe) -> list[Unit]:
    """Units of row groups, of about `piece` bytes or one; UserError if there are none, or the column is not there."""
    files = root.files((".parquet",), "parquet files")
    return parquet_units(files, splits_of(files, root), piece, recipe, root)


def parquet_units(
    files: list[File], splits: dict[str, str | None], piece: int, recipe: Recipe, root: Root
) -> list[Unit]:
    """The units of these files, which belong to `splits`."""
    units = []
    for file in files:
        with opened(file.place) as raw, _readable(file.place, "parquet"), pq.ParquetFile(raw) as table:
            _check_column(file.place, table.schema_arrow, recipe.column)
            starts = _row_groups(table.metadata)
        edges = [*starts, file.size]
        while len(edges) > 1:
            stop = max(1, sum(edge - edges[0] <= piece for edge in edges) - 1)
            units.append(Unit("parquet", file.place, file.name, edges[0], edges[stop], file.stamp, splits[file.name]))
            edges = edges[stop:]
    if not units:
        raise UserError(f"the parquet files in {str(root)!r} have no rows")
    return units


def _row_groups(metadata: pq.FileMetaData) -> list[int]:
    """Where the row groups begin in the file."""
    starts = []
    for number in range(metadata.num_row_groups):
        group = metadata.row_group(number)
        columns = [group.column(column) for column in range(group.num_columns)]
        starts.append(min(column.dictionary_page_offset or column.data_page_offset for column in columns))
    return starts


def parquet_records(unit: Unit, data: bytes, recipe: Recipe) -> Iterator[Document | Rejected]:
    """The rows of a unit's row groups, whose bytes are `data`."""
    with opened(unit.file) as raw:
        size = raw.seek(0, 2)
        tail = _tail(raw, size)
    spans, parts = [(unit.start, unit.stop), (size - len(tail), size)], [data, tail]
    file = pa.PythonFile(Pieces(size, spans, parts), mode="r")
    with _readable(unit.file, "parquet"), pq.ParquetFile(file) as table:
        _check_column(unit.file, table.schema_arrow, recipe.column)
        starts = _row_groups(table.metadata)
        first = sum(table.metadata.row_group(number).num_rows for number, at in enumerate(starts) if at < unit.start)
        for group, at in enumerate(starts):
            if not unit.start <= at < unit.stop:
                continue
            facts = table.metadata.row_group(group)
            _check_size(unit, facts, recipe.column)
            yield from _texts(table.read_row_group(group, columns=[recipe.column])[recipe.column], unit, first)
            first += facts.num_rows


def _tail(raw, size: int) -> bytes:  # type: ignore[no-untyped-def]
    """The footer, and before it as much as pyarrow reads at once."""
    raw.seek(max(0, size - 8))
    end = raw.read(8)
    length = min(size, max(_FOOTER, int.from_bytes(end[:4], "little") + 8))
    raw.seek(size - length)
    return raw.read(length)


def _check_size(unit: Unit, group: pq.RowGroupMetaData, column: str) -> None:
    facts = next(
        facts for number in range(group.num_columns) if (facts := group.column(number)).path_in_schema == column
    )
    most = max(FREE_BYTES, RATIO * facts.total_compressed_size)
    if facts.total_uncompressed_size > most:
        raise UserError(
            f"{unit.file!r}: its column {column!r} unpacks to more than {most:,} bytes, {RATIO} times its size"
        )


# -- arrow -----------------------------------------------------------------------------------------------------------


def list_arrow(root: Root, recipe: Recipe) -> list[Unit]:
    """A unit for each arrow file of a saved dataset or of several; UserError if the column is not there."""
    files = root.files((".arrow",), "arrow files")
    splits = splits_of(files, root)
    folders = _saved_folders(root)
    units = []
    for file in files:
        parent = file.name.rpartition("/")[0]
        split = splits[file.name]
        if (
            parent in folders
        ):  # as datasets.save_to_disk writes it: the folder says which files there are, and the split
            names, split = folders[parent]
            if file.name.rpartition("/")[2] not in names:
                continue
        with opened(file.place) as raw, _readable(file.place, "arrow"), _arrow(raw) as table:
            _check_column(file.place, table.schema, recipe.column)
        units += pieces("arrow", file, piece=max(1, file.size), split=split)
    if not units:
        raise UserError(f"the arrow files in {str(root)!r} hold nothing")
    return units


def _saved_folders(root: Root) -> dict[str, tuple[set[str], str | None]]:
    """Of each folder with a state.json: the files of the dataset in it, and its split."""
    found, _ = root.entries()
    several = any(file.name.rpartition("/")[2] == "dataset_dict.json" for file in found)
    folders = {}
    for file in found:
        parent, _, name = file.name.rpartition("/")
        if name != "state.json":
            continue
        with opened(file.place) as raw:
            text = raw.read(2**24)
        try:
            state = json.loads(text)
            names = {str(part["filename"]) for part in state["_data_files"]}
            split = parent.rpartition("/")[2] if several else state.get("_split")
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise UserError(f"{file.place!r} is not the state.json of a saved dataset: {error!r}") from error
        if state.get("_indices_data_files"):
            raise UserError(
                f"{file.place!r}: the dataset was saved with indices; call flatten_indices() and save it again"
            )
        folders[parent] = names, SPLIT_NAMES.get(str(split).lower())
    return folders


def _arrow(raw):  # type: ignore[no-untyped-def]
    """A reader of either form of arrow files: the one with an index begins with its name."""
    indexed = raw.read(6) == b"ARROW1"
    raw.seek(0)
    return pa.ipc.open_file(raw) if indexed else pa.ipc.open_stream(raw)


def arrow_records(unit: Unit, data: bytes, recipe: Recipe) -> Iterator[Document | Rejected]:
    """The rows of a file."""
    with _readable(unit.file, "arrow"), _arrow(pa.BufferReader(data)) as reader:
        _check_column(unit.file, reader.schema, recipe.column)
        column = reader.read_all()[recipe.column]
        column.validate(full=False)
    yield from _texts(column, unit, 0)
