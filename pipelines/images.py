"""Where pictures come from: sources (`pipelines.units`) whose units hold images, and how an image becomes tokens.

    digits         the 8 x 8 handwritten digits that ship with scikit-learn: 1,797 of them, 17 grey levels
    idx            the files of MNIST and its relatives, *-images-idx3-ubyte with *-labels-idx1-ubyte, or these as .gz
    cifar          CIFAR-10 or CIFAR-100 in the "binary version"
    images         a folder of image files; the folders below it are the classes
    webdataset     a tar, or a folder of them: an image and a .cls (or .json with "label") for each sample
    image-parquet  a parquet file, or a folder of them: a column of image bytes (as the Hugging Face hub writes them)

An image has the shape [H, W, C] with one token for each number of a pixel, row by row, the channels of a pixel side by
side. A source that has a test or validation set of its own says so in the names of its files or of its topmost folders
(train, test, val...), and that set stays what it is.

Images of another size are refused (`fit` exact), or cut to the shape's proportions around their centre and then
averaged down, or enlarged bicubically (`fit` crop). Colours follow the shape: grey pictures in an RGB set become RGB,
coloured ones in a grey set their luma, transparent ones lie on white, and each such conversion is counted. What is no
image, damaged, of the wrong size or deeper than 8 bits stops the preparation, or is left out and counted (`damaged`).
"""

import csv
import gzip
import hashlib
import importlib.util
import io
import json
import math
import os
import re
import struct
import warnings
import zlib
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image, ImageOps

from md4.errors import UserError
from pipelines.units import Source, Unit, label_of, pieces, status, walk

KINDS = ("digits", "idx", "cifar", "images", "webdataset", "image-parquet")
SHAPES = {"digits": (8, 8, 1), "idx": (28, 28, 1), "cifar": (32, 32, 3)}  # where data.shape need not be given
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm")
TAR_SUFFIXES = (".tar", ".tar.gz", ".tgz")
NO_LABEL = -1  # in a labelled set, an image that has none
EXAMPLES = 10  # rejected images that are named
_SPLIT_NAMES = {
    "train": "train", "training": "train", "test": "test", "testing": "test", "t10k": "test",
    "val": "validation", "valid": "validation", "validation": "validation",
}  # fmt: skip


def native_levels(kind: str) -> int:
    """Brightness levels that the images of a source have."""
    return 17 if kind == "digits" else 256


@dataclass(frozen=True)
class Recipe:
    """How images become tokens, as the configuration has it."""

    kind: str
    shape: tuple[int, int, int]  # H, W, C; C is 1 (grey) or 3 (RGB)
    levels: int = 256  # V: a brightness v of n levels becomes the token floor(v * V / n)
    fit: Literal["exact", "crop"] = "exact"
    damaged: Literal["refuse", "skip"] = "refuse"
    image_column: str | None = None  # of parquet files
    label_column: str | None = None


@dataclass
class Notes:
    """What happened to the images on their way, by kind: counts, and the names of some that were rejected."""

    converted: Counter[str] = field(default_factory=Counter)
    rejected: Counter[str] = field(default_factory=Counter)
    examples: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Images:
    """What a unit held: n images of L = H W C tokens."""

    tokens: np.ndarray  # [n, L] uint8
    labels: np.ndarray | None  # [n] int32, NO_LABEL where there is none
    sha256: str  # of the bytes they came from
    notes: Notes


class _Rejected(Exception):
    """One image that cannot be used: why, in general and in particular."""

    def __init__(self, reason: str, detail: str):
        super().__init__(detail)
        self.reason = reason


@dataclass(frozen=True)
class _Record:
    """An image as a source gives it: file contents, or pixels uint8 [H, W, C]."""

    name: str  # for messages
    image: bytes | np.ndarray
    label: int | None


def open_source(
    kind: str, path: str | None, image_column: str | None = None, label_column: str | None = None
) -> Source:
    """The source `kind`, at `path` if it is of a kind that has one. Nothing is read yet.

    UserError for a path that is missing or not wanted.
    """
    if kind == "digits":
        if path is not None:
            raise UserError(f"data path {path!r}: the source 'digits' is found in scikit-learn and takes no path")
        names = [str(digit) for digit in range(10)]
        return Source(kind, kind, "the digits of scikit-learn", lambda _: _list_digits(), lambda: names)
    if path is None:
        raise UserError(f"data path: the source {kind!r} needs the path of a folder or a file")
    root = Path(path).expanduser().absolute()

    def existing() -> Path:
        if not root.exists():
            raise UserError(f"data path {str(root)!r} does not exist")
        return root

    columns = _Columns(image_column, label_column)
    list_units, class_names = {
        "idx": (lambda piece: _list_idx(existing(), piece), lambda: None),
        "cifar": (lambda piece: _list_cifar(existing(), piece), lambda: _cifar_classes(existing())),
        "images": (lambda _: _list_folder(existing()), lambda: _folder_classes(_list_folder(existing()))),
        "webdataset": (lambda _: _list_tars(existing()), lambda: None),
        "image-parquet": (lambda _: _list_parquet(existing(), columns), lambda: _parquet_classes(existing(), columns)),
    }[kind]
    return Source(kind, label_of(root, kind), os.path.normpath(root), list_units, class_names)


def read(unit: Unit, recipe: Recipe, classes: list[str] | None) -> Images:
    """The images of one unit as tokens. `classes` are the source's `class_names`.

    UserError for a file that cannot be read, labels that are no numbers or that only some images have, and, unless
    `recipe.damaged` says skip, for the first image that cannot be used.
    """
    notes, rows, labels = Notes(), [], []
    for record in _records(unit, recipe, classes):
        try:
            rows.append(_pixels(record.image, recipe, notes))
        except _Rejected as error:
            if recipe.damaged == "refuse":
                raise UserError(
                    f"image {record.name!r}: {error}. Set data.damaged=skip to leave such images out"
                ) from error
            notes.rejected[error.reason] += 1
            if len(notes.examples) < EXAMPLES:
                notes.examples.append(f"{record.name}: {error}")
        else:
            labels.append(_checked_label(record, labels))
    tokens = np.stack(rows) if rows else np.empty((0, math.prod(recipe.shape)), np.uint8)
    known = np.array(labels, np.int32) if labels and labels[0] is not None else None
    return Images(_quantised(tokens, recipe), known, digest(unit), notes)


def read_file(file: Path, recipe: Recipe) -> tuple[np.ndarray, Notes]:
    """The image in one file as tokens `[L]` uint8, and what was done to make it fit, by the rules of `recipe`.

    UserError for a file that cannot be read, or an image that doesn't fit.
    """
    recipe, notes = replace(recipe, kind="images"), Notes()
    height, width, _ = recipe.shape
    with _opened(str(file)) as opened:
        data = opened.read()
    try:
        picture = _decoded(data)
        if recipe.fit == "exact" and picture.size != (width, height):
            raise UserError(
                f"image {str(file)!r} is {picture.height} high and {picture.width} wide, "
                f"but the model's images are {height} high and {width} wide"
            )
        return _quantised(_pixels(data, recipe, notes), recipe), notes
    except _Rejected as error:
        raise UserError(f"image {str(file)!r}: {error}") from error


def digest(unit: Unit) -> str:
    """sha256 of everything that the unit's images and labels are made of, except for its name."""
    if unit.kind == "idx":
        pixels, labels = _read_idx(unit)
        return hashlib.sha256(pixels + (labels or b"")).hexdigest()
    state = hashlib.sha256()
    with _opened(unit.file) as file:
        file.seek(unit.start)
        left = unit.size
        while left and (data := file.read(min(left, 2**20))):
            state.update(data)
            left -= len(data)
    if left:
        raise UserError(f"{unit.file!r} shrank while it was being prepared")
    return state.hexdigest()


def _records(unit: Unit, recipe: Recipe, classes: list[str] | None) -> Iterator[_Record]:
    if unit.kind == "digits":
        return _digits_records(unit)
    if unit.kind == "idx":
        return _idx_records(unit)
    if unit.kind == "cifar":
        return _cifar_records(unit)
    if unit.kind == "images":
        return _folder_records(unit, classes)
    if unit.kind == "webdataset":
        return _tar_records(unit)
    return _parquet_records(unit, _Columns(recipe.image_column, recipe.label_column))


def _checked_label(record: _Record, others: list[int | None]) -> int | None:
    label = record.label
    if others and (label is None) != (others[0] is None):
        raise UserError(f"image {record.name!r} has {'no' if label is None else 'a'} label, unlike those before it")
    if label is not None and not NO_LABEL <= label < 2**31:
        raise UserError(f"image {record.name!r} has the label {label}; labels count from 0, and {NO_LABEL} means none")
    return label


# -- an image to tokens ----------------------------------------------------------------------------------------------


def _pixels(image: bytes | np.ndarray, recipe: Recipe, notes: Notes) -> np.ndarray:
    """An image as brightnesses `[L]` uint8; conversions are noted. Raises _Rejected where that is not possible."""
    if isinstance(image, np.ndarray):
        if image.shape == recipe.shape:
            return image.reshape(-1)
        picture = Image.fromarray(image[..., 0] if image.shape[2] == 1 else image)
    else:
        picture = _decoded(image)
    height, width, channels = recipe.shape
    picture = _coloured(picture, "L" if channels == 1 else "RGB", notes)
    if picture.size != (width, height):
        if recipe.fit == "exact":
            raise _Rejected(
                "wrong size",
                f"it is {picture.height} high and {picture.width} wide, data.shape says {height} and {width} "
                "(data.fit=crop would cut and resize it)",
            )
        notes.converted["resized"] += 1
        smaller = width <= picture.width and height <= picture.height
        picture = ImageOps.fit(picture, (width, height), Image.Resampling.BOX if smaller else Image.Resampling.BICUBIC)
    return np.asarray(picture, np.uint8).reshape(-1)


def _decoded(data: bytes) -> Image.Image:
    """The picture in a file's contents, upright."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # odd metadata
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            picture = Image.open(io.BytesIO(data))
            picture.load()
            return ImageOps.exif_transpose(picture)
    except Image.UnidentifiedImageError as error:
        raise _Rejected("not an image", "it is no image of a known format") from error
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise _Rejected("too large", f"it is too large ({error})") from error
    except MemoryError:
        raise
    except Exception as error:  # decoders meet damage in many ways
        raise _Rejected("damaged", f"it is damaged ({error or type(error).__name__})") from error


def _coloured(picture: Image.Image, mode: str, notes: Notes) -> Image.Image:
    """The picture in `mode`, L or RGB."""
    if picture.mode == mode and "transparency" not in picture.info:
        return picture
    if picture.mode.startswith(("I", "F")):
        raise _Rejected("more than 8 bits", f"its pixels have more than 8 bits (mode {picture.mode})")
    notes.converted[f"{picture.mode} to {mode}"] += 1
    if picture.has_transparency_data:
        picture = picture.convert("RGBA")
        picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture)
    return picture.convert(mode)


def _quantised(pixels: np.ndarray, recipe: Recipe) -> np.ndarray:
    native = native_levels(recipe.kind)
    if recipe.levels == native:
        return pixels
    return (pixels.astype(np.uint16) * recipe.levels // native).astype(np.uint8)


def brightness(tokens: np.ndarray, levels: int) -> np.ndarray:
    """Tokens `[...]` of `levels` levels as uint8 from black to white, for looking at."""
    return np.rint(np.asarray(tokens, np.float64) * (255 / (levels - 1))).astype(np.uint8)


# -- files -----------------------------------------------------------------------------------------------------------


@contextmanager
def _opened(name: str) -> Iterator[gzip.GzipFile | io.BufferedReader]:
    """A file, decompressed if it ends in .gz; what goes wrong with it becomes a UserError that names it."""
    try:
        with gzip.open(name) if name.endswith("ubyte.gz") else open(name, "rb") as file:
            yield file
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise UserError(f"{name!r} is damaged: {error}") from error
    except OSError as error:
        raise UserError(f"cannot read {name!r}: {error.strerror or error}") from error


def _split_in_name(name: str) -> str | None:
    """The split that a file's path tells, in its last part that has a word for one: train-00.tar, val/00.parquet."""
    for part in reversed(name.split("/")):
        for word in re.split(r"[-_.]", part.lower()):
            if word in _SPLIT_NAMES:
                return _SPLIT_NAMES[word]
    return None


def _files(root: Path, suffixes: tuple[str, ...], what: str) -> list[tuple[str, Path, str | None]]:
    """The file `root`, or those below it, as (name, path, the split that it belongs to)."""
    if not root.is_dir():
        return [(root.name, root, None)]
    found = [(name, file, _split_in_name(name)) for name, file in walk(root, suffixes)]
    if not found:
        raise UserError(f"no {what} in {str(root)!r}: a folder must hold files ending in {' or '.join(suffixes)}")
    return found


# -- the digits of scikit-learn --------------------------------------------------------------------------------------


def _list_digits() -> list[Unit]:
    found = importlib.util.find_spec("sklearn")
    if found is None or found.origin is None:
        raise UserError("the source 'digits' ships with scikit-learn, which is not installed: pip install scikit-learn")
    file = Path(found.origin).parent / "datasets" / "data" / "digits.csv.gz"
    return list(pieces("digits", file.name, file, piece=2**62))


def _digits_records(unit: Unit) -> Iterator[_Record]:
    # The file is read as it lies there: importing scikit-learn takes a second in each of Ray's processes.
    try:
        with gzip.open(unit.file, "rt", newline="") as file:
            rows = np.array([[float(value) for value in row] for row in csv.reader(file)])
        pixels, labels = rows[:, :64].astype(np.uint8).reshape(-1, 8, 8, 1), rows[:, 64].astype(int)
    except (OSError, EOFError, ValueError, IndexError, zlib.error) as error:
        raise UserError(f"the digits of scikit-learn, {unit.file!r}, are damaged: {error}") from error
    for number, (image, label) in enumerate(zip(pixels, labels.tolist(), strict=True)):
        yield _Record(f"{unit.name} line {number + 1}", image, label)


# -- idx: MNIST and its relatives ------------------------------------------------------------------------------------

_IDX_IMAGES = re.compile(r"images[-.]idx[34]-ubyte(\.gz)?$")


def _list_idx(root: Path, piece: int) -> list[Unit]:
    files = [root] if root.is_file() else sorted(file for _, file in walk(root, ("ubyte", "ubyte.gz")))
    files = [file for file in files if _IDX_IMAGES.search(file.name)]
    if not files:
        raise UserError(
            f"no idx images in {str(root)!r}: they are called like train-images-idx3-ubyte, or that with .gz"
        )
    units = []
    for file in files:
        count, *shape = _idx_header(file)
        labels = _idx_labels(file)
        stamp = status(file).st_mtime_ns
        if labels:
            stamp = max(stamp, status(labels).st_mtime_ns)
            if (counted := _idx_header(labels)) != (count,):
                raise UserError(f"{str(labels)!r} has labels for {counted[0]} images, but {file.name!r} has {count}")
        size = math.prod(shape)
        name = file.name if root.is_file() else file.relative_to(root).as_posix()
        split = None if root.is_file() else _split_in_name(name)
        whole = max(1, piece // size) * size
        units += [
            replace(unit, stamp=stamp) for unit in pieces("idx", name, file, whole, size=count * size, split=split)
        ]
    if not units:
        raise UserError(f"the idx files in {str(root)!r} hold no images")
    return units


def _idx_labels(images: Path) -> Path | None:
    """The file with the labels of a file of images, if there is one."""
    name = re.sub(r"idx[34](-ubyte)(\.gz)?$", r"idx1\1", images.name)
    name = name[: name.rindex("images")] + "labels" + name[name.rindex("images") + len("images") :]
    return next((file for end in ("", ".gz") if (file := images.with_name(name + end)).exists()), None)


def _idx_header(path: Path) -> tuple[int, ...]:
    """The sizes of the array in an idx file of bytes; the count of its entries comes first."""
    with _opened(str(path)) as file:
        magic = file.read(4)
        dimensions = magic[3] if len(magic) == 4 else 0
        sizes = file.read(4 * dimensions)
    if magic[:3] != b"\0\0\x08" or not 1 <= dimensions <= 4 or len(sizes) < 4 * dimensions:
        raise UserError(f"{str(path)!r} is not an idx file of bytes: it begins with {magic.hex(' ')}")
    shape = struct.unpack(f">{dimensions}I", sizes)
    if dimensions > 1 and 0 in shape[1:]:
        raise UserError(f"{str(path)!r} says that its images are {' x '.join(map(str, shape[1:]))}")
    return shape


def _read_idx(unit: Unit) -> tuple[bytes, bytes | None]:
    """The pixels of the unit's images and, where there are any, their labels: one byte each."""
    images = Path(unit.file)
    count, *shape = _idx_header(images)
    size = math.prod(shape)
    pixels = _idx_entries(images, unit.start, unit.stop, count * size, f"{count} images of {size} bytes")
    labels = _idx_labels(images)
    if labels is None:
        return pixels, None
    return pixels, _idx_entries(labels, unit.start // size, unit.stop // size, count, f"{count} labels")


def _idx_entries(path: Path, start: int, stop: int, total: int, promised: str) -> bytes:
    """Bytes `start..stop-1` behind the header; the last ones are read to the end, for gzip's checksum is there."""
    header = 4 + 4 * len(_idx_header(path))
    with _opened(str(path)) as file:
        file.seek(header + start)
        data = file.read(stop - start)
        if len(data) < stop - start:
            raise UserError(f"{str(path)!r} is truncated: its header promises {promised}")
        if stop == total and file.read(1):
            raise UserError(f"{str(path)!r} is longer than the {promised} that its header promises")
    return data


def _idx_records(unit: Unit) -> Iterator[_Record]:
    pixels, labels = _read_idx(unit)
    _, height, width, *channels = _idx_header(Path(unit.file))
    images = np.frombuffer(pixels, np.uint8).reshape(-1, height, width, *(channels or [1]))
    first = unit.start // images[0].size
    for number, image in enumerate(images):
        yield _Record(f"{unit.file}: image {first + number}", image, labels[number] if labels else None)


# -- CIFAR -----------------------------------------------------------------------------------------------------------

_CIFAR_PIXELS = 3 * 32 * 32


def _cifar_root(root: Path) -> Path:
    """The folder with the .bin files: `root`, or the one in it that the archives unpack to."""
    for folder in (root, root / "cifar-10-batches-bin", root / "cifar-100-binary"):
        if folder.is_dir() and any(folder.glob("*.bin")):
            return folder
    if any(root.rglob("data_batch_1")):
        raise UserError(
            f"{str(root)!r} is the Python version of CIFAR, which only pickle reads: get the binary version"
        )
    raise UserError(f"no CIFAR in {str(root)!r}: a folder must hold data_batch_1.bin ..., or train.bin and test.bin")


def _cifar_labels(file: Path) -> int:
    """Label bytes of a record: CIFAR-100 has a coarse and a fine one."""
    return 2 if file.name in ("train.bin", "test.bin") else 1


def _list_cifar(root: Path, piece: int) -> list[Unit]:
    units = []
    for file in sorted(_cifar_root(root).glob("*.bin")):
        record = _cifar_labels(file) + _CIFAR_PIXELS
        if (size := status(file).st_size) % record:
            raise UserError(f"{str(file)!r} is truncated: its {size} bytes are no multiple of a record's {record}")
        split = "test" if file.name.startswith("test") else "train"
        units += pieces("cifar", file.name, file, max(1, piece // record) * record, split=split)
    if not units:
        raise UserError(f"the CIFAR files in {str(root)!r} are empty")
    return units


def _cifar_classes(root: Path) -> list[str] | None:
    for name in ("batches.meta.txt", "fine_label_names.txt"):
        file = _cifar_root(root) / name
        if file.exists():
            return file.read_text(errors="replace").split()
    return None


def _cifar_records(unit: Unit) -> Iterator[_Record]:
    prefix = _cifar_labels(Path(unit.file))
    with _opened(unit.file) as file:
        file.seek(unit.start)
        data = np.frombuffer(file.read(unit.size), np.uint8)
    if data.size != unit.size:
        raise UserError(f"{unit.file!r} shrank while it was being prepared")
    records = data.reshape(-1, prefix + _CIFAR_PIXELS)
    images = records[:, prefix:].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
    classes = 100 if prefix == 2 else 10
    first = unit.start // records.shape[1]
    for number, (image, label) in enumerate(zip(images, records[:, prefix - 1].tolist(), strict=True)):
        if label >= classes:
            raise UserError(
                f"{unit.file!r} is damaged or no CIFAR-{classes}: image {first + number} has the label {label}"
            )
        yield _Record(f"{unit.file}: image {first + number}", image, label)


# -- folders of images -----------------------------------------------------------------------------------------------


def _list_folder(root: Path) -> list[Unit]:
    """A unit for each file, in the order of hashes: the classes are mixed then in every part of the set."""
    if not root.is_dir():
        raise UserError(f"data path {str(root)!r} is not a folder of images")
    files = walk(root, IMAGE_SUFFIXES)
    if not files:
        raise UserError(f"no images in {str(root)!r}: their names end in {' '.join(IMAGE_SUFFIXES)}")
    # A class may be called "train" too: topmost folders are splits only if all of them are.
    tops = {name.split("/")[0].lower() if "/" in name else "" for name, _ in files}
    splits = _SPLIT_NAMES if tops <= _SPLIT_NAMES.keys() else {}
    units = []
    for name, file in files:
        facts = status(file)
        split = splits.get(name.split("/")[0].lower())
        units.append(Unit("images", str(file), name, 0, facts.st_size, facts.st_mtime_ns, split))
    units.sort(key=lambda unit: hashlib.blake2b(unit.name.encode(errors="surrogateescape")).digest())
    return units


def _class_folder(unit: Unit) -> str | None:
    """The class that an image's folder names; None for images that lie directly in the root or a split's folder."""
    folders = unit.name.split("/")[1 if unit.split else 0 : -1]
    return folders[0] if folders else None


def _folder_classes(units: list[Unit]) -> list[str] | None:
    """The classes, whose places in the list are the labels: sorted by name, or by value if all are numbers."""
    found = {_class_folder(unit) for unit in units}
    if found == {None}:
        return None
    if None in found:
        lone = next(unit for unit in units if _class_folder(unit) is None)
        raise UserError(f"image {lone.file!r} lies beside the folders of the classes: it has no label, others have one")
    names = sorted(name for name in found if name)
    return sorted(names, key=int) if all(name.isascii() and name.isdigit() for name in names) else names


def _folder_records(unit: Unit, classes: list[str] | None) -> Iterator[_Record]:
    with _opened(unit.file) as file:
        data = file.read()
    name = _class_folder(unit)
    yield _Record(unit.file, data, classes.index(name) if classes and name else None)


# -- webdataset ------------------------------------------------------------------------------------------------------


def _list_tars(root: Path) -> list[Unit]:
    units = []
    for name, file, split in _files(root, TAR_SUFFIXES, "tar"):
        units += pieces("webdataset", name, file, piece=2**62, split=split)
    if not units:
        raise UserError(f"the tars in {str(root)!r} are empty")
    return units


def _tar_records(unit: Unit) -> Iterator[_Record]:
    import tarfile

    from webdataset.tariterators import group_by_keys, tar_file_iterator

    suffixes = {suffix[1:] for suffix in IMAGE_SUFFIXES}
    try:
        with open(unit.file, "rb") as file:
            members = ({**member, "__url__": unit.file} for member in tar_file_iterator(file))  # type: ignore[arg-type]
            for sample in group_by_keys(members):
                name = f"{unit.file}: {sample['__key__']}"
                key = next((key for key in sample if key.rpartition(".")[2] in suffixes), None)
                if key is None:
                    fields = ", ".join(key for key in sample if not key.startswith("__")) or "none"
                    raise UserError(f"sample {name!r} has no image: its fields are {fields}")
                yield _Record(f"{name}.{key}", sample[key], _sample_label(name, sample))
    except OSError as error:
        raise UserError(f"cannot read {unit.file!r}: {error.strerror or error}") from error
    except (tarfile.TarError, ValueError, EOFError, zlib.error) as error:
        raise UserError(f"{unit.file!r} is not a sound tar: {error.args[0] if error.args else error}") from error


def _sample_label(name: str, sample: dict[str, Any]) -> int | None:
    try:
        if "cls" in sample:
            return int(sample["cls"])
        facts = json.loads(sample.get("json", b"{}"))
        return int(facts["label"]) if isinstance(facts, dict) and "label" in facts else None
    except (ValueError, TypeError) as error:
        raise UserError(f"sample {name!r}: its label is not a number ({error})") from error


# -- parquet ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Columns:
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
        with pq.ParquetFile(name) as file:
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


def _list_parquet(root: Path, columns: _Columns) -> list[Unit]:
    units = []
    for name, path, split in _files(root, (".parquet",), "parquet files"):
        facts = status(path)
        with _parquet(str(path)) as file:
            columns.find(str(path), file.schema_arrow)
            starts = _row_groups(file)
        for start, stop in zip(starts, [*starts[1:], facts.st_size], strict=True):
            units.append(Unit("image-parquet", str(path), name, start, stop, facts.st_mtime_ns, split))
    if not units:
        raise UserError(f"the parquet files in {str(root)!r} have no rows")
    return units


def _parquet_classes(root: Path, columns: _Columns) -> list[str] | None:
    """The names that the Hugging Face hub's metadata give the labels."""
    _, path, _ = _files(root, (".parquet",), "parquet files")[0]
    with _parquet(str(path)) as file:
        schema = file.schema_arrow
    _, label = columns.find(str(path), schema)
    try:
        names = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"][label]["names"]
        return [str(name) for name in names]
    except (KeyError, TypeError, ValueError):
        return None


def _parquet_records(unit: Unit, columns: _Columns) -> Iterator[_Record]:
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
        yield _Record(f"{unit.file}: row {first + number}", content or b"", known)
