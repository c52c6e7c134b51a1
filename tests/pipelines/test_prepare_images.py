"""Images to shards and to batches: splits, labels, counts and yardsticks, and preparations that go on."""

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from md4.errors import UserError
from pipelines import rejects
from pipelines.config import DataConfig
from pipelines.manifest import MANIFEST, Manifest
from pipelines.order import Order
from pipelines.part_shards import assign
from pipelines.pixels import count_positions, entropies
from pipelines.prepare import prepare
from pipelines.shards import ShardSet, verify
from pipelines.storage import Folder
from pipelines.stream import batches
from tests.pipelines.pictures import (
    encoded,
    some_images,
    some_labels,
    write_cifar,
    write_idx,
    write_mnist,
    write_parquet,
    write_tar,
)
from tests.pipelines.test_prepare import contents, quietly
from tests.pipelines.test_shards import damage
from tests.shared import shared

RGB = (6, 5, 3)


def config(kind: str, path: Path, directory: Path, **changes) -> DataConfig:
    small = {"rows_per_group": 8, "rows_per_shard": 32, "directory": str(directory)}
    return DataConfig(**{"source": kind, "path": str(path), **small, **changes})  # type: ignore[arg-type]


def rows_of(root: Path, split: str) -> tuple[np.ndarray, np.ndarray | None]:
    shards = ShardSet(root, split)
    return shards.read_labelled(np.arange(shards.rows))


# -- whole preparations ----------------------------------------------------------------------------------------------


@pytest.mark.ray
def test_digits_by_the_hash_of_their_pixels(ray_cluster, tmp_path):
    from sklearn.datasets import load_digits

    root = prepare(DataConfig(source="digits", directory=str(tmp_path), validation=0.1, test=0.2), quietly)
    manifest = verify(root)
    digits = load_digits()
    expected: dict[str, list[tuple[bytes, int]]] = {"train": [], "validation": [], "test": []}
    for image, label in zip(digits.data.astype(np.uint8), digits.target.tolist(), strict=True):
        expected[assign(image.tobytes(), 0.1, 0.2)[0]].append((image.tobytes(), label))
    for split, pairs in expected.items():
        rows, labels = rows_of(root, split)
        assert labels is not None
        found = [(row.tobytes(), label) for row, label in zip(rows, labels.tolist(), strict=True)]
        assert sorted(found) == sorted(pairs)
        assert found != pairs  # shuffled
    assert (manifest.vocabulary, manifest.vocabulary_size, manifest.length) == ("pixels17", 17, 64)
    assert ShardSet(root).vocabulary.size == 17
    pixels = manifest.pixels
    assert pixels is not None
    assert (pixels.shape, pixels.levels, pixels.classes) == ((8, 8, 1), 17, 10)
    bits = entropies(count_positions([rows_of(root, "train")[0]], 64, 17))
    assert (pixels.independent_bits, pixels.histogram_bits) == (bits["independent_bits"], bits["histogram_bits"])
    assert 2.3 < pixels.independent_bits < pixels.histogram_bits < 3.1
    assert manifest.ngrams is None


@pytest.mark.ray
def test_a_source_keeps_its_own_test_set(ray_cluster, tmp_path):
    images = write_mnist(tmp_path / "mnist", train=200, test=50)
    data = config("idx", tmp_path / "mnist", tmp_path, part_bytes=784 * 60, validation=0.2, test=0.5)
    root = prepare(data, quietly)
    manifest = verify(root)
    assert manifest.splits["test"].rows == 50
    assert manifest.splits["train"].rows + manifest.splits["validation"].rows == 200
    assert 20 <= manifest.splits["validation"].rows <= 60
    pairs = {image.tobytes(): label for image, label in zip(images, some_labels(250), strict=True)}
    for split in manifest.splits:
        rows, labels = rows_of(root, split)
        assert labels is not None
        assert [pairs[row.tobytes()] for row in rows] == labels.tolist()
    test = {row.tobytes() for row in rows_of(root, "test")[0]}
    assert test == {image.tobytes() for image in images[200:]}
    assert len(list((root / "parts").iterdir())) == 4

    table = pq.read_table(root / "train")  # by plain pyarrow
    assert table.schema.field("tokens").type == pa.list_(pa.field("item", pa.uint8(), nullable=False), 784)
    assert table.schema.field("label").type == pa.int32()


@pytest.mark.ray
def test_every_format_gives_the_same_set(ray_cluster, tmp_path):
    images, labels = some_images(40), some_labels(40)
    files = [encoded(image) for image in images]
    for number, data in enumerate(files):
        file = tmp_path / "folder" / str(labels[number]) / f"{number}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(data)
    members = {}
    for number, data in enumerate(files):
        members |= {f"{number}.png": data, f"{number}.cls": str(labels[number]).encode()}
    write_tar(tmp_path / "a.tar", members)
    write_parquet(tmp_path / "a.parquet", files, labels)
    write_idx(tmp_path / "idx" / "images-idx4-ubyte", images)
    write_idx(tmp_path / "idx" / "labels-idx1-ubyte", np.array(labels))
    places = {"images": "folder", "webdataset": "a.tar", "image-parquet": "a.parquet", "idx": "idx"}
    roots = {
        kind: prepare(config(kind, tmp_path / place, tmp_path, shape=RGB, validation=0.3), quietly)
        for kind, place in places.items()
    }
    manifests = {kind: Manifest.load(root) for kind, root in roots.items()}
    assert len({manifest.fingerprint for manifest in manifests.values()}) == 1
    assert manifests["images"].pixels is not None
    assert manifests["images"].pixels.class_names == [str(label) for label in range(10)]


@pytest.mark.ray
def test_rejected_and_converted_images_are_counted(ray_cluster, tmp_path):
    files = [encoded(image) for image in some_images(20)]
    files[3:6] = [b"no image", encoded(some_images(1)[0])[:90], encoded(some_images(1, (3, 3, 3))[0])]
    files[7] = encoded(some_images(1, (6, 5, 1))[0])
    write_parquet(tmp_path / "a.parquet", files, some_labels(20))
    data = config("image-parquet", tmp_path / "a.parquet", tmp_path, shape=RGB, part_bytes=1000)
    with pytest.raises(UserError, match=r"a\.parquet: row 3': it is no image .*data.damaged=skip") as caught:
        prepare(data, quietly)
    assert "\n" not in str(caught.value)
    said: list[str] = []
    root = prepare(data.model_copy(update={"damaged": "skip"}), said.append)
    pixels = verify(root).pixels
    assert pixels is not None
    assert pixels.rejected == {"damaged": 1, "not an image": 1, "wrong size": 1}
    assert pixels.converted == {"L to RGB": 1}
    assert [name.split(": ")[1] for name in pixels.rejected_examples] == ["row 3", "row 4", "row 5"]
    assert sum(split.rows for split in Manifest.load(root).splits.values()) == 17
    counts = "1 damaged, 1 not an image, 1 wrong size"
    assert f"data: left out images: {counts}; they are in {root / 'rejects'}" in said
    left_out = [record for number in range(5) for record in rejects.read(Folder(root), number)]
    assert [record.name for record in left_out] == [f"{tmp_path / 'a.parquet'}: row {row}" for row in (3, 4, 5)]
    assert sorted(record.reason for record in left_out) == sorted(pixels.rejected)


@pytest.mark.ray
def test_labels_that_only_some_files_have(ray_cluster, tmp_path):
    files = [encoded(image) for image in some_images(8)]
    for name, labels in (("a", some_labels(8)), ("b", None)):
        write_parquet(tmp_path / f"set/{name}.parquet", files, labels, group=8)
    for part_bytes in (10**6, 1000):
        with pytest.raises(UserError, match=r"some .*labels and others have none"):
            prepare(config("image-parquet", tmp_path / "set", tmp_path, shape=RGB, part_bytes=part_bytes), quietly)


@pytest.mark.ray
def test_nothing_for_training(ray_cluster, tmp_path):
    files = [encoded(image) for image in some_images(4)]
    write_parquet(tmp_path / "set/test-0.parquet", files)
    with pytest.raises(UserError, match="are for training: train 0, validation 0, test 4; left out: none"):
        prepare(config("image-parquet", tmp_path / "set", tmp_path, shape=RGB), quietly)


@pytest.mark.ray
def test_an_interrupted_preparation_goes_on(ray_cluster, tmp_path):
    """Parts with sound shards stay; a changed label or another class makes new ones."""
    write_mnist(tmp_path / "mnist", train=100, test=20, end="")
    data = config("idx", tmp_path / "mnist", tmp_path, part_bytes=784 * 20)
    root = prepare(data, quietly)
    before = contents(root)
    (root / MANIFEST).unlink()
    damage(sorted((root / "train").iterdir())[0], 40)
    (root / "parts" / "00003.json").unlink()
    said: list[str] = []
    assert prepare(data, said.append) == root
    assert contents(root) == before
    assert any("4 of 6 parts were ready from before" in line for line in said)

    labels = tmp_path / "mnist" / "train-labels-idx1-ubyte"
    labels.write_bytes(labels.read_bytes()[:-1] + b"\x05")
    with pytest.raises(UserError, match="has changed since"):
        prepare(data, quietly)


@pytest.mark.ray
def test_labels_come_with_their_rows(ray_cluster, tmp_path):
    """Through the stream of two workers, over the border of an epoch."""
    images = write_mnist(tmp_path / "mnist", train=100, test=20)
    root = prepare(config("idx", tmp_path / "mnist", tmp_path), quietly)
    pairs = {image.tobytes(): label for image, label in zip(images, some_labels(120), strict=True)}
    order = Order.of(ShardSet(root), batch_size=16, slices=4, seed=1, mixing=4)
    for rank in range(2):
        for batch in batches(root, "train", order, 0, 9, rank, 2):
            assert batch.labels is not None
            assert batch.labels.dtype == np.int64
            assert [pairs[row.astype(np.uint8).tobytes()] for row in batch.tokens] == batch.labels.tolist()


@pytest.mark.ray
def test_a_damaged_label_is_noticed(ray_cluster, tmp_path):
    write_mnist(tmp_path / "mnist", train=100, test=20)
    root = prepare(config("idx", tmp_path / "mnist", tmp_path), quietly)
    file = sorted((root / "train").iterdir())[0]
    table = pq.read_table(file)
    labels = table["label"].to_numpy().copy()
    labels[5] += 1
    changed = table.set_column(1, table.schema.field("label"), pa.array(labels))
    metadata = pq.ParquetFile(file).metadata.row_group(0).num_rows
    pq.write_table(changed, file, row_group_size=metadata, compression="zstd", use_dictionary=False)
    with pytest.raises(UserError, match="is damaged"):
        rows_of(root, "train")


@pytest.mark.ray
def test_real_cifar(ray_cluster, tmp_path):
    """The pictures of the first training images and of some test images, as the records of the binary version."""
    folder = shared("data", "cifar10")
    labels = json.loads((folder / "cifar10_labels.js").read_text().split("=", 1)[1].strip().rstrip(";"))
    images = {}
    for name, strip, first in (("data_batch_1.bin", 0, 0), ("test_batch.bin", 50, 50_000)):
        pixels = np.asarray(Image.open(folder / f"cifar10_batch_{strip:02d}.png").convert("RGB"))[:300]
        pixels = pixels.reshape(-1, 32, 32, 3)
        write_cifar(tmp_path / "cifar", pixels, name, labels[first : first + 300])
        images[name] = {(image.tobytes(), label) for image, label in zip(pixels, labels[first:], strict=False)}
    root = prepare(config("cifar", tmp_path / "cifar", tmp_path, validation=0.1, part_bytes=10**6), quietly)
    manifest = verify(root)
    assert manifest.splits["test"].rows == 300
    found = {}
    for split in manifest.splits:
        rows, known = rows_of(root, split)
        assert known is not None
        found[split] = {(row.tobytes(), label) for row, label in zip(rows, known.tolist(), strict=True)}
    assert found["test"] == images["test_batch.bin"]
    assert found["train"] | found["validation"] == images["data_batch_1.bin"]
    assert manifest.pixels is not None
    assert 6 < manifest.pixels.independent_bits < manifest.pixels.histogram_bits < 8


@pytest.mark.ray
@pytest.mark.slow
def test_mnist_and_tiny_imagenet(ray_cluster, tmp_path):
    root = prepare(DataConfig(source="idx", path=str(shared("data", "mnist")), directory=str(tmp_path)), quietly)
    manifest = verify(root)
    assert manifest.splits["test"].rows == 10_000
    assert manifest.splits["train"].rows + manifest.splits["validation"].rows == 60_000
    assert manifest.pixels is not None
    assert manifest.pixels.independent_bits < manifest.pixels.histogram_bits < 2
    tars = config("webdataset", shared("data", "tiny-imagenet-wds"), tmp_path, shape=(64, 64, 3))
    manifest = verify(prepare(tars, quietly))
    assert sum(split.rows for split in manifest.splits.values()) == 2000
    assert manifest.pixels is not None
    assert manifest.pixels.classes == 200
    assert manifest.pixels.converted["L to RGB"] > 0


@pytest.mark.ray
def test_foreign_shards(ray_cluster, tmp_path):
    """A tgz of PNGs and tars of JPEGs, greyscale among them, that other software wrote."""
    grey = config("webdataset", shared("data", "webdataset", "sample.tgz"), tmp_path, shape=(28, 28, 1))
    manifest = verify(prepare(grey, quietly))
    assert sum(split.rows for split in manifest.splits.values()) == 90
    file = shared("data", "tiny-imagenet-wds", "tiny-imagenet-train-000001.tar")
    tars = config("webdataset", file, tmp_path, shape=(64, 64, 3))
    manifest = verify(prepare(tars, quietly))
    assert sum(split.rows for split in manifest.splits.values()) == 1000
    assert manifest.pixels is not None
    assert manifest.pixels.converted["L to RGB"] > 0


@pytest.mark.ray
def test_a_named_set_from_s3_to_s3(ray_cluster, s3, tmp_path):
    """Ray's processes read the source, and write the set, without a file on this machine."""
    write_mnist(tmp_path / "mnist", train=100, test=20)
    for file in (tmp_path / "mnist").iterdir():
        Folder("s3://bucket/mnist").write(file.name, file.read_bytes())
    small = {"rows_per_group": 8, "rows_per_shard": 32, "part_bytes": 784 * 60}
    here = DataConfig(source="mnist", path=str(tmp_path / "mnist"), directory=str(tmp_path), **small)  # type: ignore[arg-type]
    there = DataConfig(source="mnist", path="s3://bucket/mnist", directory="s3://bucket/data", **small)  # type: ignore[arg-type]
    assert verify(prepare(there, quietly)).fingerprint == verify(prepare(here, quietly)).fingerprint
