"""What to prepare, and how: the configuration of a prepared set, its source and its folder."""

import difflib
import hashlib
import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from md4.errors import UserError
from pipelines import images, sources
from pipelines.manifest import MANIFEST
from pipelines.quotas import quotas
from pipelines.storage import Folder, location
from pipelines.units import Source
from pipelines.vocabularies import Vocabulary, vocabulary

if TYPE_CHECKING:
    from pipelines.tar_shards import Pictures

PIXELS = "pixels"  # the vocabulary of images
_FOR_TEXT = ("document_chars", "packing")  # settings that only text has
_FOR_IMAGES = ("shape", "levels", "fit", "damaged", "image_column", "label_column")
_FOR_STREAM = ("order", "cache_mb", "mixture")  # settings of the order of rows, not of the rows
_IMAGE_PART_BYTES = 2**26


class SetConfig(BaseModel):
    """What to prepare, and how. Everything but `directory` has a part in the result."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    source: str = Field(
        default="pydocs",
        description="where the data come from: text (files) or pydocs (Python's own docs); of images digits (ship with "
        "scikit-learn), idx (MNIST), cifar, images (a folder), webdataset or image-parquet",
    )
    path: str | None = Field(
        default=None, description="where the source lies: for text a file, or a folder of .txt and .md files"
    )
    vocabulary: str = Field(
        default="text8",
        description="how documents become tokens: text8 (the 27 symbols a-z and space), gpt2, or pixels",
    )
    length: int = Field(
        default=256, ge=8, le=65536, description="tokens of a row; for images height * width * channels, by default"
    )
    shape: tuple[int, int, int] | None = Field(
        default=None, description="height, width and channels (1 = grey, 3 = RGB) of images; digits, idx, cifar know it"
    )
    levels: int | None = Field(
        default=None, ge=2, le=256, description="brightness levels of images; by default all: 256, of digits 17"
    )
    fit: Literal["exact", "crop"] = Field(
        default="exact", description="images of another size: exact = refused, crop = cut around the centre and resized"
    )
    damaged: Literal["refuse", "skip"] = Field(
        default="refuse", description="images that cannot be used: refuse = stop with a message, skip = count them"
    )
    image_column: str | None = Field(default=None, description="of image-parquet; null = image, or the only one")
    label_column: str | None = Field(default=None, description="of image-parquet; null = label, if there is one")
    validation: float = Field(
        default=0.05, ge=0, lt=1, description="share that goes to the split validation, unless the source has its own"
    )
    test: float = Field(
        default=0.05, ge=0, lt=1, description="share that goes to the split test, unless the source has its own"
    )
    packing: Literal["concat", "windows", "document"] = Field(
        default="concat",
        description="how documents become rows: concat = joined and cut; windows = joined in their order, and a row "
        "begins at every token; document = one a row, filled up with end-of-text tokens that the loss ignores",
    )
    document_chars: int = Field(
        default=20_000, ge=100, description="longer documents are cut at white space, in characters"
    )
    part_bytes: int = Field(
        default=2**22,
        ge=1000,
        description="bytes of the corpus that one task prepares; each part drops the end of its last row",
    )
    rows_per_group: int = Field(
        default=64, ge=1, le=65536, description="rows of a row group: what is read, and shuffled, at once"
    )
    rows_per_shard: int = Field(default=4096, ge=1, description="rows of a shard at most; a multiple of rows_per_group")
    format: Literal["parquet", "webdataset"] = Field(
        default="parquet",
        description="of the shards: parquet, or of images webdataset, tars with a .png and a .cls for each",
    )
    directory: str = Field(
        default="data", description="folder that the prepared set is put into: a path, or s3://bucket/prefix"
    )

    @model_validator(mode="before")
    @classmethod
    def _fill_in(cls, tree: Any) -> Any:
        return cls.filled_in(tree) if isinstance(tree, dict) else tree

    @staticmethod
    def filled_in(tree: dict[str, Any]) -> dict[str, Any]:
        """The settings with what follows from others of them: a set of images knows its vocabulary and its length."""
        kind = tree.get("source")
        if kind not in images.KINDS:
            return tree
        shape = tree.get("shape") or images.SHAPES.get(kind)
        defaults: dict[str, Any] = {"vocabulary": PIXELS, "part_bytes": _IMAGE_PART_BYTES}
        if isinstance(shape, list | tuple) and len(shape) == 3 and all(isinstance(size, int) for size in shape):
            defaults["length"] = math.prod(shape)
        filled = defaults | tree
        filled["shape"] = shape
        if filled.get("levels") is None:
            filled["levels"] = images.native_levels(kind)
        return filled

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.source in images.KINDS:
            self._check_images()
        elif self.format != "parquet":
            raise ValueError(f"format={self.format} is for images, but source={self.source} is text: say parquet")
        elif self.vocabulary.startswith(PIXELS):
            raise ValueError(f"vocabulary={self.vocabulary} is for images, but source={self.source} is text")
        elif self.shape is not None or self.levels is not None:
            raise ValueError(f"shape and levels are for images, but source={self.source} is text")
        if self.validation + self.test >= 1:
            raise ValueError(f"validation + test must be below 1, got {self.validation} + {self.test}")
        if self.rows_per_shard % self.rows_per_group:
            raise ValueError(
                f"rows_per_shard must be a multiple of rows_per_group {self.rows_per_group}, got {self.rows_per_shard}"
            )
        return self

    def _check_images(self) -> None:
        if self.vocabulary != PIXELS:
            raise ValueError(
                f"vocabulary={self.vocabulary} is for text, but source={self.source} has images: say pixels"
            )
        if self.shape is None:
            raise ValueError(f"shape must be given for source={self.source}: [height, width, channels]")
        if min(self.shape) < 1 or self.shape[2] not in (1, 3):
            raise ValueError(f"shape={list(self.shape)} must be [height, width, channels] with 1 or 3 channels")
        if self.length != math.prod(self.shape):
            raise ValueError(
                f"length={self.length} must be height * width * channels = {math.prod(self.shape)} of the shape; "
                "leave it out"
            )
        if self.levels is None or self.levels > images.native_levels(self.source):
            raise ValueError(f"levels={self.levels}: source={self.source} has {images.native_levels(self.source)}")

    @property
    def has_images(self) -> bool:
        """Is an example an image, not text?"""
        return self.source in images.KINDS

    @property
    def tokens(self) -> Vocabulary:
        """The vocabulary of the set; UserError for an unknown one."""
        return vocabulary(self.vocabulary if self.levels in (None, 256) else f"{self.vocabulary}{self.levels}")

    def recipe(self) -> images.Recipe:
        """How images become tokens."""
        assert self.shape is not None
        assert self.levels is not None
        return images.Recipe(
            self.source, self.shape, self.levels, self.fit, self.damaged, self.image_column, self.label_column
        )

    def pictures(self) -> "Pictures | None":
        """How rows become the pictures of webdataset tars; None for parquet."""
        if self.format == "parquet":
            return None
        from pipelines.tar_shards import Pictures

        assert self.shape is not None
        assert self.levels is not None
        return Pictures(self.shape, self.levels)

    def content(self) -> dict[str, Any]:
        """The configuration as far as it decides the result."""
        left_out = {"directory", *_FOR_STREAM, *(_FOR_TEXT if self.has_images else _FOR_IMAGES)}
        if self.format == "parquet":  # sets from before there was another keep their name
            left_out.add("format")
        return self.model_dump(exclude=left_out)


class MixedSet(SetConfig):
    """One of several data sets; what is not said of it is as in `data` itself."""

    name: str | None = Field(default=None, description="in the metrics; null = its number, from 0")
    weight: float = Field(default=1.0, gt=0, description="its share of the rows, relative to the other weights")


class DataConfig(SetConfig):
    """The data of a run: one set, or several that are mixed by weight."""

    order: Literal["auto", "lanes", "full"] = Field(
        default="auto",
        description="of training rows: full = any row anywhere, from a decoded copy on each machine; lanes = shuffled "
        "in windows of row groups that are read once; auto = full where the decoded rows fit cache_mb, else lanes",
    )
    cache_mb: int = Field(
        default=1024, ge=0, description="largest training split, decoded, that order=auto keeps a copy of, in MB"
    )
    mixture: tuple[MixedSet, ...] = Field(
        default=(),
        description="several sets, [{weight: 3, path: ...}, ...]; what one leaves out it takes from the settings "
        "above. The first is the one that is evaluated and sampled",
    )

    @staticmethod
    def filled_in(tree: dict[str, Any]) -> dict[str, Any]:
        """As of one set; and of a mixture, with the settings of the first set as those of the whole."""
        items = tree.get("mixture")
        if not isinstance(items, list | tuple) or not all(isinstance(item, dict) for item in items):
            return SetConfig.filled_in(tree)
        shared = {name: value for name, value in tree.items() if name not in _FOR_STREAM}
        sets = [SetConfig.filled_in(shared | item) for item in items]
        first = {name: value for name, value in (sets[0] if sets else {}).items() if name in SetConfig.model_fields}
        return SetConfig.filled_in(tree | first | {"mixture": sets})

    @model_validator(mode="after")
    def _can_be_mixed(self) -> Self:
        names = self.names()
        if len(set(names)) < len(names):
            raise ValueError(f"the sets of the mixture must have different names, got {', '.join(names)}")
        for name, item in zip(names, self.mixture, strict=False):
            for setting in ("vocabulary", "length", "shape", "levels"):
                mine, first = getattr(item, setting), getattr(self, setting)
                if mine != first:
                    raise ValueError(
                        f"sets of a mixture must have the same {setting}: {names[0]!r} has {first}, {name!r} has {mine}"
                    )
        if self.mixture:
            try:
                quotas([item.weight for item in self.mixture])
            except UserError as error:
                raise ValueError(f"mixture: {error}") from None
        return self

    def sets(self) -> list[tuple[float, "DataConfig"]]:
        """Weight and configuration of each set; of a single one the weight is 1."""
        if not self.mixture:
            return [(1.0, self)]
        extra = {"name", "weight"}
        return [(item.weight, DataConfig.model_validate(item.model_dump(exclude=extra))) for item in self.mixture]

    def names(self) -> list[str]:
        """A short name of each set."""
        return [item.name or str(number) for number, item in enumerate(self.mixture)] or ["0"]


def open_source(config: DataConfig) -> Source:
    """The source that a configuration names; UserError for one that is unknown or whose path makes no sense."""
    if config.has_images:
        return images.open_source(config.source, config.path, config.image_column, config.label_column)
    if config.source in sources.KINDS:
        return sources.open_source(config.source, config.path)
    known = (*sources.KINDS, *images.KINDS)
    nearest = difflib.get_close_matches(config.source, known, n=1, cutoff=0)[0]
    raise UserError(f"unknown data source {config.source!r}: known are {', '.join(known)}; did you mean {nearest!r}?")


def config_digest(config: DataConfig, source: Source) -> str:
    """Names what a prepared set is made from and how, wherever the source lies."""
    facts = {**config.content(), "path": None, "identity": source.identity}
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def prepared_path(config: DataConfig) -> Path | Folder:
    """The folder of the prepared set of this configuration, whether or not it exists."""
    source = open_source(config)
    name = f"{source.label}-{config.vocabulary}-{config.length}-{config_digest(config, source)[:8]}"
    return location(config.directory) / name


def check(config: DataConfig) -> None:
    """UserError if a set is neither prepared nor has a corpus to make it from. Needs no Ray, reads no text."""
    for _, one in config.sets():
        if not Folder(prepared_path(one)).exists(MANIFEST):
            open_source(one).list_units(one.part_bytes)
