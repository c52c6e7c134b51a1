"""The sources of images from outside: what they list, and the images of a unit as tokens."""

import hashlib
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from md4.errors import UserError
from pipelines import documents
from pipelines.images import arrays, files, npz, tars
from pipelines.images.records import NO_LABEL, Record, Rejected, opened
from pipelines.images.tokens import Notes, Recipe, decoded, pixels_of, quantised
from pipelines.roots import Root
from pipelines.units import Source, Unit

KINDS = ("digits", "idx", "cifar", "npz", "images", "webdataset", "image-parquet")
SHAPES = {"digits": (8, 8, 1), "idx": (28, 28, 1), "cifar": (32, 32, 3)}  # where data.shape need not be given
EXAMPLES = 10  # rejected images that are named


@dataclass(frozen=True)
class Images:
    """What a unit held: n images of L = H W C tokens."""

    tokens: np.ndarray  # [n, L] uint8
    labels: np.ndarray | None  # [n] int32, NO_LABEL where there is none
    sha256: str  # of the bytes they came from
    notes: Notes


def open_source(
    kind: str, path: str | None, image_column: str | None = None, label_column: str | None = None
) -> Source:
    """The source `kind`, at `path` if it is of a kind that has one. Nothing is read yet.

    UserError for a path that is missing or not wanted.
    """
    if kind == "digits":
        if path is not None:
            raise UserError(f"data.path={path!r}: the source 'digits' is found in scikit-learn and takes no path")
        names = [str(digit) for digit in range(10)]
        return Source(kind, kind, "the digits of scikit-learn", lambda _: arrays.list_digits(), lambda: names)
    if path is None:
        raise UserError(f"data.path is missing: the source {kind!r} needs the path of a folder or a file")
    root = Root(path)
    columns = files.Columns(image_column, label_column)
    list_units, class_names = {
        "idx": (lambda piece: arrays.list_idx(root, piece), lambda: None),
        "cifar": (lambda piece: arrays.list_cifar(root, piece), lambda: arrays.cifar_classes(root)),
        "npz": (lambda piece: npz.list_npz(root, piece), lambda: None),
        "images": (
            lambda _: files.list_folder(root),
            lambda: files.folder_classes(files.list_folder(root)),
        ),
        "webdataset": (lambda _: tars.list_tars(root), lambda: None),
        "image-parquet": (
            lambda _: files.list_parquet(root, columns),
            lambda: files.parquet_classes(root, columns),
        ),
    }[kind]
    return Source(kind, root.label(kind), root.url, list_units, class_names)


def read(unit: Unit, recipe: Recipe, classes: list[str] | None) -> Images:
    """The images of one unit as tokens. `classes` are the source's `class_names`.

    UserError for a file that cannot be read, labels that are no numbers or that only some images have, and, unless
    `recipe.damaged` says skip, for the first image that cannot be used.
    """
    notes, rows, labels = Notes(), [], []
    for record in _records(unit, recipe, classes):
        try:
            if isinstance(record.image, Rejected):
                raise record.image
            rows.append(pixels_of(record.image, recipe, notes))
        except Rejected as error:
            if recipe.damaged == "refuse":
                raise UserError(
                    f"image {record.name!r}: {error}. Set data.damaged=skip to leave such images out"
                ) from error
            notes.rejected[error.reason] += 1
            notes.left_out.append(documents.Rejected(record.name, error.reason, str(error)))
            if len(notes.examples) < EXAMPLES:
                notes.examples.append(f"{record.name}: {error}")
        else:
            labels.append(_checked_label(record, labels))
    tokens = np.stack(rows) if rows else np.empty((0, math.prod(recipe.shape)), np.uint8)
    known = np.array(labels, np.int32) if labels and labels[0] is not None else None
    return Images(quantised(tokens, recipe), known, digest(unit), notes)


def read_file(file: Path, recipe: Recipe) -> tuple[np.ndarray, Notes]:
    """The image in one file as tokens `[L]` uint8, and what was done to make it fit, by the rules of `recipe`.

    UserError for a file that cannot be read, or an image that doesn't fit.
    """
    with opened(str(file)) as stream:
        return read_bytes(stream.read(), repr(str(file)), recipe)


def read_bytes(data: bytes, name: str, recipe: Recipe) -> tuple[np.ndarray, Notes]:
    """The same of a file's contents; `name` is what messages call it."""
    recipe, notes = replace(recipe, kind="images"), Notes()
    height, width, _ = recipe.shape
    try:
        picture = decoded(data)
        if recipe.fit == "exact" and picture.size != (width, height):
            raise UserError(
                f"image {name} is {picture.height} high and {picture.width} wide, "
                f"but the model's images are {height} high and {width} wide"
            )
        return quantised(pixels_of(data, recipe, notes), recipe), notes
    except Rejected as error:
        raise UserError(f"image {name}: {error}") from error


def digest(unit: Unit) -> str:
    """sha256 of everything that the unit's images and labels are made of, except for its name."""
    if unit.kind == "idx":
        pixels, labels = arrays.read_idx(unit)
        return hashlib.sha256(pixels + (labels or b"")).hexdigest()
    if unit.kind == "npz":
        pixels, labels, _ = npz.read_npz(unit)
        return hashlib.sha256(pixels + (b"" if labels is None else labels.tobytes())).hexdigest()
    state = hashlib.sha256()
    with opened(unit.file) as file:
        file.seek(unit.start)
        left = unit.size
        while left and (data := file.read(min(left, 2**20))):
            state.update(data)
            left -= len(data)
    if left:
        raise UserError(f"{unit.file!r} shrank while it was being prepared")
    return state.hexdigest()


def _records(unit: Unit, recipe: Recipe, classes: list[str] | None) -> Iterator[Record]:
    if unit.kind == "digits":
        return arrays.digits_records(unit)
    if unit.kind == "idx":
        return arrays.idx_records(unit)
    if unit.kind == "cifar":
        return arrays.cifar_records(unit)
    if unit.kind == "npz":
        return npz.npz_records(unit)
    if unit.kind == "images":
        return files.folder_records(unit, classes)
    if unit.kind == "webdataset":
        return tars.tar_records(unit)
    return files.parquet_records(unit, files.Columns(recipe.image_column, recipe.label_column))


def _checked_label(record: Record, others: list[int | None]) -> int | None:
    label = record.label
    if others and (label is None) != (others[0] is None):
        raise UserError(f"image {record.name!r} has {'no' if label is None else 'a'} label, unlike those before it")
    if label is not None and not NO_LABEL <= label < 2**31:
        raise UserError(f"image {record.name!r} has the label {label}; labels count from 0, and {NO_LABEL} means none")
    return label
