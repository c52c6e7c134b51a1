"""Small sets of images in every format that is read, written by these tests from the same pixels."""

import gzip
import io
import struct
import tarfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from pipelines.images import Images, Recipe, open_source, read


def some_images(count: int, shape: tuple[int, int, int] = (6, 5, 3), seed: int = 0) -> np.ndarray:
    """Random pixels `[n, H, W, C]` uint8."""
    return np.random.default_rng(seed).integers(0, 256, (count, *shape)).astype(np.uint8)


def some_labels(count: int) -> list[int]:
    return [number * 7 % 10 for number in range(count)]


def encoded(pixels: np.ndarray, form: str = "PNG", **options: object) -> bytes:
    """An image `[H, W, C]` as the contents of a file."""
    buffer = io.BytesIO()
    Image.fromarray(pixels[..., 0] if pixels.shape[2] == 1 else pixels).save(buffer, form, **options)  # type: ignore
    return buffer.getvalue()


def write_idx(file: Path, array: np.ndarray) -> Path:
    """An array of bytes as an idx file, compressed if it ends in .gz."""
    data = (
        bytes([0, 0, 8, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape) + array.astype(np.uint8).tobytes()
    )
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(gzip.compress(data) if file.suffix == ".gz" else data)
    return file


def write_mnist(folder: Path, train: int = 30, test: int = 7, end: str = ".gz") -> np.ndarray:
    """A small MNIST; returns all its images, those for training first."""
    images = some_images(train + test, (28, 28, 1))
    labels = np.array(some_labels(train + test))
    for name, part in (("train", slice(None, train)), ("t10k", slice(train, None))):
        write_idx(folder / f"{name}-images-idx3-ubyte{end}", images[part, ..., 0])
        write_idx(folder / f"{name}-labels-idx1-ubyte{end}", labels[part])
    return images


def write_cifar(
    folder: Path, images: np.ndarray, name: str = "data_batch_1.bin", labels: list[int] | None = None
) -> None:
    """Images `[n, 32, 32, 3]` in the binary format of CIFAR-10, with `some_labels` unless others are given."""
    folder.mkdir(parents=True, exist_ok=True)
    labels = some_labels(len(images)) if labels is None else labels
    records = [bytes([label]) + image.transpose(2, 0, 1).tobytes() for image, label in zip(images, labels, strict=True)]
    (folder / name).write_bytes(b"".join(records))


def write_tar(file: Path, members: dict[str, bytes]) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(file, "w:gz" if file.name.endswith("gz") else "w") as tar:
        for name, data in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return file


def write_parquet(file: Path, images: list[bytes], labels: list[int] | None = None, group: int = 4) -> Path:
    """Images as the Hugging Face hub stores them."""
    columns: dict[str, pa.Array] = {"image": pa.array([{"bytes": data, "path": None} for data in images])}
    if labels is not None:
        columns["label"] = pa.array(labels)
    file.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns), file, row_group_size=group)
    return file


def read_all(recipe: Recipe, path: Path | None, piece: int = 2**26) -> list[Images]:
    """What all units of a source hold."""
    source = open_source(recipe.kind, None if path is None else str(path), recipe.image_column, recipe.label_column)
    classes = source.class_names()
    return [read(unit, recipe, classes) for unit in source.list_units(piece)]
