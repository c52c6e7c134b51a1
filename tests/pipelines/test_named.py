"""Sets by name: fetched from a real HTTP server, or read from mirrors here and in S3, in every form they come in."""

import hashlib
import io
import os
import re
import tarfile
import zipfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from md4.errors import UserError
from pipelines import fetch, images, named
from pipelines.config import DataConfig, check, open_source
from pipelines.fetch import Hub, Url
from pipelines.sources import read
from pipelines.storage import Folder
from pipelines.units import Source
from tests.pipelines.pictures import encoded, some_images, some_labels, write_cifar, write_mnist, write_parquet
from tests.shared import shared
from tests.web import Web

PIECE = 2**22


@pytest.fixture
def web(tmp_path, monkeypatch):
    """An HTTP server of the folder `web`, and caches of our own."""
    monkeypatch.setenv("MD4_CACHE", str(tmp_path / "cache"))
    (tmp_path / "web").mkdir()
    with Web(tmp_path / "web") as server:
        yield server


def quietly(_: str) -> None:
    pass


def text_of(source: Source, piece: int = PIECE) -> dict[str | None, list[str]]:
    """The documents of each split."""
    found: dict[str | None, list[str]] = {}
    for unit in source.list_units(piece):
        found.setdefault(unit.split, []).extend(document.text for document in read(unit).documents)
    return found


def pixels_of(config: DataConfig) -> dict[str | None, list[tuple[bytes, int]]]:
    """Images with their labels, of each split."""
    source = open_source(config)
    found: dict[str | None, list[tuple[bytes, int]]] = {}
    for unit in source.list_units(10**5):
        read_images = images.read(unit, config.recipe(), source.class_names())
        assert read_images.labels is not None
        pairs = zip(read_images.tokens, read_images.labels.tolist(), strict=True)
        found.setdefault(unit.split, []).extend((row.tobytes(), label) for row, label in pairs)
    return found


def labelled(pixels: np.ndarray, labels: list[int]) -> list[tuple[bytes, int]]:
    return [(image.tobytes(), label) for image, label in zip(pixels, labels, strict=True)]


TEXT8 = ("one two three four five six seven eight nine " * 30)[:1000]


def zipped(files: dict[str, bytes]) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return out.getvalue()


def from_here(monkeypatch, web: Web, name: str, *urls: tuple[str, str | None]) -> None:
    """Let a set's files lie on the test's server."""
    origin = tuple(Url(f"{web.url}/{file}", known) for file, known in urls)
    monkeypatch.setitem(named.SETS, name, replace(named.SETS[name], origin=origin))


# -- text8 -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("piece", [64, PIECE])
def test_text8_is_split_by_position(tmp_path, piece):
    (tmp_path / "text8").write_text(TEXT8)
    for path in (tmp_path, tmp_path / "text8"):
        source = open_source(DataConfig(source="text8", path=str(path)))
        said: list[str] = []
        source.fetch(said.append)
        assert said == [
            "data: text8: the file has 1,000 bytes, not 100,000,000: train 900, validation 50, test 50 of them; "
            "figures are not comparable with published ones"
        ]
        found = {split: "".join(parts) for split, parts in text_of(source, piece).items()}
        assert found == {"train": TEXT8[:900], "validation": TEXT8[900:950], "test": TEXT8[950:]}


def test_a_piece_of_the_real_text8():
    source = open_source(DataConfig(source="text8", path=str(shared("data", "text8"))))
    found = {split: "".join(parts) for split, parts in text_of(source).items()}
    data = (shared("data", "text8") / "text8.first3010294").read_text()
    assert "".join(found[split] for split in ("train", "validation", "test")) == data
    assert [len(found[split]) for split in ("train", "validation")] == [2_709_264, 150_515]


def test_text8_is_fetched_once_and_verified(tmp_path, web, monkeypatch):
    data = zipped({"text8": TEXT8.encode(), "other": np.random.default_rng(0).bytes(2**21)})
    (tmp_path / "web" / "text8.zip").write_bytes(data)
    from_here(monkeypatch, web, "text8", ("text8.zip", f"sha256:{hashlib.sha256(data).hexdigest()}"))
    config = DataConfig(source="text8", directory=str(tmp_path / "data"))
    assert check(config)[0].startswith(f"data: text8 would be fetched from {web.url}/text8.zip: the first 10^8")
    source = open_source(config)
    with pytest.raises(UserError, match="text8 is not in the cache"):
        source.list_units(PIECE)
    assert web.asked == []
    web.breaks = 2
    source.fetch(quietly)
    starts = [int((re.findall(r"bytes=(\d+)-", line) or ["0"])[0]) for line in web.asked]
    assert len(starts) == 3
    assert 0 == starts[0] < 2**20 - 2**17 < starts[1] < starts[2] < len(data)
    assert "".join(text_of(source)["train"]) == TEXT8[:900]
    source.fetch(quietly)
    assert (len(web.asked), check(config)) == (3, [])
    kept = fetch.receipt("text8")
    assert kept is not None
    assert kept.archives == {f"{web.url}/text8.zip": hashlib.sha256(data).hexdigest()}
    assert sorted(os.listdir(tmp_path / "cache")) == ["downloads", "receipts", "sets"]
    assert os.listdir(tmp_path / "cache" / "downloads") == []

    (Path(kept.folder) / "text8").unlink()
    (tmp_path / "web" / "text8.zip").write_bytes(zipped({"text8": TEXT8[::-1].encode()}))
    with pytest.raises(UserError, match=r"text8\.zip is not what it should be"):
        source.fetch(quietly)
    (tmp_path / "web" / "text8.zip").unlink()
    with pytest.raises(UserError, match=r"text8\.zip cannot be fetched: 404.*data\.path=FOLDER"):
        source.fetch(quietly)


def test_what_has_no_known_hash_must_stay_the_same(tmp_path, web, monkeypatch):
    (tmp_path / "web" / "text8.zip").write_bytes(zipped({"text8": TEXT8.encode()}))
    from_here(monkeypatch, web, "text8", ("text8.zip", None))
    source = open_source(DataConfig(source="text8"))
    source.fetch(quietly)
    kept = fetch.receipt("text8")
    assert kept is not None
    (Path(kept.folder) / "text8").unlink()
    (tmp_path / "web" / "text8.zip").write_bytes(zipped({"text8": TEXT8[::-1].encode()}))
    with pytest.raises(UserError, match="is not what it should be"):
        source.fetch(quietly)


def test_archives_that_do_harm(tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    bomb = io.BytesIO(zipped({"text8": bytes(2**26 + 1)}))
    with pytest.raises(UserError, match="unpacks to more than 100 times its size"):
        fetch.unpack(bomb, "a.zip", "text8", out)
    fetch.unpack(io.BytesIO(zipped({"../../text8": b"words"})), "a.zip", "text8", out)
    assert [path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*")] == ["out", "out/text8"]
    tar = io.BytesIO()
    with tarfile.open(fileobj=tar, mode="w:gz") as archive:
        link = tarfile.TarInfo("text8")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        archive.addfile(link)
    with pytest.raises(UserError, match="holds no file that matches 'text8'"):
        fetch.unpack(tar, "a.tgz", "text8", out)
    with pytest.raises(UserError, match="is not a sound archive"):
        fetch.unpack(io.BytesIO(b"no archive"), "a.zip", "text8", out)


@pytest.mark.parametrize("where", ["folder", "http", "s3"])
def test_mirrors_of_archives(tmp_path, web, s3, monkeypatch, where):
    data = zipped({"text8": TEXT8.encode()})
    (tmp_path / "web" / "text8.zip").write_bytes(data)
    from_here(monkeypatch, web, "text8", ("absent/text8.zip", None))
    Folder("s3://bucket/mirror").write("text8.zip", data)
    path = {"folder": str(tmp_path / "web"), "http": web.url, "s3": "s3://bucket/mirror"}[where]
    source = open_source(DataConfig(source="text8", path=path))
    assert source.missing()
    source.fetch(quietly)
    assert source.missing() is None
    assert "".join(text_of(source)["test"]) == TEXT8[950:]


# -- other texts -----------------------------------------------------------------------------------------------------

ARTICLES = [f" = Title {i} = \n \n Words of {i} . \n \n = = Part = = \n \n More of {i} . \n \n" for i in range(5)]


def test_wikitext_from_files_and_tables(tmp_path):
    for name in ("train", "valid", "test"):
        (tmp_path / "tokens" / f"wiki.{name}.tokens").parent.mkdir(exist_ok=True)
        (tmp_path / "tokens" / f"wiki.{name}.tokens").write_text(" \n" + "".join(ARTICLES))
    lines = [line + "\n" if line.strip() else "" for line in ("\n" + "".join(ARTICLES)).split("\n")[:-1]]
    (tmp_path / "tables").mkdir()
    for name in ("train", "validation", "test"):
        pq.write_table(
            pa.table({"text": lines}), tmp_path / "tables" / f"{name}-00000-of-00001.parquet", row_group_size=3
        )
    found = text_of(open_source(DataConfig(source="wikitext-2", path=str(tmp_path / "tokens"))), 70)
    assert found == dict.fromkeys(["train", "validation", "test"], ARTICLES)
    found = text_of(open_source(DataConfig(source="wikitext-103", path=str(tmp_path / "tables"))), 70)
    assert sorted(map(str, found)) == ["test", "train", "validation"]
    plain = [article.replace(" \n \n", " \n\n") for article in ARTICLES]
    assert all([text.replace(" \n \n", " \n\n") for text in texts] == plain for texts in found.values())


def test_real_wikitext():
    source = open_source(DataConfig(source="wikitext-2", path=str(shared("data", "wikitext-2"))))
    found = {unit.split for unit in source.list_units(PIECE) if not unit.name.startswith("raw_train")}
    assert found == {"validation", "test"}


def test_one_billion_words(tmp_path, web, monkeypatch):
    base = "1-billion-word-language-modeling-benchmark-r13output"
    tar = io.BytesIO()
    with tarfile.open(fileobj=tar, mode="w:gz") as archive:
        for name, text in (
            (f"{base}/training-monolingual.tokenized.shuffled/news.en-00001-of-00100", b"One .\nTwo .\n"),
            (f"{base}/heldout-monolingual.tokenized.shuffled/news.en.heldout-00000-of-00050", b"Three .\n"),
            (f"{base}/README", b"words"),
        ):
            info = tarfile.TarInfo(name)
            info.size = len(text)
            archive.addfile(info, io.BytesIO(text))
    (tmp_path / "web" / "lm1b.tar.gz").write_bytes(tar.getvalue())
    from_here(monkeypatch, web, "lm1b", ("lm1b.tar.gz", None))
    source = open_source(DataConfig(source="lm1b"))
    source.fetch(quietly)
    assert text_of(source) == {"train": ["One .", "Two ."], "test": ["Three ."]}


@pytest.mark.parametrize("name", ["openwebtext", "fineweb-edu"])
def test_web_texts_from_s3(s3, name):
    out = io.BytesIO()
    pq.write_table(pa.table({"text": ["one", "two"], "url": ["a", "b"]}), out)
    Folder("s3://bucket/mirror").write("train-00000-of-00001.parquet", out.getvalue())
    source = open_source(DataConfig(source=name, path="s3://bucket/mirror"))
    assert source.missing() is None
    assert text_of(source) == {"train": ["one", "two"]}


# -- images ----------------------------------------------------------------------------------------------------------


def write_npz(file: Path, pixels: np.ndarray, labels: list[int], packed: bool = False) -> None:
    """A batch of downsampled ImageNet, with labels from 0 that it counts from 1."""
    data = pixels.transpose(0, 3, 1, 2).reshape(len(pixels), -1)
    save = np.savez_compressed if packed else np.savez
    save(file, data=data, labels=np.array(labels) + 1, mean=data.mean(0))


def test_downsampled_imagenet_is_fetched(tmp_path, web, monkeypatch):
    train, labels = some_images(40, (32, 32, 3)), list(range(960, 1000))
    for number, (first, packed) in enumerate(((0, False), (25, True)), 1):
        part = slice(first, 25 if number == 1 else 40)
        write_npz(tmp_path / f"train_data_batch_{number}.npz", train[part], labels[part], packed)
    write_npz(tmp_path / "val_data.npz", train[:7], labels[:7])
    parts = {"train": ("train_data_batch_1.npz", "train_data_batch_2.npz"), "val": ("val_data.npz",)}
    for part, names in parts.items():
        files = {f"Imagenet32_{part}_npz/{name}": (tmp_path / name).read_bytes() for name in names}
        (tmp_path / "web" / f"{part}.zip").write_bytes(zipped(files))
    from_here(monkeypatch, web, "imagenet32", ("train.zip", None), ("val.zip", None))
    config = DataConfig(source="imagenet32")
    assert (config.shape, config.length, config.vocabulary) == ((32, 32, 3), 3072, "pixels")
    open_source(config).fetch(quietly)
    found = pixels_of(config)
    assert found == {"train": labelled(train, labels), "validation": labelled(train[:7], labels[:7])}


def test_wrong_npz(tmp_path):
    config = DataConfig(source="imagenet32", path=str(tmp_path))
    file, pixels = tmp_path / "train_data_batch_1.npz", some_images(3, (32, 32, 3))
    cases: list[tuple[dict[str, np.ndarray], str]] = [
        ({"labels": np.ones(3)}, "has no array 'data': it has labels.npy"),
        ({"data": np.zeros((3, 100), np.uint8)}, r"must be uint8 \[n, 3 H H\], but is uint8 \[3, 100\]"),
        ({"data": np.zeros((3, 3072))}, r"but is float64 \[3, 3072\]"),
        ({"data": pixels.reshape(3, -1), "labels": np.array([1, 2])}, r"it has 3 images, but labels int64 \[2\]"),
        ({"data": np.array([{}], object)}, "is not a plain one"),
    ]
    for arrays, message in cases:
        np.savez(file, **arrays)  # type: ignore[arg-type]
        with pytest.raises(UserError, match=message):
            open_source(config).list_units(1)
    write_npz(file, pixels, [0, -1, 2])
    with pytest.raises(UserError, match="image 1 has the label 0, but they count from 1"):
        pixels_of(config)
    np.savez_compressed(file, data=np.zeros((50_000, 3072), np.uint8))
    with pytest.raises(UserError, match="unpacks to more than 100 times its size"):
        open_source(config).list_units(1)
    file.write_bytes(b"no zip")
    with pytest.raises(UserError, match=r"is not an \.npz that can be read"):
        open_source(config).list_units(1)


def test_cifar10_in_every_form(tmp_path, web, monkeypatch, s3):
    pixels, labels = some_images(30, (32, 32, 3)), some_labels(30)
    write_cifar(tmp_path / "bin", pixels[:20], labels=labels[:20])
    write_cifar(tmp_path / "bin", pixels[20:], "test_batch.bin", labels[20:])
    (tmp_path / "bin" / "batches.meta.txt").write_text("\n".join("abcdefghij"))
    for name, part in (("train", slice(20)), ("test", slice(20, 30))):
        write_parquet(tmp_path / f"hub/{name}-00000-of-00001.parquet", [encoded(p) for p in pixels[part]], labels[part])
    with tarfile.open(tmp_path / "web" / "cifar.tar.gz", "w:gz") as archive:
        archive.add(tmp_path / "bin", "cifar-10-batches-bin")
    from_here(monkeypatch, web, "cifar10", ("cifar.tar.gz", None))
    for file in (tmp_path / "bin").iterdir():
        Folder("s3://bucket/cifar").write(file.name, file.read_bytes())
    expected = {"train": labelled(pixels[:20], labels[:20]), "test": labelled(pixels[20:], labels[20:])}
    for path in (None, str(tmp_path / "bin"), str(tmp_path / "hub"), "s3://bucket/cifar"):
        config = DataConfig(source="cifar10", path=path)
        open_source(config).fetch(quietly)
        assert pixels_of(config) == expected
    assert open_source(DataConfig(source="cifar10")).class_names() == list("abcdefghij")


@pytest.mark.parametrize("end", ["", ".gz"])
def test_mnist_from_s3(tmp_path, s3, end):
    write_mnist(tmp_path, end=end)
    for file in tmp_path.iterdir():
        Folder("s3://bucket/mnist").write(file.name, file.read_bytes())
    here = pixels_of(DataConfig(source="mnist", path=str(tmp_path)))
    assert [len(pairs) for pairs in here.values()] == [7, 30]
    assert pixels_of(DataConfig(source="mnist", path="s3://bucket/mnist")) == here


def test_the_real_mnist_has_the_known_sums():
    folder = shared("data", "mnist")
    origin = named.SETS["mnist"].origin
    assert not isinstance(origin, Hub)
    for url in origin:
        assert url.hash == "sha256:" + hashlib.sha256((folder / url.name).read_bytes()).hexdigest()


def test_a_mirror_of_something_else(tmp_path):
    (tmp_path / "a.doc").write_text("words")
    with pytest.raises(UserError, match="has no files of cifar10: it is read from cifar, image-parquet, images"):
        open_source(DataConfig(source="cifar10", path=str(tmp_path))).list_units(1)


# -- the hub, and files behind urls ----------------------------------------------------------------------------------


def test_files_behind_urls(tmp_path, web):
    (tmp_path / "web" / "books.txt").write_text("some words")
    source = open_source(DataConfig(source="text", path=f"{web.url}/books.txt"))
    assert (source.label, source.missing() is None) == ("books", False)
    source.fetch(quietly)
    assert text_of(source) == {None: ["some words"]}


CARD = """---
configs:
- config_name: small
  data_files:
  - split: train
    path: sample/*
  - split: test
    path: held/*.parquet
- config_name: large
  data_files: data/*
---
# A set
"""


@pytest.fixture
def hub(tmp_path, web, monkeypatch):
    """A hub with one dataset."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "ENDPOINT", web.url)  # HF_ENDPOINT, which is read when it is imported
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", web.url + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    root = tmp_path / "web" / "datasets" / "org" / "name"
    for name, rows in (("sample/0", ["one", "two"]), ("held/0", ["three"]), ("data/0", ["four"])):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(pa.table({"text": rows}), root / f"{name}.parquet")
    (root / "README.md").write_text(CARD)
    return root


def test_datasets_of_the_hub(hub, web):
    source = open_source(DataConfig(source="huggingface", path="org/name:small"))
    assert "would be fetched" in (source.missing() or "")
    source.fetch(quietly)
    assert text_of(source) == {"test": ["three"], "train": ["one", "two"]}
    asked = len(web.asked)
    again = open_source(DataConfig(source="huggingface", path="org/name:small"))
    again.fetch(quietly)
    assert (text_of(again)["test"], len(web.asked)) == (["three"], asked)
    with pytest.raises(UserError, match="say which configuration, as org/name:small; there are small, large"):
        open_source(DataConfig(source="huggingface", path="org/name")).fetch(quietly)
    with pytest.raises(UserError, match=r"org/absent .* cannot be fetched"):
        open_source(DataConfig(source="huggingface", path="org/absent")).fetch(quietly)


def test_a_hub_without_a_card(hub):
    (hub / "README.md").unlink()
    source = open_source(DataConfig(source="huggingface", path="org/name:data"))
    source.fetch(quietly)
    assert text_of(source) == {None: ["four"]}


def test_named_sets_of_the_hub(hub, monkeypatch):
    one = replace(named.SETS["fineweb-edu"], origin=Hub("org/name", ("sample/*.parquet",)), below="sample")
    monkeypatch.setitem(named.SETS, "fineweb-edu", one)
    source = open_source(DataConfig(source="fineweb-edu"))
    source.fetch(quietly)
    assert text_of(source) == {None: ["one", "two"]}
