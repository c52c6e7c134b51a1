"""What goes in and out over HTTP: the bodies of requests and answers, as the OpenAPI document describes them."""

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

from md4.samplers import SamplingConfig
from orchestration.sampling import SEED_LIMIT, ModelFacts, Sample


class SampleRequest(BaseModel):
    """What to write. A setting that is left out is the run's own (`GET /v1/model`)."""

    model_config = ConfigDict(extra="forbid", strict=True)

    count: Annotated[int, Field(ge=1, description="samples wanted")] = 1
    prompt: Annotated[
        str | None,
        Field(
            description="`_` for a position to fill, `_{12}` for twelve; shorter than the canvas: the text's "
            "beginning; null: none. Images: levels with spaces between, row by row"
        ),
    ] = None
    length: Annotated[
        int | None,
        Field(ge=1, description="tokens of a text; null: the model's own length; more than that need sampling.block"),
    ] = None
    seed: Annotated[
        int | None,
        Field(ge=0, lt=SEED_LIMIT, description="of the first sample, the others count up; null: a random one"),
    ] = None
    label: Annotated[int | None, Field(ge=0, description="class, for class-conditional models")] = None
    order: Annotated[bool, Field(description="tell at which network call each token was revealed")] = False
    stop: Annotated[
        str | None,
        Field(
            description="one token that ends a text: nothing behind the first is sampled or returned; null: none, or "
            "<|endoftext|> of a model of single documents"
        ),
    ] = None
    sampling: Annotated[
        SamplingConfig | None,
        Field(description="changes to the service's own settings; null for one stands for the sampler's default"),
    ] = None


class Timings(BaseModel):
    """Milliseconds."""

    queue_ms: float = Field(description="from the request's arrival at the replica until its batch started")
    sample_ms: float = Field(description="of the batch that the request was part of")
    total_ms: float = Field(description="from arrival to answer")


class SampleResponse(BaseModel):
    """Samples, and how they came about."""

    samples: list[Sample]
    model: ModelFacts
    settings: SamplingConfig = Field(description="how they were sampled, every default filled in")
    timings: Timings
    calls: int = Field(description="network calls of the batch that the request was part of")
    draws: int = Field(description="categorical draws made for this request")
    draws_mode: str = Field(description="how tokens were drawn: exact, or a legacy form by name")
    counted: dict[str, int] = Field(description="what the sampler counted beside, for this request")
    batch_requests: int = Field(description="requests in the batch, this one included")


class ModelInfo(ModelFacts):
    """What is served, and with which settings if a request names none."""

    run: str
    vocabulary: str
    length: int
    sampling: SamplingConfig
    version: str = Field(description="of the program")


class Health(BaseModel):
    status: str
    hash: str


class Problem(BaseModel):
    """Why a request was not answered."""

    detail: str
