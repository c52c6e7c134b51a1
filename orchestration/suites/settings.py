"""A suite as a YAML file: which likelihoods, foreign data sets, samples and prompts.

Paths are as they are on the command line: of the current folder, unless they are absolute.
"""

import difflib
import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from md4.errors import UserError
from md4.samplers.wording import SETTINGS, describe, unknown
from orchestration.config import read_yaml
from pipelines.storage import Folder

OWN = Path(__file__).parent  # the suites that come with the package
Split = Literal["validation", "test", "train"]


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str | None = Field(None, pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", description="in the names of its figures")


class _Estimate(_Part):
    """How a bound is estimated."""

    rows: int | None = Field(None, ge=1, description="evenly spaced over the split; null = all")
    draws: int = Field(4, ge=1, description="Monte Carlo draws a row")
    estimator: Literal["mask_count", "continuous", "discrete"] | None = Field(
        None, description="null = the model's usual one"
    )
    timesteps: int | None = Field(None, ge=1, description="of the estimator discrete")
    seed: int = Field(0, ge=0)


class Likelihood(_Estimate):
    """The bound on a prepared set: the run's own, one of its mixture or all, or another one."""

    set: str | None = Field(None, description="of a run's mixture: a name, or all; null = its first")
    data: str | None = Field(None, description="another prepared set: a folder, or s3://...")
    split: Split = "validation"


class ZeroShotSet(_Estimate):
    """The perplexity of a data set that the model was not trained on."""

    data_set: str = Field(description="lambada, wikitext2, wikitext103, ptb, lm1b")
    data: str = Field(description="folder that its files lie below")
    protocol: Literal["md4", "mdlm"] = "md4"
    stride: int | None = Field(None, ge=1, description="new tokens of a window, of the protocol mdlm")
    separate: bool = Field(False, description="each document in windows of its own")
    tokenizer: str | None = Field(None, description="GPT-2's vocabulary: a folder, or a name on the hub")
    split: Split | None = None


class _Sampled(_Part):
    settings: dict[str, Any] = Field(default_factory=dict, description="changes to the model's own sampling settings")
    seed: int = Field(0, ge=0)

    @field_validator("settings")
    @classmethod
    def _known(cls, settings: dict[str, Any]) -> dict[str, Any]:
        for key in settings:  # what goes together is known with the model
            if key not in SETTINGS:
                raise ValueError(unknown(key, SETTINGS))
        return settings


class Quality(_Sampled):
    """What samples are worth: entropy, distinct n-grams, with a judge perplexity and MAUVE; of images FID and KID."""

    count: int = Field(64, ge=2)
    length: int | None = Field(None, ge=1, description="tokens of a sample")
    judge: str | None = Field(None, description="causal language model: a folder, or a name on the hub")
    mauve: bool = False
    features: str | None = Field(None, description="images: network for FID and KID, a file of TorchScript")
    kid_subset: int | None = Field(None, ge=2)
    references: int | None = Field(None, ge=2, description="real rows to compare with")
    data: str | None = Field(None, description="another prepared set than the run's own")
    split: Split = "validation"


class Text(BaseModel):
    """A text with holes, and what belongs there."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    text: str = Field(min_length=1, description="`_` is a position to fill")
    answer: str | None = Field(None, min_length=1, description="the whole text as it should come out")


class Prompts(_Sampled):
    """Texts that are filled with the same seeds every time."""

    texts: tuple[Text, ...] = Field(min_length=1)
    count: int = Field(4, ge=1, description="fillings of each text")
    length: int | None = Field(None, ge=1, description="tokens of the canvas; null = as many as the text has")

    @field_validator("texts", mode="before")
    @classmethod
    def _plain(cls, texts: Any) -> Any:
        return [{"text": one} if isinstance(one, str) else one for one in texts] if isinstance(texts, list) else texts

    @model_validator(mode="after")
    def _enough(self) -> "Prompts":
        if len(self.texts) * self.count < 2:
            raise ValueError("count=1 of one text is a single filling: at least 2 are needed for a standard error")
        return self


class Suite(BaseModel):
    """All that is to be measured."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    description: str = ""
    likelihood: tuple[Likelihood, ...] = ()
    zero_shot: tuple[ZeroShotSet, ...] = ()
    quality: tuple[Quality, ...] = ()
    prompts: tuple[Prompts, ...] = ()

    @model_validator(mode="after")
    def _something(self) -> "Suite":
        if not any(getattr(self, part) for part in PARTS):
            raise ValueError(f"it measures nothing: give {', '.join(PARTS[:-1])} or {PARTS[-1]}")
        for part in PARTS:
            names = [self._key(one) for one in getattr(self, part)]
            if twice := sorted({name for name in names if names.count(name) > 1}):
                raise ValueError(f"{part} has two entries for {twice[0]}: give them different names")
        return self

    @staticmethod
    def _key(one: _Part) -> str:
        """What the figures of an entry are told apart by, as far as it is known before the data are opened."""
        if isinstance(one, Likelihood):
            return " ".join(filter(None, (one.name, one.set or one.data or "the first set", one.split)))
        if isinstance(one, ZeroShotSet):
            return f"{one.name or one.data_set} {one.protocol}"
        return one.name or "no name"

    def content(self) -> dict[str, Any]:
        """What decides the figures, however it was written: without descriptions, without the places of data, which
        have fingerprints, and with a digest of their files for other places on this machine. UserError if they can't
        be read."""
        tree = self.model_dump(mode="json", exclude={"description"})
        for part, key in list(_named(tree)):
            if key != "data" and Path(part[key]).exists():
                part[key] = _files(Path(part[key]))
        for part in ("likelihood", "zero_shot", "quality"):
            for one in tree[part]:
                one.pop("data")
        return tree

    def places(self) -> list[tuple[str, str]]:
        """What it reads: the key, and the path, url or name on the hub."""
        return [(key, part[key]) for part, key in _named(self.model_dump())]

    def absolute(self) -> "Suite":
        """The same for a process with another working directory."""
        tree = self.model_dump()
        for part, key in _named(tree):
            part[key] = _absolute(part[key], maybe_hub=key in ("judge", "tokenizer"))
        return Suite.model_validate(tree)


PARTS = ("likelihood", "zero_shot", "quality", "prompts")


def _named(tree: dict[str, Any]) -> Iterator[tuple[dict[str, Any], str]]:
    for part in PARTS:
        for one in tree[part]:
            for key in ("data", "judge", "features", "tokenizer"):
                if one.get(key) is not None:
                    yield one, key


def _absolute(place: str, maybe_hub: bool) -> str:
    if maybe_hub and not Path(place).exists():
        return place  # a name on the hub
    return str(Folder(place).absolute())


def _files(place: Path) -> str:
    """Digest of a file, or of the names and the content of all files in a folder that are not hidden."""
    whole, folder = hashlib.sha256(), place.is_dir()
    try:
        names = {one.relative_to(place) for one in place.rglob("*") if one.is_file()} if folder else {Path()}
        for name in sorted(name for name in names if not any(part.startswith(".") for part in name.parts)):
            with open(place / name, "rb") as file:
                found = hashlib.file_digest(file, "sha256").hexdigest()
            whole.update(f"{name.as_posix()} {found}\n".encode())
    except OSError as error:
        raise UserError(f"{str(place)!r} can't be read: {error}") from None
    return f"sha256:{whole.hexdigest()[:16]}"


def suite_names() -> list[str]:
    """Of the suites that come with the package."""
    return sorted(path.stem for path in OWN.glob("*.yaml"))


def load(name: str | Path) -> Suite:
    """The suite in a YAML file, or one of the package by name; UserError that names every mistake in it."""
    path = OWN / f"{name}.yaml" if str(name) in suite_names() else Path(name)
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        known = f"; suites of the package: {', '.join(suite_names())}" if not path.is_file() else ""
        raise UserError(f"can't read the suite {name}: {error}{known}") from None
    tree = read_yaml(text, str(path))
    if not isinstance(tree, dict):
        raise UserError(f"{path}: a suite is a mapping of keys to values, found {type(tree).__name__}")
    try:
        return Suite.model_validate({"name": path.stem, **tree})
    except ValidationError as error:
        raise UserError("\n".join(f"{path}: {_problem(one)}" for one in error.errors())) from None


_KINDS = {"likelihood": Likelihood, "zero_shot": ZeroShotSet, "quality": Quality, "prompts": Prompts}


def _problem(problem: Any) -> str:
    """One line for one of pydantic's complaints."""
    where = problem["loc"]
    model: type[BaseModel] = Suite if len(where) < 2 else _KINDS.get(str(where[0]), Suite)
    if "texts" in where:
        model = Text
    known = list(model.model_fields)
    if problem["type"] == "extra_forbidden":
        near = difflib.get_close_matches(str(where[-1]), known, 1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        return f"unknown key {'.'.join(map(str, where))!r}; {hint}allowed: {', '.join(known)}"
    if problem["type"] == "missing":
        return f"key {'.'.join(map(str, where))!r} is missing and has no default"
    if problem["type"] == "tuple_type":
        kind = "a mapping" if isinstance(problem["input"], dict) else type(problem["input"]).__name__
        return f"{'.'.join(map(str, where))} is a list, each entry behind `- ` or all in [...]; found {kind}"
    return describe(problem, known)
