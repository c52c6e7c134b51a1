"""Images that lie there as image files, each to be decoded: folders and parquet."""

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.parquet as pq

from md4.errors import UserError
from pipelines.images.records import IMAGE_SUFFIXES, NO_LABEL, Record, checked, files_below, opened
from pipelines.roots import Root
from pipelines.units import SPLIT_NAMES, Unit

# -- folders of images -----------------------------------------------------------------------------------------------


def list_folder(root: Root) -> list[Unit]:
    """A unit for each file, in the order of hashes: the classes are mixed then in every part of the set."""
    found, folder = root.entries("a folder of images")
    if not folder:
        raise UserError(f"data.path={str(root)!r} is not a folder of images")
    files = [file for file in found if file.name.lower().endswith(IMAGE_SUFFIXES)]
    if not files:
        raise UserError(f"no images in {str(root)!r}: their names end in {' '.join(IMAGE_SUFFIXES)}")
    # A class may be called "train" too: topmost folders are splits only if all of them are.
    tops = {file.name.split("/")[0].lower() if "/" in file.name else "" for file in files}
    splits = SPLIT_NAMES if tops <= SPLIT_NAMES.keys() else {}
    units = []
    for file in files:
        split = splits.get(file.name.split("/")[0].lower())
        units.append(Unit("images", file.place, file.name, 0, file.size, file.stamp, split))
    units.sort(key=lambda unit: hashlib.blake2b(unit.name.encode(errors="surrogateescape")).digest())
    return units


def _class_folder(unit: Unit) -> str | None:
    """The class that an image's folder names; None for images that lie directly in the root or a split's folder."""
    folders = unit.name.split("/")[1 if unit.split else 0 : -1]
    return folders[0] if folders else None


def folder_classes(units: list[Unit]) -> list[str] | None:
    """The classes, whose places in the list are the labels: sorted by name, or by value if all are numbers."""
    found = {_class_folder(unit) for unit in units}
    if found == {None}:
        return None
    if None in found:
        lone = next(unit for unit in units if _class_folder(unit) is None)
        raise UserError(f"image {lone.file!r} lies beside the folders of the classes: it has no label, others have one")
    names = sorted(name for name in found if name)
    return sorted(names, key=int) if all(name.isascii() and name.isdigit() for name in names) else names


def folder_records(unit: Unit, classes: list[str] | None) -> Iterator[Record]:
    """The one image of a file; its label is the place of its folder in `classes`."""
    data = checked(unit.size)
    if data is None:
        with opened(unit.file) as file:
            data = file.read()
    name = _class_folder(unit)
    yield Record(unit.file, data, classes.index(name) if classes and name else None)


# -- parquet ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Columns:
    """The columns of a parquet file that hold images and labels; None stands for what they are usually called."""

    image: str | None
    label: str | None

    def find(self, name: str, schema: pa.Schema) -> tuple[str, str | None]:
        """The two names in `schema`; UserError if there are no such columns, or they hold something else."""
        there = ", ".join(schema.names)
        holders = [column.name for column in schema if _holds_bytes(column.type)]
        image = self.image or ("image" if "image" in holders else holders[0] if len(holders) == 1 else None)
        if image is None:
            raise UserError(f"{name!r}: which column holds the images? data.image_column must name it; it has {there}")
        if image not in schema.names or not _holds_bytes(schema.field(image).type):
            raise UserError(
                f"{name!r} has no column {image!r} with the bytes of images (data.image_column); it has {there}"
            )
        label = self.label or ("label" if "label" in schema.names else None)
        if label and (label not in schema.names or not pa.types.is_integer(schema.field(label).type)):
            raise UserError(f"{name!r} has no column {label!r} of whole numbers (data.label_column); it has {there}")
        return image, label


def _holds_bytes(kind: pa.DataType) -> bool:
    if pa.types.is_struct(kind):  # as the Hugging Face hub has it: the bytes, and the path they came from
        return kind.get_field_index("bytes") >= 0 and _holds_bytes(kind.field("bytes").type)
    return pa.types.is_binary(kind) or pa.types.is_large_binary(kind)


@contextmanager
def _parquet(name: str) -> Iterator[pq.ParquetFile]:
    try:
        with opened(name) as raw, pq.ParquetFile(raw) as file:
            yield file
    except (pa.ArrowException, OSError) as error:
        message = next(iter(str(error).splitlines()), type(error).__name__)
        raise UserError(f"{name!r} cannot be read as parquet: {message}") from error


def _row_groups(file: pq.ParquetFile) -> list[int]:
    """Where the row groups begin in the file."""
    starts = []
    for number in range(file.metadata.num_row_groups):
        group = file.metadata.row_group(number)
        columns = [group.column(column) for column in range(group.num_columns)]
        starts.append(min(column.dictionary_page_offset or column.data_page_offset for column in columns))
    return starts


def list_parquet(root: Root, columns: Columns) -> list[Unit]:
    """A unit for each row group; UserError if there are none, or a file lacks the columns."""
    units = []
    for found, split in files_below(root, (".parquet",), "parquet files"):
        with _parquet(found.place) as file:
            columns.find(found.place, file.schema_arrow)
            starts = _row_groups(file)
        for start, stop in zip(starts, [*starts[1:], found.size], strict=True):
            units.append(Unit("image-parquet", found.place, found.name, start, stop, found.stamp, split))
    if not units:
        raise UserError(f"the parquet files in {str(root)!r} have no rows")
    return units


def parquet_classes(root: Root, columns: Columns) -> list[str] | None:
    """The names that the Hugging Face hub's metadata give the labels."""
    found, _ = files_below(root, (".parquet",), "parquet files")[0]
    with _parquet(found.place) as file:
        schema = file.schema_arrow
    _, label = columns.find(found.place, schema)
    try:
        names = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"][label]["names"]
        return [str(name) for name in names]
    except (KeyError, TypeError, ValueError):
        return None


def parquet_records(unit: Unit, columns: Columns) -> Iterator[Record]:
    """The rows of a unit's row group; a label that is null becomes NO_LABEL."""
    with _parquet(unit.file) as file:
        image, label = columns.find(unit.file, file.schema_arrow)
        group = _row_groups(file).index(unit.start)
        table = file.read_row_group(group, columns=[image, *([label] if label else [])])
        first = sum(file.metadata.row_group(number).num_rows for number in range(group))
    labels = table[label].to_pylist() if label else None
    for number, value in enumerate(table[image]):
        content = value.as_py()
        content = content.get("bytes") if isinstance(content, dict) else content
        known = None if labels is None else NO_LABEL if labels[number] is None else labels[number]
        content = content or b""
        yield Record(f"{unit.file}: row {first + number}", checked(len(content)) or content, known)
