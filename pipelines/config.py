"""What to prepare, and how: the configuration of a prepared set, its source and its folder."""

import difflib
import hashlib
import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from md4.errors import UserError
from pipelines import cleaning, images, named, sources
from pipelines.manifest import MANIFEST
from pipelines.quotas import quotas
from pipelines.storage import Folder, location
from pipelines.text.recipe import Recipe
from pipelines.units import Source
from pipelines.vocabularies import Trained, Vocabulary, located, vocabulary

if TYPE_CHECKING:
    from pipelines.tar_shards import Pictures

PIXELS = "pixels"  # the vocabulary of images
_FOR_TEXT = (
    "clean", "deduplicate", "max_chars", "document_chars", "packing", "long", "stride", "text_column",
)  # fmt: skip
# With their defaults they change nothing: a set's name and digest lack them.
_UNNAMED = tuple(name for name in _FOR_TEXT if name != "document_chars")
_FOR_IMAGES = ("shape", "levels", "fit", "image_column", "label_column")
_FOR_STREAM = ("order", "cache_mb", "mixture")  # settings of the order of rows, not of the rows
_IMAGE_PART_BYTES = 2**26
_SHAPES = {**images.SHAPES, **named.SHAPES}  # where data.shape need not be given


def _has_images(source: str) -> bool:
    return source in images.KINDS or source in named.SHAPES


class SetConfig(BaseModel):
    """What to prepare, and how. Everything but `directory` has a part in the result."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    source: str = Field(
        default="pydocs",
        description="where the data come from. Sets by name: text8, openwebtext, fineweb-edu, lm1b, wikitext-2, "
        "wikitext-103, and of images cifar10, imagenet32, imagenet64, mnist. Your own: text, lines, jsonl, parquet, "
        "huggingface, text-webdataset, and of images idx, cifar, npz, images (a folder), webdataset, image-parquet. At "
        "hand: pydocs (Python's own docs), digits (images that ship with scikit-learn)",
    )
    path: str | None = Field(
        default=None,
        description="where the source lies: a file or a folder, s3://bucket/prefix, or a url that is downloaded; for "
        "huggingface also org/name[:config] on the hub. Sets by name are fetched if it is null, else read there",
    )
    vocabulary: str = Field(
        default="text8",
        description="how documents become tokens: text8 (the 27 symbols a-z and space), gpt2, a tokenizer.json or the "
        "folder of one, as `md4 tokenizer train` writes it; of images pixels",
    )
    length: int = Field(
        default=256, ge=8, le=65536, description="tokens of a row; for images height * width * channels, by default"
    )
    shape: tuple[int, int, int] | None = Field(
        default=None,
        description="height, width and channels (1 = grey, 3 = RGB) of images; digits, idx, cifar and sets "
        "by name know it",
    )
    levels: int | None = Field(
        default=None, ge=2, le=256, description="brightness levels of images; by default all: 256, of digits 17"
    )
    fit: Literal["exact", "crop"] = Field(
        default="exact", description="images of another size: exact = refused, crop = cut around the centre and resized"
    )
    damaged: Literal["refuse", "skip"] = Field(
        default="refuse",
        description="records that cannot be used: refuse = stop with a message, skip = count them",
    )
    text_column: str = Field(
        default="text", min_length=1, description="the field of JSON lines, or column of a table, that holds the text"
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
    long: Literal["cut", "split", "drop"] = Field(
        default="split",
        description="of packing=document, what becomes of documents longer than a row: cut = their beginning is kept; "
        "split = several rows; drop = they are left out",
    )
    stride: int = Field(default=1, ge=1, description="of packing=windows, tokens from one training row to the next")
    clean: tuple[str, ...] = Field(
        default=(),
        description="what is done to each document, in this order: nfc, nfkc (Unicode), html (markup removed), "
        "whitespace, or package.module:function of your own, from str to str, or to None to leave the document out",
    )
    deduplicate: bool = Field(
        default=False, description="leave out documents that equal an earlier one; a held-out one is kept first"
    )
    max_chars: int | None = Field(
        default=None, ge=1, description="what a document has beyond so many characters is left out; null = no limit"
    )
    document_chars: int = Field(
        default=20_000,
        ge=100,
        description="of packing=concat: longer documents are cut at white space, in characters, and shuffled in pieces",
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
        if not isinstance(kind, str) or not _has_images(kind):
            return tree
        shape = tree.get("shape") or _SHAPES.get(kind)
        defaults: dict[str, Any] = {"vocabulary": PIXELS, "part_bytes": _IMAGE_PART_BYTES}
        if isinstance(shape, list | tuple) and len(shape) == 3 and all(isinstance(size, int) for size in shape):
            defaults["length"] = math.prod(shape)
        filled = defaults | tree
        filled["shape"] = shape
        if filled.get("levels") is None:
            filled["levels"] = images.native_levels(kind)
        return filled

    @field_validator("vocabulary")
    @classmethod
    def _located(cls, name: str) -> str:
        return located(name)

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.has_images:
            self._check_images()
        elif self.format != "parquet":
            raise ValueError(f"format={self.format} is for images, but source={self.source} is text: say parquet")
        elif self.vocabulary.startswith(PIXELS):
            raise ValueError(f"vocabulary={self.vocabulary} is for images, but source={self.source} is text")
        elif self.shape is not None or self.levels is not None:
            raise ValueError(f"shape and levels are for images, but source={self.source} is text")
        if self.stride != 1 and self.packing != "windows":
            raise ValueError(f"stride={self.stride} is for packing=windows, but packing={self.packing}")
        if self.stride > self.length:
            raise ValueError(f"stride={self.stride} must be at most the length of a row, {self.length}")
        if self.long != "split" and self.packing != "document":
            raise ValueError(f"long={self.long} is for packing=document, but packing={self.packing}")
        if self.validation + self.test >= 1:
            raise ValueError(f"validation + test must be below 1, got {self.validation} + {self.test}")
        if self.rows_per_shard % self.rows_per_group:
            raise ValueError(
                f"rows_per_shard must be a multiple of rows_per_group {self.rows_per_group}, got {self.rows_per_shard}"
            )
        return self

    def _check_images(self) -> None:
        if self.packing != "concat":
            raise ValueError(f"packing={self.packing} is for text, but source={self.source} has images")
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
        return _has_images(self.source)

    @property
    def tokens(self) -> Vocabulary:
        """The vocabulary of the set; UserError for an unknown one."""
        return vocabulary(self.vocabulary if self.levels in (None, 256) else f"{self.vocabulary}{self.levels}")

    @property
    def vocabulary_name(self) -> str:
        """Of `vocabulary`, wherever its file lies."""
        words = None if self.has_images else self.tokens
        return words.name if isinstance(words, Trained) else self.vocabulary

    @property
    def end_of_rows(self) -> int | None:
        """The token behind whose first occurrence a row is padding; None where rows hold no padding."""
        return self.tokens.end_of_text if self.packing == "document" and not self.has_images else None

    def recipe(self) -> images.Recipe:
        """How images become tokens."""
        assert self.shape is not None
        assert self.levels is not None
        return images.Recipe(
            self.source, self.shape, self.levels, self.fit, self.damaged, self.image_column, self.label_column
        )

    def text_recipe(self) -> Recipe:
        """How records become documents."""
        return Recipe(self.text_column, self.damaged)

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
        facts = self.model_dump(exclude=left_out)
        for name in _UNNAMED:
            if name in facts and facts[name] == type(self).model_fields[name].default:
                del facts[name]
        return {**facts, "vocabulary": self.vocabulary_name}


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
        if self.order == "lanes" and "windows" in [item.packing for item in self.mixture or (self,)]:
            raise ValueError("order=lanes cannot serve packing=windows, whose rows overlap: say order=full, or auto")
        if len({item.packing == "document" for item in self.mixture or (self,)}) > 1:
            raise ValueError("packing=document, whose rows are padded, mixes only with sets of that packing")
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

    def opener(kind: str, path: str | None) -> Source:
        if kind in images.KINDS:
            return images.open_source(kind, path, config.image_column, config.label_column)
        return sources.open_source(kind, path, config.text_recipe())

    kind, path = config.source, config.path
    if kind in named.SETS:
        return named.open_named(kind, path, opener)
    if kind not in (*images.KINDS, *sources.KINDS):
        known = (*named.SETS, *sources.KINDS, *images.KINDS)
        nearest = difflib.get_close_matches(kind, known, n=1, cutoff=0)[0]
        raise UserError(f"unknown data source {kind!r}: known are {', '.join(known)}; did you mean {nearest!r}?")
    if path is not None and named.is_url(path):
        return named.open_url(kind, path, opener)
    if kind == "huggingface" and (hub := named.hub_name(path)):
        return named.open_hub(hub, opener)
    return opener(kind, path)


def config_digest(config: DataConfig, source: Source) -> str:
    """Names what a prepared set is made from and how, wherever the source lies.

    A hook of the user's own counts with the file that it is in, a vocabulary with its digest.
    """
    facts = {**config.content(), "path": None, "identity": source.identity}
    if not config.has_images:
        if config.clean:
            facts["clean_sha256"] = [hook.sha256 for hook in cleaning.find(config.clean)]
        if digest := vocabulary_digest(config.tokens):
            facts["vocabulary_digest"] = digest
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def vocabulary_digest(words: Vocabulary) -> str:
    """Names what a vocabulary consists of; empty for those that their name says everything of."""
    return getattr(words, "digest", "")


def prepared_path(config: DataConfig) -> Path | Folder:
    """The folder of the prepared set of this configuration, whether or not it exists."""
    source = open_source(config)
    name = f"{source.label}-{config.vocabulary_name}-{config.length}-{config_digest(config, source)[:8]}"
    return location(config.directory) / name


def check(config: DataConfig) -> list[str]:
    """UserError if a set is neither prepared nor has a corpus to make it from. Needs no Ray, reads no text.

    What would have to be fetched first is returned, in words.
    """
    notes = []
    for _, one in config.sets():
        check_packing(one)
        if not Folder(prepared_path(one)).exists(MANIFEST):
            source = open_source(one)
            if what := source.missing():
                notes.append(f"data: {what}")
            else:
                source.list_units(one.part_bytes)
    return notes


def check_packing(config: DataConfig) -> None:
    """UserError where rows are to end with a token that the vocabulary does not have."""
    if config.packing == "document" and not config.has_images and config.tokens.end_of_text is None:
        raise UserError(
            f"data.packing=document needs a token for the end of a text, which vocabulary={config.vocabulary} lacks: "
            "gpt2 has one, and so have trained byte pairs; or say packing=concat"
        )
