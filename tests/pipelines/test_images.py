"""The readers of images: the same pixels from every format, and one clear message for everything that can be wrong."""

import gzip
import io
import json
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from md4.errors import UserError
from pipelines.images import NO_LABEL, Recipe, _quantised, brightness, digest, open_source, read
from tests.pipelines.pictures import (
    encoded,
    read_all,
    some_images,
    some_labels,
    write_cifar,
    write_idx,
    write_mnist,
    write_parquet,
    write_tar,
)
from tests.shared import shared

RGB, GREY = (6, 5, 3), (6, 5, 1)


def by_label(found, count: int) -> np.ndarray:
    """Rows of images whose labels are all different, in the order of the labels."""
    rows = np.concatenate([part.tokens for part in found])
    labels = np.concatenate([part.labels for part in found])
    assert sorted(labels.tolist()) == list(range(count))
    return rows[labels.argsort()]


def one(image: bytes, **changes) -> np.ndarray:
    """The tokens `[H, W, C]` of one image file."""
    return one_read(image, **changes)[0]


def one_read(image: bytes, **changes):
    recipe = replace(Recipe("webdataset", RGB), **changes)
    file = write_tar(Path(one_read.folder) / "one.tar", {"a.png": image})
    (found,) = read_all(recipe, file)
    return found.tokens.reshape(-1, *recipe.shape)[0] if len(found.tokens) else None, found.notes


@pytest.fixture(autouse=True)
def _folder(tmp_path):
    one_read.folder = tmp_path


# -- every format gives the same pixels ------------------------------------------------------------------------------


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


def write_folder(root: Path, images: np.ndarray, name=lambda i: f"class{i % 3}/{i}.png") -> None:
    for number, image in enumerate(images):
        file = root / name(number)
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(encoded(image))


def test_a_folder_of_classes(tmp_path):
    images = some_images(9)
    write_folder(tmp_path, images)
    (tmp_path / "class0" / "notes.txt").write_text("no image")
    source = open_source("images", str(tmp_path))
    assert source.class_names() == ["class0", "class1", "class2"]
    units = source.list_units(1)
    assert [unit.name for unit in units] != sorted(unit.name for unit in units)  # classes are mixed
    for unit in units:
        number = int(Path(unit.file).stem)
        found = read(unit, Recipe("images", RGB), source.class_names())
        assert np.array_equal(found.tokens.reshape(RGB), images[number])
        assert found.labels is not None
        assert found.labels.tolist() == [number % 3]
        assert unit.split is None


def test_classes_that_are_numbers_stand_by_value(tmp_path):
    write_folder(tmp_path, some_images(11), lambda i: f"{i}/a.png")
    assert open_source("images", str(tmp_path)).class_names() == [str(i) for i in range(11)]
    by_label(read_all(Recipe("images", RGB), tmp_path), 11)


def test_a_folder_with_splits(tmp_path):
    write_folder(tmp_path, some_images(6), lambda i: f"{('train', 'val', 'test')[i % 3]}/cat/{i}.png")
    source = open_source("images", str(tmp_path))
    assert source.class_names() == ["cat"]
    splits = {int(Path(unit.file).stem): unit.split for unit in source.list_units(1)}
    assert [splits[i] for i in range(6)] == ["train", "validation", "test"] * 2


def test_a_class_may_be_called_train(tmp_path):
    write_folder(tmp_path, some_images(4), lambda i: f"{('train', 'bus')[i % 2]}/{i}.png")
    source = open_source("images", str(tmp_path))
    assert source.class_names() == ["bus", "train"]
    assert {unit.split for unit in source.list_units(1)} == {None}


def test_a_folder_without_classes(tmp_path):
    write_folder(tmp_path, some_images(4), lambda i: f"{i}.png")
    assert all(part.labels is None for part in read_all(Recipe("images", RGB), tmp_path))


@pytest.mark.parametrize("end", [".tar", ".tar.gz", ".tgz"])
def test_webdataset(tmp_path, end):
    images = some_images(8)
    for first in (0, 4):
        members = {}
        for number in range(first, first + 4):
            members[f"{number:04d}.cls"] = b"%d\n" % number
            members[f"{number:04d}.PNG"] = encoded(images[number])
            members[f"{number:04d}.txt"] = b"a caption"
        write_tar(tmp_path / f"set-{'train' if first else 'val'}-{first}{end}", members)
    found = read_all(Recipe("webdataset", RGB), tmp_path)
    assert np.array_equal(by_label(found, 8), images.reshape(8, -1))
    assert {unit.split for unit in open_source("webdataset", str(tmp_path)).list_units(1)} == {"train", "validation"}


def test_webdataset_labels_in_json(tmp_path):
    image = encoded(some_images(1)[0])
    write_tar(tmp_path / "a.tar", {"x.png": image, "x.json": json.dumps({"label": 3}).encode(), "y.png": image})
    with pytest.raises(UserError, match=r"a\.tar: y\.png' has no label, unlike those before it"):
        read_all(Recipe("webdataset", RGB), tmp_path / "a.tar")
    write_tar(tmp_path / "a.tar", {"x.png": image, "x.json": json.dumps({"label": 3}).encode()})
    (found,) = read_all(Recipe("webdataset", RGB), tmp_path / "a.tar")
    assert found.labels is not None
    assert found.labels.tolist() == [3]


def test_parquet(tmp_path):
    images = some_images(10)
    write_parquet(tmp_path / "train-00000-of-00001.parquet", [encoded(image) for image in images[:9]], list(range(9)))
    write_parquet(tmp_path / "test-00000-of-00001.parquet", [encoded(images[9])], [9])
    units = open_source("image-parquet", str(tmp_path)).list_units(1)
    assert [unit.split for unit in units] == ["test", "train", "train", "train"]
    assert np.array_equal(by_label(read_all(Recipe("image-parquet", RGB), tmp_path), 10), images.reshape(10, -1))


def test_parquet_with_columns_of_other_names(tmp_path):
    images = some_images(3)
    table = pa.table(
        {
            "img": pa.array([encoded(image) for image in images]),
            "id": pa.array(["a", "b", "c"]),
            "fine_label": pa.array([0, None, 2], pa.int64()),
        }
    )
    names = {"info": {"features": {"fine_label": {"names": ["ant", "bee", "cat"], "_type": "ClassLabel"}}}}
    table = table.replace_schema_metadata({"huggingface": json.dumps(names)})
    pq.write_table(table, tmp_path / "a.parquet")
    recipe = Recipe("image-parquet", RGB, label_column="fine_label")
    (found,) = read_all(recipe, tmp_path / "a.parquet")
    assert np.array_equal(found.tokens.reshape(images.shape), images)
    assert found.labels is not None
    assert found.labels.tolist() == [0, NO_LABEL, 2]
    source = open_source("image-parquet", str(tmp_path), label_column="fine_label")
    assert source.class_names() == ["ant", "bee", "cat"]
    (found,) = read_all(Recipe("image-parquet", RGB), tmp_path / "a.parquet")
    assert found.labels is None


# -- from images to tokens -------------------------------------------------------------------------------------------


def test_rows_of_pixels_with_their_channels_side_by_side():
    image = some_images(1)[0]
    assert np.array_equal(one(encoded(image)), image)
    assert np.array_equal(one(encoded(image, "BMP")), image)


@given(st.integers(2, 256))
@settings(max_examples=30, deadline=None)
def test_levels_are_cut_evenly_and_shown_from_black_to_white(levels):
    ramp = np.arange(256, dtype=np.uint8)
    tokens = _quantised(ramp[None], Recipe("images", (16, 16, 1), levels))[0].astype(int)
    assert (tokens[0], tokens[-1]) == (0, levels - 1)
    assert set(np.diff(tokens).tolist()) <= {0, 1}
    counts = np.bincount(tokens)
    assert counts.max() - counts.min() <= 1
    shown = brightness(np.arange(levels), levels)
    assert (shown[0], shown[-1], shown.dtype) == (0, 255, np.uint8)
    assert np.array_equal(shown, np.sort(shown))


def test_grey_images_in_an_rgb_set_are_converted_and_counted():
    image = some_images(1, GREY)[0]
    found, notes = one_read(encoded(image))
    assert np.array_equal(found, np.repeat(image, 3, axis=2))
    assert notes.converted == {"L to RGB": 1}
    assert not notes.rejected


def test_colours_in_a_grey_set_become_their_luma():
    image = some_images(1)[0]
    found, notes = one_read(encoded(image), shape=GREY)
    assert np.abs(found[..., 0] - image @ np.array([0.299, 0.587, 0.114])).max() <= 1
    assert notes.converted == {"RGB to L": 1}


def test_transparency_lies_on_white():
    image = some_images(1, (6, 5, 4))[0]
    image[..., 3] = 255
    image[0, 0, 3] = 0
    found, notes = one_read(encoded(image))
    expected = image[..., :3].copy()
    expected[0, 0] = 255
    assert np.array_equal(found, expected)
    assert notes.converted == {"RGBA to RGB": 1}


def test_a_palette_and_a_bitmap():
    buffer = io.BytesIO()
    Image.fromarray(some_images(1)[0]).quantize(4).save(buffer, "PNG")
    assert one_read(buffer.getvalue())[1].converted == {"P to RGB": 1}
    buffer = io.BytesIO()
    bits = some_images(1, GREY)[0, ..., 0] > 127
    Image.fromarray(bits).save(buffer, "PNG")
    found, notes = one_read(buffer.getvalue(), shape=GREY)
    assert np.array_equal(found[..., 0], bits * 255)
    assert notes.converted == {"1 to L": 1}


def test_a_photograph_is_turned_upright():
    image = np.zeros((5, 6, 3), np.uint8)
    image[0] = 255  # the camera's top row
    turned = Image.fromarray(image)
    facts = turned.getexif()
    facts[0x0112] = 6  # to be turned by 90 degrees clockwise
    buffer = io.BytesIO()
    turned.save(buffer, "PNG", exif=facts)
    upright = one(buffer.getvalue())
    assert upright.shape == RGB
    assert (upright[:, -1] == 255).all()
    assert (upright[:, :-1] == 0).all()


def test_crop_cuts_the_middle_and_averages():
    wide = np.zeros((12, 20, 3), np.uint8)
    wide[:, 5:15] = np.arange(10, dtype=np.uint8)[None, :, None] // 2 * 20
    found, notes = one_read(encoded(wide), fit="crop")
    assert np.array_equal(found[..., 0], np.tile(np.arange(5) * 20, (6, 1)))
    assert notes.converted == {"resized": 1}
    small = one(encoded(some_images(1, (3, 4, 3))[0]), fit="crop")
    assert small.shape == RGB


def test_pixels_of_another_size_are_fitted_too(tmp_path):
    """MNIST, for instance, as RGB of 32 x 32."""
    write_mnist(tmp_path)
    found = read_all(Recipe("idx", (32, 32, 3), fit="crop"), tmp_path)
    assert found[0].tokens.shape[1] == 3072
    assert sum((part.notes.converted for part in found), Counter()) == {"L to RGB": 37, "resized": 37}
    with pytest.raises(UserError, match=r"28 high and 28 wide, data\.shape says 32 and 32"):
        read_all(Recipe("idx", (32, 32, 1)), tmp_path)


# -- what can be wrong -----------------------------------------------------------------------------------------------


def damaged_images() -> list[tuple[str, bytes, str]]:
    good = encoded(some_images(1)[0])
    jpeg = encoded(some_images(1, (64, 64, 3))[0], "JPEG")
    deep = io.BytesIO()
    Image.fromarray(np.arange(30, dtype=np.uint16).reshape(6, 5) * 2000).save(deep, "PNG")
    flipped = bytearray(good)
    flipped[60] ^= 0xFF
    return [
        ("not an image", b"this is text", "no image of a known format"),
        ("not an image", b"", "no image of a known format"),
        ("damaged", good[: len(good) // 2], "damaged"),
        ("damaged", bytes(flipped), "damaged"),
        ("damaged", jpeg[: len(jpeg) // 2], "damaged"),
        ("wrong size", encoded(some_images(1, (5, 6, 3))[0]), "5 high and 6 wide, data.shape says 6 and 5"),
        ("more than 8 bits", deep.getvalue(), "more than 8 bits"),
    ]


@pytest.mark.parametrize(("reason", "data", "message"), damaged_images())
def test_unusable_images_are_named_or_counted(tmp_path, reason, data, message):
    with pytest.raises(UserError, match=rf"image '.*one\.tar: a\.png': .*{message}.*data.damaged=skip"):
        one(data)
    found, notes = one_read(data, damaged="skip")
    assert found is None
    assert notes.rejected == {reason: 1}
    assert len(notes.examples) == 1
    assert message in notes.examples[0]


def test_an_image_that_unpacks_to_gigabytes(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 20)
    with pytest.raises(UserError, match="it is too large"):
        one(encoded(some_images(1)[0]))


def test_damaged_files_in_folders_and_parquet_are_named(tmp_path):
    write_folder(tmp_path / "folder", some_images(3))
    (tmp_path / "folder" / "class1" / "1.png").write_bytes(b"\x89PNG broken")
    with pytest.raises(UserError, match=r"image '.*folder/class1/1\.png'"):
        read_all(Recipe("images", RGB), tmp_path / "folder")
    images = [encoded(image) for image in some_images(6)]
    images[5] = b"broken"
    file = write_parquet(tmp_path / "a.parquet", images, list(range(6)))
    with pytest.raises(UserError, match=r"image '.*a\.parquet: row 5'"):
        read_all(Recipe("image-parquet", RGB), file)
    found = read_all(Recipe("image-parquet", RGB, damaged="skip"), file)
    assert [len(part.tokens) for part in found] == [4, 1]
    assert found[1].notes.rejected == {"not an image": 1}


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


def test_damaged_tars(tmp_path):
    image = encoded(some_images(1)[0])
    recipe = Recipe("webdataset", RGB)
    file = write_tar(tmp_path / "a.tar", {"a.png": image, "a.cls": b"cat"})
    with pytest.raises(UserError, match=r"a\.tar: a': its label is not a number"):
        read_all(recipe, file)
    write_tar(file, {"a.txt": b"words", "a.cls": b"1"})
    with pytest.raises(UserError, match=r"a\.tar: a' has no image: its fields are txt, cls"):
        read_all(recipe, file)
    write_tar(file, {"a.png": image, "b/a.png": image, "c.png": image * 40})
    file.write_bytes(file.read_bytes()[: -len(image) * 30])
    with pytest.raises(UserError, match=r"a\.tar' is not a sound tar"):
        read_all(replace(recipe, damaged="skip"), file)
    file.write_bytes(b"no tar at all" * 100)
    with pytest.raises(UserError, match=r"a\.tar' is not a sound tar"):
        read_all(recipe, file)
    for label in (b"-2", b"3000000000"):
        write_tar(file, {"a.png": image, "a.cls": label})
        with pytest.raises(UserError, match=r"labels count from 0, and -1 means none"):
            read_all(recipe, file)


def test_wrong_parquet(tmp_path):
    file = tmp_path / "a.parquet"
    recipe = Recipe("image-parquet", RGB)
    pq.write_table(pa.table({"text": ["a"], "label": ["b"]}), file)
    with pytest.raises(UserError, match=r"which column holds the images\? .* it has text, label"):
        read_all(recipe, file)
    with pytest.raises(UserError, match=r"no column 'text' with the bytes of images"):
        read_all(replace(recipe, image_column="text"), file)
    pq.write_table(pa.table({"image": [b"a"], "label": ["b"]}), file)
    with pytest.raises(UserError, match=r"no column 'label' of whole numbers"):
        read_all(recipe, file)
    file.write_bytes(b"PAR1 and nothing else PAR1")
    with pytest.raises(UserError, match=r"a\.parquet' cannot be read as parquet"):
        read_all(recipe, file)


def test_an_image_beside_the_folders_of_the_classes(tmp_path):
    write_folder(tmp_path, some_images(3))
    write_folder(tmp_path, some_images(1), lambda _: "lone.png")
    with pytest.raises(UserError, match=r"lone\.png' lies beside the folders of the classes"):
        read_all(Recipe("images", RGB), tmp_path)


@pytest.mark.parametrize("kind", ["idx", "cifar", "images", "webdataset", "image-parquet"])
def test_wrong_paths(tmp_path, kind):
    with pytest.raises(UserError, match=f"the source '{kind}' needs the path"):
        open_source(kind, None)
    with pytest.raises(UserError, match="does not exist"):
        open_source(kind, str(tmp_path / "nowhere")).list_units(1)
    with pytest.raises(UserError, match=r"no (idx images|CIFAR|images|tar|parquet files) in"):
        open_source(kind, str(tmp_path)).list_units(1)


def test_digits_take_no_path():
    with pytest.raises(UserError, match="takes no path"):
        open_source("digits", "/tmp")


def test_digest_tells_changed_contents(tmp_path):
    write_mnist(tmp_path, end="")
    unit = next(u for u in open_source("idx", str(tmp_path)).list_units(10**6) if u.split == "train")
    before = digest(unit)
    assert digest(unit) == before
    labels = tmp_path / "train-labels-idx1-ubyte"
    labels.write_bytes(labels.read_bytes()[:-1] + b"\x09")
    assert digest(unit) != before


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


def test_tiny_imagenet_tars():
    folder = shared("data", "tiny-imagenet-wds")
    source = open_source("webdataset", str(folder / "tiny-imagenet-train-000000.tar"))
    found = read(source.list_units(1)[0], Recipe("webdataset", (64, 64, 3)), None)
    assert found.tokens.shape == (1000, 64 * 64 * 3)
    assert found.labels is not None
    assert 0 <= found.labels.min() <= found.labels.max() < 200
    assert list(found.notes.converted) == ["L to RGB"]


def test_a_foreign_tgz():
    file = shared("data", "webdataset", "sample.tgz")
    (found,) = read_all(Recipe("webdataset", (28, 28, 1)), file)
    assert len(found.tokens) == 90
    with pytest.raises(UserError, match=r"has no image: its fields are txt\.gz"):
        read_all(Recipe("webdataset", (28, 28, 1)), shared("data", "webdataset", "testgz.tar"))
