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
from pipelines.images.records import Record, opened, split_in_name
from pipelines.units import Unit, pieces, status, walk

# -- the digits of scikit-learn --------------------------------------------------------------------------------------


def list_digits() -> list[Unit]:
    """The one file, as one unit; UserError without scikit-learn."""
    found = importlib.util.find_spec("sklearn")
    if found is None or found.origin is None:
        raise UserError("the source 'digits' ships with scikit-learn, which is not installed: pip install scikit-learn")
    file = Path(found.origin).parent / "datasets" / "data" / "digits.csv.gz"
    return list(pieces("digits", file.name, file, piece=2**62))


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


def list_idx(root: Path, piece: int) -> list[Unit]:
    """Units of about `piece` bytes of pixels; UserError if there are none, or labels are not as many as images."""
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
        split = None if root.is_file() else split_in_name(name)
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
    with opened(str(path)) as file:
        magic = file.read(4)
        dimensions = magic[3] if len(magic) == 4 else 0
        sizes = file.read(4 * dimensions)
    if magic[:3] != b"\0\0\x08" or not 1 <= dimensions <= 4 or len(sizes) < 4 * dimensions:
        raise UserError(f"{str(path)!r} is not an idx file of bytes: it begins with {magic.hex(' ')}")
    shape = struct.unpack(f">{dimensions}I", sizes)
    if dimensions > 1 and 0 in shape[1:]:
        raise UserError(f"{str(path)!r} says that its images are {' x '.join(map(str, shape[1:]))}")
    if math.prod(shape) > status(path).st_size * (_GZIP_RATIO if path.suffix == ".gz" else 1):
        raise UserError(f"{str(path)!r} is truncated: its header promises {' x '.join(map(str, shape))} bytes")
    return shape


def read_idx(unit: Unit) -> tuple[bytes, bytes | None]:
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
    with opened(str(path)) as file:
        file.seek(header + start)
        data = file.read(stop - start)
        if len(data) < stop - start:
            raise UserError(f"{str(path)!r} is truncated: its header promises {promised}")
        if stop == total and file.read(1):
            raise UserError(f"{str(path)!r} is longer than the {promised} that its header promises")
    return data


def idx_records(unit: Unit) -> Iterator[Record]:
    """Images [H, W, 1], or [H, W, C] of files with an axis of channels; UserError for damaged files."""
    pixels, labels = read_idx(unit)
    _, height, width, *channels = _idx_header(Path(unit.file))
    images = np.frombuffer(pixels, np.uint8).reshape(-1, height, width, *(channels or [1]))
    first = unit.start // images[0].size
    for number, image in enumerate(images):
        yield Record(f"{unit.file}: image {first + number}", image, labels[number] if labels else None)


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


def list_cifar(root: Path, piece: int) -> list[Unit]:
    """Units of about `piece` bytes; UserError if there is no CIFAR of the binary version, or a file is cut."""
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


def cifar_classes(root: Path) -> list[str] | None:
    """The names of the classes, if they lie beside the images."""
    for name in ("batches.meta.txt", "fine_label_names.txt"):
        file = _cifar_root(root) / name
        if file.exists():
            return file.read_text(errors="replace").split()
    return None


def cifar_records(unit: Unit) -> Iterator[Record]:
    """Images [32, 32, 3] with their (fine) labels; UserError for a label that CIFAR does not have."""
    prefix = _cifar_labels(Path(unit.file))
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
