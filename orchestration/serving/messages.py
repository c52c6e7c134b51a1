"""What goes in and out over HTTP: the bodies of requests and answers, as the OpenAPI document describes them."""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from md4.samplers import SamplingConfig
from orchestration.sampling import SEED_LIMIT, ModelFacts, Sample
from orchestration.serving.events import Begun, Failed, Step
from orchestration.serving.models import Score, TrialInfo

Name = Annotated[str | None, Field(description="of the model, as `GET /v1/models` has it; null: the first of them")]
Seed = Annotated[
    int | None,
    Field(ge=0, lt=SEED_LIMIT, description="of the first sample, the others count up; null: a random one"),
]
Label = Annotated[int | None, Field(ge=0, description="class, for class-conditional models")]
Settings = Annotated[
    SamplingConfig | None,
    Field(description="changes to the model's own settings; null for one stands for the sampler's default"),
]
_PIXELS: dict[str, Any] = {
    "anyOf": [
        {"type": "array", "items": {"type": ["integer", "null"], "minimum": 0}},
        {"type": "array", "items": {"type": "array", "items": {}}},
        {"type": "null"},
    ]
}


class SampleWish(BaseModel):
    """What to write or draw. A setting that is left out is the model's own (`GET /v1/model`)."""

    model_config = ConfigDict(extra="forbid", strict=True)

    count: Annotated[int, Field(ge=1, description="samples wanted")] = 1
    prompt: Annotated[
        str | None,
        Field(
            description="`_` for a position to fill, `_{12}` for twelve; shorter than the canvas: the text's "
            "beginning; null: none. Images: levels with spaces between, row by row"
        ),
    ] = None
    pixels: Annotated[
        list[Any] | None,
        Field(
            description="of an image to fill: its levels, null for each that is to be filled, row by row, the channels "
            "of a pixel side by side; flat, or nested as lines, pixels and channels",
            json_schema_extra=_PIXELS,
        ),
    ] = None
    image: Annotated[
        str | None, Field(description="instead of `pixels`: a PNG of the model's size, in base64, beside its `mask`")
    ] = None
    mask: Annotated[
        str | None, Field(description="a PNG of the same size, in base64: what is white in it is filled in `image`")
    ] = None
    length: Annotated[
        int | None,
        Field(ge=1, description="tokens of a text; null: the model's own length; more than that need sampling.block"),
    ] = None
    seed: Seed = None
    label: Label = None
    order: Annotated[bool, Field(description="tell at which network call each token was revealed")] = False
    stop: Annotated[
        str | None,
        Field(
            description="one token that ends a text: nothing behind the first is sampled or returned; null: none, or "
            "<|endoftext|> of a model of single documents"
        ),
    ] = None
    sampling: Settings = None
    png: Annotated[bool, Field(description="give each image as a PNG, too")] = False


class SampleRequest(SampleWish):
    """What to write or draw. A setting that is left out is the model's own (`GET /v1/model`)."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {"prompt": "the _{8} of the", "count": 2, "seed": 1, "sampling": {"steps": 32}},
                {"count": 1, "stream": True},
            ]
        },
    )

    model: Name = None
    stream: Annotated[
        bool, Field(description="tell every network call as a server-sent event: begun, step ..., done or error")
    ] = False


class Timings(BaseModel):
    """Milliseconds."""

    queue_ms: float = Field(description="from the request's arrival until its first row was started")
    sample_ms: float = Field(description="from then until its last row was ready")
    total_ms: float = Field(description="from arrival to answer")
    first_token_ms: float | None = Field(None, description="from arrival to the first token; null where none was drawn")


class Drawn(Sample):
    """A sample; of an image, also as a picture if one was asked for."""

    png: str | None = Field(None, description="a PNG in base64")


class SampleResponse(BaseModel):
    """Samples, and how they came about."""

    samples: list[Drawn]
    model: ModelFacts
    settings: SamplingConfig = Field(description="how they were sampled, every default filled in")
    timings: Timings
    calls: int = Field(description="network calls that this request had a part in")
    draws: int = Field(description="categorical draws made for this request")
    draws_mode: str = Field(description="how tokens were drawn: exact, or a legacy form by name")
    counted: dict[str, int] = Field(description="what the sampler counted beside, for this request")


class Finished(BaseModel):
    """All samples are there: the last event."""

    type: Literal["done"] = "done"
    answer: SampleResponse


EVENTS: tuple[type[BaseModel], ...] = (Begun, Step, Finished, Failed)  # of a stream, by their `type`


class ScoreRequest(BaseModel):
    """Texts to judge; of a model of images, levels with spaces between."""

    model_config = ConfigDict(
        extra="forbid",
        strict=True,
        json_schema_extra={"examples": [{"texts": ["the cat sat on the mat"], "draws": 16}]},
    )

    model: Name = None
    texts: Annotated[list[str], Field(min_length=1)]
    draws: Annotated[int, Field(ge=1, description="noise levels at which each text is looked at")] = 16
    seed: Annotated[int, Field(ge=0, lt=SEED_LIMIT, description="of the noise; the same gives the same numbers")] = 0
    label: Label = None


class ScoreResponse(BaseModel):
    """The bound of each text."""

    scores: list[Score]


class Health(BaseModel):
    """The service answers."""

    status: Literal["ok"] = "ok"
    hash: str = Field(description="of the first model's weights")
    models: dict[str, ModelFacts] = Field(description="which weights each model has")
    candidates: dict[str, TrialInfo] = Field({}, description="versions that are tried, by model")
