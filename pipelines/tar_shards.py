"""Rows of pictures as a webdataset tar, which any program that reads such tars can read, and an index at its end.

    00007-0001-000000.png    the first row: H x W x C, 8 bits, grey or RGB, lossless
    00007-0001-000000.cls    its label in decimal digits; not there for a row without one
    ...
    __index__                two lines of JSON: `Index`, and the bytes of this member, so that it is found from the end

webdataset passes over members whose names begin and end with `__`. Of V levels the level v has the brightness
rint(v * 255 / (V - 1)): for V <= 256 these are V different ones, hence v is found again exactly, and the picture looks
like what it shows. The order of the members, their names, times and owners follow from the rows alone.

Nothing in a tar is taken on trust. Where a picture lies follows from the index, not from the tar's headers; the bytes
of a row group are compared with their checksum before any picture is decoded, and the index with the manifest's hash.
"""

import io
import tarfile
import zlib
from dataclasses import dataclass
from typing import Literal

import numpy as np
from PIL import Image
from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt, PositiveInt

from pipelines.images.records import NO_LABEL
from pipelines.images.tokens import brightness
from pipelines.parquet_shards import LABEL_DTYPE

SUFFIX = ".tar"
_INDEX = "__index__"
_BLOCK = tarfile.BLOCKSIZE
_END = bytes(2 * _BLOCK)  # how a tar ends
_SIZE_LINE = 16  # bytes of the index' last line


@dataclass(frozen=True)
class Pictures:
    """What rows of tokens look like as pictures."""

    shape: tuple[int, int, int]  # H, W, C; C is 1 or 3
    levels: int  # V <= 256


class Index(BaseModel):
    """What a tar says of its samples, in the order of their rows."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    format: Literal["md4-tar-index"] = "md4-tar-index"
    version: Literal[1] = 1
    shape: tuple[PositiveInt, PositiveInt, Literal[1, 3]]
    levels: int = Field(ge=2, le=256)
    rows_per_group: PositiveInt
    png: list[PositiveInt]  # bytes of each picture
    cls: list[NonNegativeInt] | None  # bytes of each label, 0 for none; None where no row has one
    crc32: list[NonNegativeInt]  # of the bytes of each run of rows_per_group samples, headers included


def pack(tokens: np.ndarray, labels: np.ndarray, rows_per_group: int, pictures: Pictures, stem: str) -> bytes:
    """The tar of rows of tokens `[n, H*W*C]` with labels `[n]`, or `[0]` without any.

    stem: what the keys of the samples begin with; without a dot. The same rows give the same bytes, as long as it is
    the same version of Pillow that packs them. ValueError for tokens that are no levels.
    """
    height, width, channels = pictures.shape
    if len(tokens) and tokens.max() >= pictures.levels:
        raise ValueError(f"pictures of {pictures.levels} levels cannot have the level {tokens.max()}")
    images = brightness(tokens, pictures.levels).reshape(len(tokens), height, width, channels)
    out = io.BytesIO()
    png: list[int] = []
    cls: list[int] = []
    sums = []
    for first in range(0, len(tokens), rows_per_group):
        group = bytearray()
        for row in range(first, min(first + rows_per_group, len(tokens))):
            picture = io.BytesIO()
            Image.fromarray(images[row, ..., 0] if channels == 1 else images[row]).save(picture, "PNG")
            png.append(picture.tell())
            group += _member(f"{stem}-{row:06d}.png", picture.getvalue())
            if len(labels):
                label = b"" if labels[row] == NO_LABEL else str(labels[row]).encode()
                cls.append(len(label))
                group += _member(f"{stem}-{row:06d}.cls", label) if label else b""
        sums.append(zlib.crc32(group))
        out.write(group)
    index = Index(
        shape=(height, width, 1 if channels == 1 else 3),
        levels=pictures.levels,
        rows_per_group=rows_per_group,
        png=png,
        cls=cls if len(labels) else None,
        crc32=sums,
    )
    text = index.model_dump_json().encode() + b"\n"
    size = _padded(len(text) + _SIZE_LINE)
    out.write(_member(_INDEX, text + f"{size:{size - len(text) - 1}d}\n".encode()))
    out.write(_END)
    return out.getvalue()


def _member(name: str, data: bytes) -> bytes:
    header = tarfile.TarInfo(name)  # of time 0, user 0, mode 644
    header.size = len(data)
    return header.tobuf(tarfile.USTAR_FORMAT) + data + bytes(_padded(len(data)) - len(data))


def _padded(size: int) -> int:
    return -(-size // _BLOCK) * _BLOCK


def footer_size(tail: bytes) -> int:
    """Bytes of the footer, which is the member `__index__` and the tar's end, of the file that ends with `tail`."""
    size = int(tail[-len(_END) - _SIZE_LINE : -len(_END)])
    if size < _BLOCK:
        raise ValueError("it has no index")
    return _BLOCK + size + len(_END)


class TarContent:
    """What is in a tar, by its footer; ValueError for an index that makes no sense."""

    def __init__(self, footer: bytes, size: int):
        """size: bytes of the file."""
        text = footer[_BLOCK : -len(_END)].partition(b"\n")[0]
        self._index = index = Index.model_validate_json(text)
        png = np.array(index.png, np.int64)
        cls = np.array([0] * len(png) if index.cls is None else index.cls, np.int64)
        starts = np.arange(0, len(png), index.rows_per_group)
        if not len(png) == len(cls) or len(starts) != len(index.crc32):
            raise ValueError("its index is not consistent")
        self._labels = _BLOCK + _padded_all(png)  # of each sample: where the member of its label begins
        sizes = self._labels + np.where(cls > 0, _BLOCK + _padded_all(cls), 0)
        self._samples = np.append(0, np.cumsum(sizes))  # where each begins
        self._png, self._cls = png, cls
        if self._samples[-1] + len(footer) != size:
            raise ValueError("its index is that of another file")
        stops = np.minimum(starts + index.rows_per_group, len(png))
        self.counts = stops - starts  # rows of each row group
        self.spans = list(zip(self._samples[starts].tolist(), self._samples[stops].tolist(), strict=True))
        self._levels = np.full(256, -1)  # of each brightness; -1: of none
        self._levels[brightness(np.arange(index.levels), index.levels)] = np.arange(index.levels)

    def read(self, groups: list[int], file: io.RawIOBase) -> tuple[np.ndarray, np.ndarray]:
        """Rows `[n, L]` uint8 of row groups, one group after the other, and labels `[n]`, or `[0]` without any.

        file: has the spans of the groups at least.
        """
        tokens: list[np.ndarray] = []
        labels: list[int] = []
        for group in groups:
            start, stop = self.spans[group]
            file.seek(start)
            data = file.read(stop - start)
            if zlib.crc32(data) != self._index.crc32[group]:
                raise ValueError(f"the samples of its row group {group} are not those that were written")
            first = group * self._index.rows_per_group
            for row in range(first, first + int(self.counts[group])):
                at = int(self._samples[row]) - start
                tokens.append(self._decoded(row, data[at + _BLOCK : at + _BLOCK + int(self._png[row])]))
                label = at + int(self._labels[row]) + _BLOCK
                labels.append(int(data[label : label + int(self._cls[row])] or NO_LABEL))
        rows = np.stack(tokens) if tokens else np.empty((0, int(np.prod(self._index.shape))), np.uint8)
        return rows, np.array([] if self._index.cls is None else labels, LABEL_DTYPE)

    def _decoded(self, row: int, png: bytes) -> np.ndarray:
        """The tokens `[L]` of a picture."""
        height, width, channels = self._index.shape
        try:
            picture = Image.open(io.BytesIO(png), formats=("PNG",))
            if (picture.size, picture.mode) != ((width, height), "L" if channels == 1 else "RGB"):
                raise ValueError(f"it is {picture.height} x {picture.width}, {picture.mode}")
            pixels = np.asarray(picture).reshape(-1)
        except Exception as error:  # decoders meet damage in many ways
            raise ValueError(f"the picture of its row {row} is not the one that was written: {error}") from error
        if self._index.levels == 256:
            return pixels
        levels = self._levels[pixels]
        if levels.min() < 0:
            raise ValueError(f"the picture of its row {row} has other levels than the set")
        return levels.astype(np.uint8)


def _padded_all(sizes: np.ndarray) -> np.ndarray:
    return -(-sizes // _BLOCK) * _BLOCK
