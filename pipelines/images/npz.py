"""The .npz batches of downsampled ImageNet: `data` uint8 [n, 3 H W], the channels one after the other, and `labels`.

Labels count from 1 there, from 0 here. An .npz is a zip of .npy files: nothing in it is unpickled, and where `data` is
stored as it is, only the bytes of a unit are read.
"""

import math
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
from numpy.lib import format as npy

from md4.errors import UserError
from pipelines.archives import FREE_BYTES, RATIO
from pipelines.images.records import Record, files_below
from pipelines.roots import Root, opened
from pipelines.units import Unit, pieces

_HEADER_BYTES = 2**12  # of an .npy: more is not one of ours


@dataclass(frozen=True)
class _Batch:
    """What a file says of itself."""

    count: int
    side: int  # height and width
    at: int | None  # where in the file the pixels begin; None where they are compressed
    labels: bool

    @property
    def image_bytes(self) -> int:
        return 3 * self.side**2


def list_npz(root: Root, piece: int) -> list[Unit]:
    """Units of about `piece` bytes of pixels, compressed files whole; UserError if there are none."""
    units = []
    for file, split in files_below(root, (".npz",), ".npz files"):
        with _zip(file.place) as archive:
            batch = _look(file.place, archive)
        whole = max(1, piece // batch.image_bytes) * batch.image_bytes
        size = batch.count * batch.image_bytes
        units += pieces("npz", file, max(1, size) if batch.at is None else whole, size=size, split=split)
    if not units:
        raise UserError(f"the .npz files in {str(root)!r} hold no images")
    return units


@contextmanager
def _zip(name: str) -> Iterator[zipfile.ZipFile]:
    with opened(name) as file:
        try:
            with zipfile.ZipFile(file) as archive:
                yield archive
        except (zipfile.BadZipFile, EOFError, ValueError, KeyError, NotImplementedError) as error:
            raise UserError(f"{name!r} is not an .npz that can be read: {error}") from error


def _look(name: str, archive: zipfile.ZipFile) -> _Batch:
    """Check the headers, before anything is read at length. UserError if this is something else."""
    if "data.npy" not in archive.namelist():
        raise UserError(f"{name!r} has no array 'data': it has {', '.join(archive.namelist()) or 'nothing'}")
    info = archive.getinfo("data.npy")
    shape, kind, length = _header(archive, "data.npy")
    side = math.isqrt(shape[1] // 3) if len(shape) == 2 else 0
    if kind != np.uint8 or len(shape) != 2 or not side or shape[1] != 3 * side**2:
        raise UserError(f"{name!r}: its array 'data' must be uint8 [n, 3 H H], but is {kind} {list(shape)}")
    if info.file_size != length + math.prod(shape):
        raise UserError(f"{name!r} is truncated: its array 'data' has {info.file_size:,} bytes")
    if info.file_size > max(FREE_BYTES, RATIO * info.compress_size):
        raise UserError(f"{name!r}: its array 'data' unpacks to more than {RATIO} times its size: it is refused")
    labels = "labels.npy" in archive.namelist()
    if labels:
        counted, kind, _ = _header(archive, "labels.npy")
        if counted != (shape[0],) or not np.issubdtype(kind, np.integer):
            raise UserError(f"{name!r}: it has {shape[0]} images, but labels {kind} {list(counted)}")
    stored = info.compress_type == zipfile.ZIP_STORED
    return _Batch(shape[0], side, _content(archive, info) + length if stored else None, labels)


def _header(archive: zipfile.ZipFile, member: str) -> tuple[tuple[int, ...], np.dtype, int]:
    """Shape and type of an array, and the bytes before its first entry."""
    with archive.open(member) as file:
        version = npy.read_magic(file)
        if version not in ((1, 0), (2, 0)):
            raise ValueError(f"its array {member!r} has the version {version}")
        read = npy.read_array_header_1_0 if version == (1, 0) else npy.read_array_header_2_0
        shape, fortran, kind = read(file, max_header_size=_HEADER_BYTES)
        if fortran or kind.hasobject:
            raise ValueError(f"its array {member!r} is not a plain one")
        return shape, kind, file.tell()


def _content(archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> int:
    """Where in the file a stored member begins: behind a header whose names need not be those of the directory."""
    raw = archive.fp
    assert raw is not None
    raw.seek(info.header_offset + 26)
    sizes = raw.read(4)
    return info.header_offset + 30 + int.from_bytes(sizes[:2], "little") + int.from_bytes(sizes[2:], "little")


def read_npz(unit: Unit) -> tuple[bytes, np.ndarray | None, _Batch]:
    """The pixels of a unit's images and their labels from 0; UserError for a damaged file."""
    with _zip(unit.file) as archive:
        batch = _look(unit.file, archive)
        labels = None
        if batch.labels:
            first, last = unit.start // batch.image_bytes, unit.stop // batch.image_bytes
            with archive.open("labels.npy") as file:
                labels = npy.read_array(file, allow_pickle=False)[first:last].astype(np.int64) - 1
        if batch.at is None:
            with archive.open("data.npy") as file:
                npy_start = _header(archive, "data.npy")[2]
                file.read(npy_start + unit.start)
                pixels = file.read(unit.size)
        else:
            raw = archive.fp
            assert raw is not None
            raw.seek(batch.at + unit.start)
            pixels = raw.read(unit.size)
    if len(pixels) < unit.size:
        raise UserError(f"{unit.file!r} shrank while it was being prepared")
    return pixels, labels, batch


def npz_records(unit: Unit) -> Iterator[Record]:
    """Images [H, W, 3]; UserError for a damaged file."""
    pixels, labels, batch = read_npz(unit)
    images = np.frombuffer(pixels, np.uint8).reshape(-1, 3, batch.side, batch.side).transpose(0, 2, 3, 1)
    first = unit.start // batch.image_bytes
    for number, image in enumerate(images):
        label = None if labels is None else int(labels[number])
        if label is not None and label < 0:
            raise UserError(f"{unit.file!r}: image {first + number} has the label 0, but they count from 1")
        yield Record(f"{unit.file}: image {first + number}", image, label)
