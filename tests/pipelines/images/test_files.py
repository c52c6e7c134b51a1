"""Folders, tars and parquet: the images and labels that went in, and one clear message for each thing wrong."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from md4.errors import UserError
from pipelines.images import NO_LABEL, Recipe, open_source, read
from tests.pipelines.pictures import encoded, read_all, some_images, write_parquet, write_tar
from tests.shared import shared

RGB = (6, 5, 3)


def by_label(found, count: int) -> np.ndarray:
    """Rows of images whose labels are all different, in the order of the labels."""
    rows = np.concatenate([part.tokens for part in found])
    labels = np.concatenate([part.labels for part in found])
    assert sorted(labels.tolist()) == list(range(count))
    return rows[labels.argsort()]


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


# -- what can be wrong -----------------------------------------------------------------------------------------------


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
    with pytest.raises(UserError, match=r"a\.tar': it is not a sound tar: .*data\.damaged=skip"):
        read_all(recipe, file)
    (found,) = read_all(replace(recipe, damaged="skip"), file)
    assert len(found.tokens) == 1  # the last sample before the damage may lack a field
    assert found.notes.rejected == {"damaged archive": 1}
    file.write_bytes(b"no tar at all" * 100)
    with pytest.raises(UserError, match=r"a\.tar': it is not a sound tar"):
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


# -- real files ------------------------------------------------------------------------------------------------------


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
