"""Data sets known by name: where each lies, in which formats it is read, and what it may be used for.

Without `data.path` a set is fetched into a cache (`pipelines.fetch`), when it is prepared and not before. With it, the
path is a mirror, which is read instead: a folder or a file on this machine or in S3, or a http(s) url of a folder with
the same files. Which of a set's formats a mirror has is told by the names of its files.

Of the addresses and layouts below, those of the hub and of text8, CIFAR-10, MNIST, One Billion Words and downsampled
ImageNet were looked up in public records of them, not tried from here. The sums of text8 and CIFAR-10 are those that
many independent records agree on, those of MNIST were computed from the files. Where none stands here, the hashes of
the first fetch are kept, and later ones must have the same.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from md4.errors import UserError
from pipelines import images, sources
from pipelines.fetch import (
    Hub,
    Receipt,
    Url,
    cache_folder,
    fetch_hub,
    fetch_urls,
    fetched,
    is_archive,
    key_of,
    unpack_mirror,
)
from pipelines.roots import Root
from pipelines.text import files as text_files
from pipelines.units import Report, Source, Unit

Opener = Callable[[str, str], Source]  # given a format and a path


@dataclass(frozen=True)
class NamedSet:
    """A set that is known by name."""

    about: str  # what it is, its size, its licence
    formats: tuple[tuple[str, str], ...]  # a source that reads it, and a pattern of its files' names; the first found
    origin: Hub | tuple[Url, ...]
    below: str = ""  # folder of the hub's files
    wanted: str | None = None  # what to unpack from archives: a pattern of paths in them
    shape: tuple[int, int, int] | None = None  # of images


def _imagenet(size: int, parts: tuple[str, ...]) -> NamedSet:
    return NamedSet(
        f"ImageNet (ILSVRC 2012) downsampled to {size} x {size} by Chrabaszcz et al. (2017), with labels; for research "
        "without commerce, after registration at image-net.org. Another downsampling than that of van den Oord et al. "
        "(2016), whose files are no longer offered and on which likelihoods are mostly reported: a mirror of their "
        "folders train and valid can be given",
        (
            ("npz", r"(train_data_batch_\d+|val_data)\.npz$"),
            ("images", r"\.(png|jpe?g)$"),
            ("image-parquet", r"\.parquet$"),
            ("webdataset", r"\.(tar|tgz)$"),
        ),
        tuple(Url(f"https://image-net.org/data/downsample/Imagenet{size}_{part}_npz.zip") for part in parts),
        wanted=r"(train_data_batch_\d+|val_data)\.npz$",
        shape=(size, size, 3),
    )


def _wikitext(config: str, about: str) -> NamedSet:
    return NamedSet(
        f"{about}; CC BY-SA 3.0 and GFDL. The raw form, without <unk>",
        (
            ("wikitext-parquet", r"\.parquet$"),
            ("wikitext", r"(train|valid|validation|test)\.(tokens|raw|txt)(\.gz|\.zst)?$"),
        ),
        Hub("Salesforce/wikitext", (f"{config}/*.parquet",), revision="b08601e04326c79dfdd32d625aee71d232d685c3"),
        below=config,
    )


_MNIST = "https://ossci-datasets.s3.amazonaws.com/mnist/"
SETS = {
    "text8": NamedSet(
        "the first 10^8 characters of cleaned English Wikipedia, 27 symbols (Mahoney); 31 MB; text under CC BY-SA. The "
        "first 90 million are for training, 5 million each for validation and test",
        (("text8", r"(^|/)text8[^/]*(?<!\.zip)$"),),
        (
            Url(
                "http://mattmahoney.net/dc/text8.zip",
                "sha256:a6640522afe85d1963ad56c05b0ede0a0c000dddc9671758a6cc09b7a38e5232",
            ),
        ),
        wanted=r"(^|/)text8$",
    ),
    "openwebtext": NamedSet(
        "8 million web pages linked from Reddit (Gokaslan and Cohen); 24 GB packed, 40 GB of text; CC0 for the "
        "collection, the pages are their authors'",
        (
            ("parquet", r"\.parquet$"),
            ("text-archives", r"\.tar$"),
            ("jsonl", r"\.jsonl(\.gz|\.zst)?$"),
            ("text", r"\.txt(\.gz|\.zst)?$"),
        ),
        Hub("Skylion007/openwebtext", ("plain_text/*.parquet",)),
        below="plain_text",
    ),
    "fineweb-edu": NamedSet(
        "educational web pages, the sample of 10 billion tokens (Hugging Face); 28 GB packed; ODC-By",
        (("parquet", r"\.parquet$"), ("jsonl", r"\.jsonl(\.gz|\.zst)?$"), ("text", r"\.txt(\.gz|\.zst)?$")),
        Hub("HuggingFaceFW/fineweb-edu", ("sample/10BT/*.parquet",)),
        below="sample/10BT",
    ),
    "lm1b": NamedSet(
        "One Billion Word Benchmark: shuffled, tokenised sentences of news of 2011 (Chelba et al.); 1.8 GB packed; "
        "terms of WMT 2011. A sentence is a document; what is held out is the test split",
        (("lines", r"(news\.en[^/]*-of-\d+|\.tokens|\.txt)$"),),
        (
            Url(
                "http://www.statmt.org/lm-benchmark/1-billion-word-language-modeling-benchmark-r13output.tar.gz",
            ),
        ),
        # The first file of the training folder is numbered 1; number 0 is all of the fifty that are held out.
        wanted=r"training-monolingual\.tokenized\.shuffled/news\.en-\d+-of-\d+$"
        r"|heldout-monolingual\.tokenized\.shuffled/news\.en\.heldout-\d+-of-\d+$",
    ),
    "wikitext-2": _wikitext("wikitext-2-raw-v1", "720 good articles of English Wikipedia (Merity et al.); 8 MB"),
    "wikitext-103": _wikitext(
        "wikitext-103-raw-v1", "28,000 good articles of English Wikipedia (Merity et al.); 315 MB"
    ),
    "cifar10": NamedSet(
        "60,000 labelled images of ten classes (Krizhevsky); 170 MB; no licence stated",
        (("cifar", r"\.bin$"), ("image-parquet", r"\.parquet$"), ("images", r"\.(png|jpe?g)$")),
        (
            Url(
                "https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz",
                "sha256:c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9ddda3db29a59bca1dd",
            ),
        ),
        wanted=r"(^|/)((data_batch_[1-5]|test_batch)\.bin|batches\.meta\.txt)$",
        shape=(32, 32, 3),
    ),
    "imagenet32": _imagenet(32, ("train", "val")),
    "imagenet64": _imagenet(64, ("train_part1", "train_part2", "val")),
    "mnist": NamedSet(
        "70,000 handwritten digits (LeCun et al.); 12 MB; CC BY-SA 3.0",
        (("idx", r"ubyte(\.gz)?$"), ("image-parquet", r"\.parquet$"), ("images", r"\.png$")),
        (
            Url(
                f"{_MNIST}train-images-idx3-ubyte.gz",
                "sha256:440fcabf73cc546fa21475e81ea370265605f56be210a4024d2ca8f203523609",
            ),
            Url(
                f"{_MNIST}train-labels-idx1-ubyte.gz",
                "sha256:3552534a0a558bbed6aed32b30c495cca23d567ec52cac8be1a0730e8010255c",
            ),
            Url(
                f"{_MNIST}t10k-images-idx3-ubyte.gz",
                "sha256:8d422c7b0a1c1c79245a5bcf07fe86e33eeafee792b84584aec276f5a2dbc4e6",
            ),
            Url(
                f"{_MNIST}t10k-labels-idx1-ubyte.gz",
                "sha256:f7ae60f92e00ec6debd23a6088c31dbd2371eca3ffa0defaefb259924204aec6",
            ),
        ),
        shape=(28, 28, 1),
    ),
}
SHAPES = {name: one.shape for name, one in SETS.items() if one.shape}  # the sets of images
_HUB_NAME = re.compile(r"([\w-][\w.-]*/[\w-][\w.-]*)(?::([\w.+-]+))?")


def is_url(path: str | None) -> bool:
    """Must what lies there be downloaded first?"""
    return path is not None and bool(re.match(r"https?://", path))


def open_named(name: str, path: str | None, opener: Opener) -> Source:
    """The set of that name, or its mirror at `path`, read by what `opener` gives for a format. Nothing is read yet."""
    one = SETS[name]
    key = key_of(name, path)
    identity = name if path is None else f"{name} at {path if is_url(path) else Root(path)}"

    def root() -> Root:
        if path is not None and not is_url(path) and not _archives(Root(path), one):
            return Root(path)
        found = fetched(key)
        if found is None:
            raise UserError(f"{identity} is not in the cache {str(cache_folder())!r}: md4 prepare fetches it")
        return Root(str(Path(found.folder) / one.below)) if path is None else Root(found.folder)

    def inner() -> Source:
        place = root()
        return opener(_format(name, place), str(place))

    def fetch(report: Report) -> None:
        if path is None:
            _fetch_origin(key, one, report)
        elif is_url(path):
            fetch_urls(key, _mirrored(name, path), one.wanted, report)
        elif archives := _archives(Root(path), one):
            assert one.wanted is not None
            unpack_mirror(key, archives, one.wanted, report)
        if name == "text8" and (note := text_files.text8_note(text_files.size_of(root()))):
            report(f"data: {note}")

    def missing() -> str | None:
        if path is not None and not is_url(path):
            archives = _archives(Root(path), one)
            return f"{path} would be unpacked into {cache_folder()}" if archives and not fetched(key) else None
        if fetched(key):
            return None
        where = path or (str(one.origin) if isinstance(one.origin, Hub) else ", ".join(url.url for url in one.origin))
        return f"{name} would be fetched from {where}: {one.about}"

    return Source(
        name, name, identity, lambda piece: inner().list_units(piece), lambda: inner().class_names(), missing, fetch
    )


def _fetch_origin(key: str, one: NamedSet, report: Report) -> Receipt:
    if isinstance(one.origin, Hub):
        return fetch_hub(key, one.origin, report)
    return fetch_urls(key, one.origin, one.wanted, report)


def _mirrored(name: str, path: str) -> tuple[Url, ...]:
    """The files of a set as they lie below a url; of a set on the hub, the url is that of one file."""
    origin = SETS[name].origin
    if isinstance(origin, Hub) or path.rstrip("/").endswith(tuple(url.name for url in origin)):
        return (Url(path),)
    return tuple(Url(f"{path.rstrip('/')}/{url.name}", url.hash) for url in origin)


def _archives(root: Root, one: NamedSet) -> list[str]:
    """The archives of a mirror that has nothing but these."""
    found, _ = root.entries("a mirror of the set")
    known = re.compile("|".join(f"(?:{pattern})" for _, pattern in one.formats), re.IGNORECASE)
    if one.wanted is None or any(known.search(file.name) for file in found):
        return []
    return [file.place for file in found if is_archive(file.name)]


def _format(name: str, root: Root) -> str:
    """The first of the formats of a set that the names of the files tell."""
    found, _ = root.entries(f"a mirror of {name}")
    for kind, pattern in SETS[name].formats:
        if any(re.search(pattern, file.name, re.IGNORECASE) for file in found):
            return kind
    kinds = ", ".join(kind for kind, _ in SETS[name].formats)
    raise UserError(f"data.path={str(root)!r} has no files of {name}: it is read from {kinds}")


# -- what else must be fetched ---------------------------------------------------------------------------------------


def open_url(kind: str, url: str, opener: Opener) -> Source:
    """The source `kind` of a file that is downloaded first."""
    key = key_of("url", url)

    def inner() -> Source:
        found = fetched(key)
        if found is None:
            raise UserError(f"{url} is not in the cache {str(cache_folder())!r}: md4 prepare fetches it")
        (file,) = found.listed()
        return opener(kind, file.place)

    def fetch(report: Report) -> None:
        fetch_urls(key, (Url(url),), None, report)

    return Source(
        kind,
        Root("/" + Url(url).name).label(kind),
        url,
        lambda piece: inner().list_units(piece),
        lambda: inner().class_names(),
        lambda: None if fetched(key) else f"{url} would be fetched into {cache_folder()}",
        fetch,
    )


def hub_name(path: str | None) -> Hub | None:
    """The dataset on the hub that a path names; None for a place on this machine or elsewhere."""
    if path is None or Path(path).expanduser().exists():
        return None
    found = _HUB_NAME.fullmatch(path)
    return Hub(found[1], config=found[2]) if found else None


def open_hub(hub: Hub, opener: Opener) -> Source:
    """A dataset of the hub: its parquet files, or JSON lines."""
    name = hub.repository + (f":{hub.config}" if hub.config else "")
    key = key_of(f"hub-{name}")

    def list_units(piece: int) -> list[Unit]:
        found = fetched(key)
        if found is None:
            raise UserError(f"{hub} is not in the cache: md4 prepare fetches it")
        kind = "parquet" if any(file.endswith(".parquet") for file in found.files) else "jsonl"
        units = opener(kind, found.folder).list_units(piece)
        return [replace(u, split=found.splits.get(u.name) or u.split) for u in units if u.name in found.files]

    def fetch(report: Report) -> None:
        fetch_hub(key, hub, report)

    return Source(
        "huggingface",
        key_of(name.partition("/")[2]),
        name,
        list_units,
        missing=lambda: None if fetched(key) else f"{name} would be fetched from {hub}",
        fetch=fetch,
    )


assert not {*SETS} & {*sources.KINDS, *images.KINDS}
