"""Images that lie in their files as arrays of pixels: the digits of scikit-learn, idx, CIFAR."""

import csv
import gzip
import importlib.util
import math
import re
import struct
import zlib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np

from md4.errors import UserError
from pipelines.images.records import Record, opened
from pipelines.roots import File, Root, local_file
from pipelines.units import Unit, pieces, split_in_name

# -- the digits of scikit-learn --------------------------------------------------------------------------------------


def list_digits() -> list[Unit]:
    """The one file, as one unit; UserError without scikit-learn."""
    found = importlib.util.find_spec("sklearn")
    if found is None or found.origin is None:
        raise UserError("the source 'digits' ships with scikit-learn, which is not installed: pip install scikit-learn")
    file = Path(found.origin).parent / "datasets" / "data" / "digits.csv.gz"
    return list(pieces("digits", local_file(file, file.name), piece=2**62))


def digits_records(unit: Unit) -> Iterator[Record]:
    """The digits, pixels [8, 8, 1]; UserError for a damaged file."""
    # The file is read as it lies there: importing scikit-learn takes a second in each of Ray's processes.
    try:
        with gzip.open(unit.file, "rt", newline="") as file:
            rows = np.array([[float(value) for value in row] for row in csv.reader(file)])
        pixels, labels = rows[:, :64].astype(np.uint8).reshape(-1, 8, 8, 1), rows[:, 64].astype(int)
    except (OSError, EOFError, ValueError, IndexError, zlib.error) as error:
        raise UserError(f"the digits of scikit-learn, {unit.file!r}, are damaged: {error}") from error
    for number, (image, label) in enumerate(zip(pixels, labels.tolist(), strict=True)):
        yield Record(f"{unit.name} line {number + 1}", image, label)


# -- idx: MNIST and its relatives ------------------------------------------------------------------------------------

_GZIP_RATIO = 1100  # more is never packed into a byte
_IDX_IMAGES = re.compile(r"images[-.]idx[34]-ubyte(\.gz)?$")


def list_idx(root: Root, piece: int) -> list[Unit]:
    """Units of about `piece` bytes of pixels; UserError if there are none, or labels are not as many as images."""
    found, folder = root.entries("a folder of idx files")
    files = [file for file in found if _IDX_IMAGES.search(file.name)]
    if not files:
        raise UserError(
            f"no idx images in {str(root)!r}: they are called like train-images-idx3-ubyte, or that with .gz"
        )
    units = []
    for file in files:
        count, *shape = _idx_header(file.place, file.size)
        stamp = file.stamp
        if labels := _idx_labels(file.place):
            stamp = max(stamp, labels.stamp)
            if (counted := _idx_header(labels.place, labels.size)) != (count,):
                raise UserError(f"{labels.place!r} has labels for {counted[0]} images, but {file.name!r} has {count}")
        size = math.prod(shape)
        split = split_in_name(file.name) if folder else None
        whole = max(1, piece // size) * size
        units += [replace(unit, stamp=stamp) for unit in pieces("idx", file, whole, size=count * size, split=split)]
    if not units:
        raise UserError(f"the idx files in {str(root)!r} hold no images")
    return units


def _idx_labels(images: str) -> File | None:
    """The file with the labels of a file of images, if there is one."""
    parent, _, name = images.rpartition("/")
    name = re.sub(r"idx[34](-ubyte)(\.gz)?$", r"idx1\1", name)
    name = name[: name.rindex("images")] + "labels" + name[name.rindex("images") + len("images") :]
    for end in ("", ".gz"):
        try:
            return Root(f"{parent}/{name}{end}").entries()[0][0]
        except UserError:
            continue
    return None


def _idx_header(path: str, file_size: int) -> tuple[int, ...]:
    """The sizes of the array in an idx file of bytes; the count of its entries comes first."""
    with opened(path) as file:
        magic = file.read(4)
        dimensions = magic[3] if len(magic) == 4 else 0
        sizes = file.read(4 * dimensions)
    if magic[:3] != b"\0\0\x08" or not 1 <= dimensions <= 4 or len(sizes) < 4 * dimensions:
        raise UserError(f"{path!r} is not an idx file of bytes: it begins with {magic.hex(' ')}")
    shape = struct.unpack(f">{dimensions}I", sizes)
    if dimensions > 1 and 0 in shape[1:]:
        raise UserError(f"{path!r} says that its images are {' x '.join(map(str, shape[1:]))}")
    if math.prod(shape) > file_size * (_GZIP_RATIO if path.endswith(".gz") else 1):
        raise UserError(f"{path!r} is truncated: its header promises {' x '.join(map(str, shape))} bytes")
    return shape


def read_idx(unit: Unit) -> tuple[bytes, bytes | None]:
    """The pixels of the unit's images and, where there are any, their labels: one byte each."""
    images = Root(unit.file).entries()[0][0]
    count, *shape = _idx_header(images.place, images.size)
    size = math.prod(shape)
    pixels = _idx_entries(images, unit.start, unit.stop, count * size, f"{count} images of {size} bytes")
    labels = _idx_labels(unit.file)
    if labels is None:
        return pixels, None
    return pixels, _idx_entries(labels, unit.start // size, unit.stop // size, count, f"{count} labels")


def _idx_entries(file: File, start: int, stop: int, total: int, promised: str) -> bytes:
    """Bytes `start..stop-1` behind the header; the last ones are read to the end, for gzip's checksum is there."""
    header = 4 + 4 * len(_idx_header(file.place, file.size))
    with opened(file.place) as content:
        content.seek(header + start)
        data = content.read(stop - start)
        if len(data) < stop - start:
            raise UserError(f"{file.place!r} is truncated: its header promises {promised}")
        if stop == total and content.read(1):
            raise UserError(f"{file.place!r} is longer than the {promised} that its header promises")
    return data


def idx_records(unit: Unit) -> Iterator[Record]:
    """Images [H, W, 1], or [H, W, C] of files with an axis of channels; UserError for damaged files."""
    pixels, labels = read_idx(unit)
    _, height, width, *channels = _idx_header(unit.file, 2**62)
    images = np.frombuffer(pixels, np.uint8).reshape(-1, height, width, *(channels or [1]))
    first = unit.start // images[0].size
    for number, image in enumerate(images):
        yield Record(f"{unit.file}: image {first + number}", image, labels[number] if labels else None)


# -- CIFAR -----------------------------------------------------------------------------------------------------------

_CIFAR_PIXELS = 3 * 32 * 32


def _cifar_files(root: Root) -> list[File]:
    """The files of the folder `root`, or of the one in it that the archives unpack to, that has the .bin files."""
    found, _ = root.entries("a folder with the binary version of CIFAR")
    for below in ("", "cifar-10-batches-bin/", "cifar-100-binary/"):
        files = [file for file in found if file.name.startswith(below) and "/" not in file.name[len(below) :]]
        if any(file.name.endswith(".bin") for file in files):
            return files
    if any(file.name.endswith("data_batch_1") for file in found):
        raise UserError(
            f"{str(root)!r} is the Python version of CIFAR, which only pickle reads: get the binary version"
        )
    raise UserError(f"no CIFAR in {str(root)!r}: a folder must hold data_batch_1.bin ..., or train.bin and test.bin")


def _cifar_labels(file: str) -> int:
    """Label bytes of a record: CIFAR-100 has a coarse and a fine one."""
    return 2 if file.rpartition("/")[2] in ("train.bin", "test.bin") else 1


def list_cifar(root: Root, piece: int) -> list[Unit]:
    """Units of about `piece` bytes; UserError if there is no CIFAR of the binary version, or a file is cut."""
    units = []
    for file in _cifar_files(root):
        name = file.name.rpartition("/")[2]
        if not name.endswith(".bin"):
            continue
        record = _cifar_labels(name) + _CIFAR_PIXELS
        if file.size % record:
            raise UserError(
                f"{file.place!r} is truncated: its {file.size} bytes are no multiple of a record's {record}"
            )
        split = "test" if name.startswith("test") else "train"
        whole = max(1, piece // record) * record
        units += pieces("cifar", replace(file, name=name), whole, split=split)
    if not units:
        raise UserError(f"the CIFAR files in {str(root)!r} are empty")
    return units


def cifar_classes(root: Root) -> list[str] | None:
    """The names of the classes, if they lie beside the images."""
    for file in _cifar_files(root):
        if file.name.rpartition("/")[2] in ("batches.meta.txt", "fine_label_names.txt"):
            with opened(file.place) as content:
                return content.read(2**16).decode(errors="replace").split()
    return None


def cifar_records(unit: Unit) -> Iterator[Record]:
    """Images [32, 32, 3] with their (fine) labels; UserError for a label that CIFAR does not have."""
    prefix = _cifar_labels(unit.file)
    with opened(unit.file) as file:
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
        yield Record(f"{unit.file}: image {first + number}", image, label)
