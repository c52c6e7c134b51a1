"""Digits, idx and CIFAR: the pixels and labels that went in, and one clear message for each thing wrong."""

import gzip
from pathlib import Path

import numpy as np
import pytest

from md4.errors import UserError
from pipelines.images import Recipe, open_source, read
from tests.pipelines.pictures import read_all, some_images, some_labels, write_cifar, write_idx, write_mnist
from tests.shared import shared

RGB = (6, 5, 3)


def test_digits_are_those_of_scikit_learn():
    from sklearn.datasets import load_digits

    (found,) = read_all(Recipe("digits", (8, 8, 1), 17), None)
    digits = load_digits()
    assert np.array_equal(found.tokens, digits.data.astype(np.uint8))
    assert np.array_equal(found.labels, digits.target)
    assert (found.tokens.min(), found.tokens.max()) == (0, 16)


@pytest.mark.parametrize("end", ["", ".gz"])
@pytest.mark.parametrize("piece", [784 * 4 + 5, 10**6])
def test_idx(tmp_path, end, piece):
    images = write_mnist(tmp_path, end=end)
    units = open_source("idx", str(tmp_path)).list_units(piece)
    assert {unit.split for unit in units} == {"train", "test"}
    units.sort(key=lambda unit: (unit.split != "train", unit.start))
    found = [read(unit, Recipe("idx", (28, 28, 1)), None) for unit in units]
    assert np.array_equal(np.concatenate([part.tokens for part in found]), images.reshape(37, -1))
    assert np.concatenate([part.labels for part in found]).tolist() == some_labels(37)
    assert len(found) == (2 if piece == 10**6 else 8 + 2)


def test_idx_without_labels_and_in_colour(tmp_path):
    images = some_images(3)
    write_idx(tmp_path / "some.images-idx4-ubyte", images)
    (found,) = read_all(Recipe("idx", RGB), tmp_path)
    assert np.array_equal(found.tokens.reshape(images.shape), images)
    assert found.labels is None


def test_cifar_10(tmp_path):
    images = some_images(20, (32, 32, 3))
    write_cifar(tmp_path / "cifar-10-batches-bin", images[:15])
    write_cifar(tmp_path / "cifar-10-batches-bin", images[15:], "test_batch.bin")
    (tmp_path / "cifar-10-batches-bin" / "batches.meta.txt").write_text("airplane\nautomobile\n\n")
    found = read_all(Recipe("cifar", (32, 32, 3)), tmp_path, piece=3073 * 8)
    assert np.array_equal(np.concatenate([part.tokens for part in found]), images.reshape(20, -1))
    assert [len(part.tokens) for part in found] == [8, 7, 5]
    assert np.concatenate([part.labels for part in found]).tolist() == some_labels(15) + some_labels(5)
    source = open_source("cifar", str(tmp_path))
    assert [unit.split for unit in source.list_units(10**6)] == ["train", "test"]
    assert source.class_names() == ["airplane", "automobile"]


def test_cifar_100_has_its_fine_labels(tmp_path):
    images = some_images(4, (32, 32, 3))
    records = [bytes([5, 96 + i]) + image.transpose(2, 0, 1).tobytes() for i, image in enumerate(images)]
    (tmp_path / "train.bin").write_bytes(b"".join(records))
    (found,) = read_all(Recipe("cifar", (32, 32, 3)), tmp_path)
    assert np.array_equal(found.tokens, images.reshape(4, -1))
    assert found.labels is not None
    assert found.labels.tolist() == [96, 97, 98, 99]


# -- what can be wrong -----------------------------------------------------------------------------------------------


def cut_file(file: Path, count: int) -> None:
    file.write_bytes(file.read_bytes()[:-count])


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: cut_file(f / "train-images-idx3-ubyte", 5), r"train-images.*truncated.*promises 30 images of 784"),
        (lambda f: cut_file(f / "train-labels-idx1-ubyte", 1), r"train-labels.*truncated.*promises 30 labels"),
        (lambda f: (f / "t10k-images-idx3-ubyte").open("ab").write(b"more"), r"t10k-images.*longer than the 7 images"),
        (lambda f: write_idx(f / "train-labels-idx1-ubyte", np.zeros(29)), r"labels for 29 images.*has 30"),
        (lambda f: (f / "train-images-idx3-ubyte").write_bytes(b"\x1f\x8b\x08\x00"), "not an idx file .* 1f 8b 08 00"),
        (lambda f: (f / "train-images-idx3-ubyte").write_bytes(b"\0\0\x0d\3" + bytes(12)), "not an idx file of bytes"),
        (lambda f: (f / "train-images-idx3-ubyte").write_bytes(b"\0\0\x08\3" + bytes(11)), "not an idx file"),
        (lambda f: write_idx(f / "train-images-idx3-ubyte", np.zeros((30, 0, 28))), "its images are 0 x 28"),
    ],
)
def test_damaged_idx(tmp_path, damage, message):
    write_mnist(tmp_path, end="")
    damage(tmp_path)
    with pytest.raises(UserError, match=message):
        read_all(Recipe("idx", (28, 28, 1)), tmp_path)


def test_damaged_gzip(tmp_path):
    write_mnist(tmp_path)
    file = tmp_path / "train-images-idx3-ubyte.gz"
    whole = file.read_bytes()
    for data in (whole[:-500], whole[:1000] + b"\0\0\0" + whole[1003:], gzip.compress(b"text")):
        file.write_bytes(data)
        with pytest.raises(UserError, match=r"train-images-idx3-ubyte\.gz' is (damaged|not an idx file)"):
            read_all(Recipe("idx", (28, 28, 1)), tmp_path)


def test_damaged_cifar(tmp_path):
    write_cifar(tmp_path, some_images(3, (32, 32, 3)))
    file = tmp_path / "data_batch_1.bin"
    whole = file.read_bytes()
    file.write_bytes(whole[:-1])
    with pytest.raises(UserError, match="truncated: its 9218 bytes are no multiple of a record's 3073"):
        read_all(Recipe("cifar", (32, 32, 3)), tmp_path)
    file.write_bytes(whole[:3073] + b"\x0b" + whole[3074:])
    with pytest.raises(UserError, match="no CIFAR-10: image 1 has the label 11"):
        read_all(Recipe("cifar", (32, 32, 3)), tmp_path)
    file.rename(tmp_path / "data_batch_1")
    with pytest.raises(UserError, match="the Python version of CIFAR"):
        read_all(Recipe("cifar", (32, 32, 3)), tmp_path)


# -- real files ------------------------------------------------------------------------------------------------------


def test_mnist():
    units = open_source("idx", str(shared("data", "mnist"))).list_units(2**30)
    test = next(unit for unit in units if unit.split == "test")
    found = read(test, Recipe("idx", (28, 28, 1)), None)
    assert found.tokens.shape == (10_000, 784)
    assert found.labels is not None
    assert found.labels[:10].tolist() == [7, 2, 1, 0, 4, 1, 4, 9, 5, 9]
    assert 32 < found.tokens.mean() < 35  # white digits on black
    assert sum(unit.size for unit in units) == 70_000 * 784
