"""Images in webdataset tars: the same rows, ids and batches as in parquet, for our readers and for others."""

import io
import tarfile

import numpy as np
import pyarrow.dataset
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from pydantic import ValidationError

from md4.errors import UserError
from pipelines import inspect, shards
from pipelines.config import DataConfig, config_digest, open_source
from pipelines.images import NO_LABEL, Recipe, brightness
from pipelines.manifest import FORMAT, MANIFEST, VERSION, Manifest, PixelFacts, SourceFacts, Split
from pipelines.order import Order
from pipelines.prepare import prepare
from pipelines.ray_data import quiet
from pipelines.shards import SUFFIXES, ShardSet, verify
from pipelines.storage import Folder, Place
from pipelines.stream import batches
from pipelines.tar_shards import Pictures, TarContent, footer_size, pack
from tests.pipelines.pictures import read_all, write_mnist
from tests.pipelines.test_prepare import quietly
from tests.pipelines.test_shards import damage
from tests.s3 import BUCKET

SHAPE, LEVELS, GROUP = (4, 3, 3), 17, 5
PICTURES = Pictures(SHAPE, LEVELS)


def some_pictures(count: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Rows `[count, 36]` of 17 levels, and labels `[count]`, some of which are none."""
    generator = np.random.default_rng(seed)
    return generator.integers(0, LEVELS, (count, 36)).astype(np.uint8), generator.integers(NO_LABEL, 3, count)


def write_pictures(root: Place, form: str, files: list[tuple[np.ndarray, np.ndarray]]) -> Manifest:
    """A prepared set of these files of rows and labels."""
    written = [
        shards.write_shard(root, f"train/{number:05d}-0000{SUFFIXES[form]}", rows, GROUP, labels, PICTURES)
        for number, (rows, labels) in enumerate(files)
    ]
    count = sum(len(rows) for rows, _ in files)
    facts = PixelFacts(
        shape=SHAPE, levels=LEVELS, classes=3, class_names=None, independent_bits=0.0, histogram_bits=0.0,
        converted={}, rejected={}, rejected_examples=[],
    )  # fmt: skip
    manifest = Manifest(
        format=FORMAT, version=VERSION, vocabulary="pixels17", vocabulary_size=17, length=36, rows_per_group=GROUP,
        source=SourceFacts(kind="images", identity="a test", units=1, bytes=1, sha256=""), config={},
        splits={"train": Split(documents=count, characters=0, tokens=36 * count, dropped_tokens=0, rows=count,
                               shards=written)},
        ngrams=None, pixels=facts, fingerprint="",
    )  # fmt: skip
    manifest = manifest.model_copy(update={"fingerprint": manifest.content_fingerprint()})
    Folder(root).write(MANIFEST, manifest.model_dump_json().encode())
    return manifest


@pytest.fixture
def files() -> list[tuple[np.ndarray, np.ndarray]]:
    return [some_pictures(count, seed) for seed, count in enumerate((22, 15, 3))]


def webdataset_samples(file) -> list[tuple[str, np.ndarray, int | None]]:
    """Key, picture and label of each sample, as plain webdataset reads them."""
    import webdataset

    samples = webdataset.WebDataset(str(file), shardshuffle=False).decode("pil")
    return [(sample["__key__"], np.asarray(sample["png"]), sample.get("cls")) for sample in samples]


# -- the same as parquet ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("remote", [False, True])
def test_both_formats_are_the_same_set(request, tmp_path, files, remote):
    if remote:
        request.getfixturevalue("s3")
    places = [Folder(f"s3://{BUCKET}/{form}" if remote else tmp_path / form) for form in SUFFIXES]
    one, other = (write_pictures(place, form, files) for place, form in zip(places, SUFFIXES, strict=True))
    assert one.fingerprint == other.fingerprint
    assert [s.content for s in one.splits["train"].shards] == [s.content for s in other.splits["train"].shards]
    opened = [ShardSet(place) for place in places]
    ids = np.random.default_rng(0).integers(0, 40, 30)
    for wanted in (np.arange(40), ids, ids[:1], ids[:0]):
        (tokens, labels), (same, too) = (one.read_labelled(wanted) for one in opened)
        assert np.array_equal(tokens, same)
        assert np.array_equal(labels, too)  # type: ignore[arg-type]
    assert opened[0].reads.rows_read == opened[1].reads.rows_read
    assert opened[1].dtype == opened[1].read(ids).dtype == np.uint8
    assert verify(places[1]).fingerprint == one.fingerprint


def test_a_row_group_is_one_range(s3, files):
    """In S3: the manifest and a listing, an index, and then nothing but the bytes of the samples wanted."""
    manifest = write_pictures(Folder(f"s3://{BUCKET}/set"), "webdataset", files[:1])
    opened = ShardSet(f"s3://{BUCKET}/set")
    opened.read(np.array([0]))
    s3.fails(0)
    opened.reads.bytes = 0
    opened.read(np.array([5, 9, 6]))
    (asked,) = s3.asked
    start, stop = map(int, asked.split("bytes=")[1].split("-"))
    assert stop + 1 - start == opened.reads.bytes < manifest.splits["train"].shards[0].bytes / 4


@settings(max_examples=20, deadline=None)
@given(
    st.integers(0, 23),
    st.integers(1, 9),
    st.integers(2, 256),
    st.sampled_from([1, 3]),
    st.booleans(),
    st.integers(0, 9),
)
def test_any_rows_come_back(count, group, levels, channels, labelled, seed):
    """Also those of every number of levels; and by row groups in any order."""
    generator = np.random.default_rng(seed)
    rows = generator.integers(0, levels, (count, 2 * 3 * channels)).astype(np.uint8)
    labels = generator.integers(NO_LABEL, 1000, count if labelled else 0).astype(np.int32)
    data = pack(rows, labels, group, Pictures((2, 3, channels), levels), "a")
    assert data == pack(rows, labels, group, Pictures((2, 3, channels), levels), "a")
    content = TarContent(data[-footer_size(data) :], len(data))
    groups = generator.permutation(len(content.counts)).tolist()
    found, known = content.read(groups, io.BytesIO(data))  # type: ignore[arg-type]
    order = [row for g in groups for row in range(g * group, min(g * group + group, count))]
    assert np.array_equal(found, rows[order])
    assert np.array_equal(known, labels[order] if labelled else labels)


@pytest.mark.parametrize("levels", range(2, 257))
def test_levels_are_different_brightnesses(levels):
    assert len(set(brightness(np.arange(levels), levels).tolist())) == levels


# -- other readers ---------------------------------------------------------------------------------------------------


def test_plain_webdataset_and_tar_read_it(tmp_path, files):
    write_pictures(tmp_path, "webdataset", files)
    rows, labels = files[0]
    file = tmp_path / "train" / "00000-0000.tar"
    samples = webdataset_samples(file)
    assert [key for key, _, _ in samples] == [f"00000-0000-{row:06d}" for row in range(22)]
    assert np.array_equal([picture for _, picture, _ in samples], brightness(rows, LEVELS).reshape(-1, *SHAPE))
    assert [NO_LABEL if label is None else label for _, _, label in samples] == labels.tolist()
    with tarfile.open(file) as tar:
        members = tar.getmembers()
    assert {(m.mtime, m.uid, m.gid, m.uname, m.mode) for m in members} == {(0, 0, 0, "", 0o644)}
    assert [m.name for m in members if not m.name.endswith((".png", ".cls"))] == ["__index__"]


def test_it_is_a_source_of_images_again(tmp_path):
    """Of 256 levels: the tokens themselves."""
    rows = np.random.default_rng(0).integers(0, 256, (22, 36)).astype(np.uint8)
    labels = np.arange(22) % 3
    shards.write_shard(tmp_path, "a.tar", rows, GROUP, labels, Pictures(SHAPE, 256))
    (found,) = read_all(Recipe("webdataset", SHAPE), tmp_path / "a.tar")
    assert np.array_equal(found.tokens, rows)
    assert found.labels is not None
    assert found.labels.tolist() == labels.tolist()


@pytest.mark.ray
def test_plain_pyarrow_and_ray_read_parquet(ray_cluster, tmp_path, files):
    import ray.data

    write_pictures(tmp_path, "parquet", files)
    folder = tmp_path / "train"
    rows, labels = (np.concatenate(column) for column in zip(*files, strict=True))
    for table in (pq.read_table(folder), pyarrow.dataset.dataset(folder).to_table()):
        assert table["tokens"].to_pylist() == rows.tolist()
        assert table["label"].to_pylist() == labels.tolist()
    dataset = quiet(ray.data.read_parquet(str(folder), override_num_blocks=1))
    found = [(*row["tokens"], row["label"]) for row in dataset.iter_rows()]  # in any order
    assert sorted(found) == sorted((*row, label) for row, label in zip(rows, labels, strict=True))


# -- damage ----------------------------------------------------------------------------------------------------------


def test_no_flipped_bit_reaches_the_reader(tmp_path, files):
    """Wherever in a tar a bit is changed: reading gives the true rows, or names the shard."""
    write_pictures(tmp_path, "webdataset", files)
    file = tmp_path / "train" / "00001-0000.tar"
    sound = file.read_bytes()
    truth = ShardSet(tmp_path).read_labelled(np.arange(40))
    for position in range(0, len(sound), 97):
        damage(file, position)
        with pytest.raises(UserError, match=r"shard 'train/00001-0000\.tar' .* is damaged"):
            ShardSet(tmp_path).read_labelled(np.arange(40))
        file.write_bytes(sound)
    assert np.array_equal(ShardSet(tmp_path).read(np.arange(40)), truth[0])
    damage(file, 700)
    with pytest.raises(UserError, match=r"shard 'train/00001-0000\.tar' .* is damaged: its sha256"):
        verify(tmp_path)


def test_an_index_is_not_believed():
    """What would have to be forged together with the manifest: sizes, counts and pictures that do not fit."""
    rows, labels = some_pictures(7)
    data = pack(rows, labels, GROUP, PICTURES, "a")
    footer = data[-footer_size(data) :]

    def opened(before: bytes, after: bytes, data: bytes = data) -> TarContent:
        assert before in footer
        return TarContent(footer.replace(before, after), len(data))

    for before, after in (
        (b'"rows_per_group":5', b'"rows_per_group":3'),
        (b'"rows_per_group":5', b'"rows_per_group":0'),
        (b'"png":[', b'"png":[99999999999999,'),
        (b'"png":[', b'"png":[-512,'),
        (b'"cls":[', b'"cls":[1,'),
        (b'"levels":17', b'"levels":1'),
        (b'"version":1', b'"version":2'),
    ):
        with pytest.raises(ValueError, match=r"index|validation error|Input"):
            opened(before, after)
    for before, after in ((b'"shape":[4,3,3]', b'"shape":[3,4,3]'), (b'"levels":17', b'"levels":18')):
        with pytest.raises(ValueError, match="the picture of its row 0 "):
            opened(before, after).read([0], io.BytesIO(data))  # type: ignore[arg-type]
    for tail in (b"", bytes(2000), b"x" * 2000, bytes(976) + b"              1\n" + bytes(1024)):
        with pytest.raises(ValueError):  # noqa: PT011 - whatever `reading` makes a message of
            footer_size(tail)


# -- sets ------------------------------------------------------------------------------------------------------------


def test_text_has_no_pictures(tmp_path):
    with pytest.raises(ValidationError, match="format=webdataset is for images, but source=text is text: say parquet"):
        DataConfig(source="text", path=str(tmp_path), format="webdataset")


def test_merging_of_both_formats(tmp_path, files):
    """The shards stay what they are."""
    write_pictures(tmp_path / "a", "webdataset", files)
    more = [some_pictures(9, seed=9)]
    write_pictures(tmp_path / "b", "parquet", more)
    merged = inspect.merge(tmp_path / "a", tmp_path / "b", tmp_path / "c", quietly)
    assert [shard.path for shard in merged.splits["train"].shards][2:] == [
        "train/00002-0000.tar", "train/00003-0000.parquet"
    ]  # fmt: skip
    rows = ShardSet(tmp_path / "c").read(np.arange(49))
    assert sorted(map(bytes, rows)) == sorted(bytes(row) for part, _ in [*files, *more] for row in part)
    assert f"{FORMAT} {VERSION}, parquet and webdataset" in inspect.describe(tmp_path / "c")
    sheet = inspect.rows(ShardSet(tmp_path / "a"), np.array([0]))
    assert isinstance(sheet, Image.Image)
    assert np.array_equal(np.asarray(sheet), brightness(files[0][0][0], LEVELS).reshape(SHAPE))


@pytest.mark.ray
def test_prepared_and_streamed(ray_cluster, tmp_path):
    """The same images in both formats: the same fingerprint, and the same batches with their labels."""
    write_mnist(tmp_path / "mnist", train=60, test=10)
    common = {"source": "idx", "path": str(tmp_path / "mnist"), "rows_per_group": 8, "rows_per_shard": 16}
    configs = [DataConfig(**common, directory=str(tmp_path), format=form) for form in SUFFIXES]  # type: ignore[arg-type]
    assert len({config_digest(config, open_source(config)) for config in configs}) == 2
    roots = [prepare(config, quietly) for config in configs]
    assert roots[0] != roots[1]
    manifests = [verify(root) for root in roots]
    assert manifests[0].fingerprint == manifests[1].fingerprint
    assert manifests[0].pixels == manifests[1].pixels
    assert {shard.path[-4:] for shard in manifests[1].splits["train"].shards} == {".tar"}
    before = {file: file.read_bytes() for file in (roots[1] / "train").iterdir()}
    (roots[1] / MANIFEST).unlink()
    sorted(before)[0].unlink()
    assert prepare(configs[1], quietly) == roots[1]
    assert {file: file.read_bytes() for file in (roots[1] / "train").iterdir()} == before
    order = Order.of(ShardSet(roots[0]), batch_size=16, slices=4, seed=1, mixing=4)
    for rank in range(2):
        streams = [batches(root, "train", order, 0, 6, rank, 2) for root in roots]
        for one, other in zip(*streams, strict=True):
            assert np.array_equal(one.tokens, other.tokens)
            assert np.array_equal(one.labels, other.labels)  # type: ignore[arg-type]
