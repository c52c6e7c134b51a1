"""What a card says, as data. A field that is None is not known, and the card says so."""

from typing import Any

from pydantic import BaseModel, ConfigDict, Field

NOT_STATED = "not stated"


class _Facts(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Licences(_Facts):
    """Under which terms; names of licences, best as SPDX has them."""

    weights: str | None = None
    data: str | None = None


class ModelFacts(_Facts):
    """What the model is."""

    kind: str = Field(description="text or images")
    objective: str
    schedule: str
    network: dict[str, Any]
    parameters: int
    vocabulary: str | None
    vocabulary_size: int
    length: int = Field(description="tokens of an example")
    shape: tuple[int, int, int] | None = None
    classes: int = 0
    sampling: dict[str, Any] = Field(description="how it is sampled unless told otherwise")


class SplitFacts(_Facts):
    name: str
    documents: int
    tokens: int
    rows: int


class DataFacts(_Facts):
    """A prepared set. splits: None if it is not at hand."""

    name: str
    about: str = Field(description="what the source is called, where it lies")
    fingerprint: str | None
    packing: str | None = None
    weight: float | None = Field(None, description="share of a mixture")
    splits: tuple[SplitFacts, ...] | None = None
    yardsticks: dict[str, float] = Field(
        default_factory=dict, description="entropies of the set itself, bits per token, by name"
    )


class TrainingFacts(_Facts):
    """How it was trained."""

    steps: int
    batch_size: int
    tokens: int = Field(description="that went through training: steps x batch x tokens of a row")
    epochs: float | None
    optimizer: dict[str, Any]
    seed: int
    workers: int | None
    precision: str | None
    averaged: bool = Field(description="whether the weights are the moving average")
    seconds: float | None = Field(description="from start to end, pauses between attempts aside")
    productive: float | None = Field(description="share of these in steps that were not lost")
    tokens_per_second: float | None = Field(description="median of what was logged")
    operations: float | None = Field(description="floating-point operations of all logged steps")
    restarts: int | None
    skipped_steps: int | None
    code_version: str | None
    ended: str | None = Field(description="time of the checkpoint")


class FigureFact(_Facts):
    """A figure of a report, on these weights."""

    metric: str
    value: float
    standard_error: float | None
    unit: str
    data: str = Field(description="data set and split")
    how: str = Field(description="how it was measured")
    source: str = Field(description="file of the report")


class SampleFact(_Facts):
    text: str
    prompt: str | None
    seed: int
    how: str = Field(description="settings, in words")


class PictureFact(_Facts):
    name: str = Field(pattern=r"^[a-z0-9-]+$")
    title: str
    png: bytes


class CardFacts(_Facts):
    """Everything on the card."""

    name: str
    about: str | None = None
    model: ModelFacts
    data: tuple[DataFacts, ...] | None = None
    training: TrainingFacts | None = None
    figures: tuple[FigureFact, ...] = ()
    findings: tuple[str, ...] = Field((), description="what reports found that is no single figure, in a sentence each")
    samples: tuple[SampleFact, ...] = ()
    pictures: tuple[PictureFact, ...] = ()
    kept: tuple[str, ...] = Field((), description="sampling settings that are kept with the model, in words")
    limits: tuple[str, ...] = ()
    unmeasured: tuple[str, ...] = Field((), description="what no report is about")
    licences: Licences = Licences()
    lineage: dict[str, Any] = {}
