"""The bodies of the routes that speak OpenAI's protocol: what its clients send, and what they read.

What this service can't do is refused rather than passed over.
"""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from md4.samplers import SamplingConfig
from orchestration.sampling import SEED_LIMIT
from orchestration.serving.models import ModelInfo


class OpenAIError(BaseModel):
    message: str
    type: str = Field(description="invalid_request_error, rate_limit_error or server_error")
    param: str | None = Field(None, description="the field that is wrong")
    code: str | None = Field(None, description="the problem's name, for programs")


class OpenAIProblem(BaseModel):
    """Why a request was not answered."""

    error: OpenAIError


class StreamOptions(BaseModel):
    model_config = ConfigDict(extra="forbid")

    include_usage: bool = Field(False, description="end with a chunk that has the usage and no choices")
    include_obfuscation: bool = Field(False, description="has no effect")


class CompletionRequest(BaseModel):
    """Text to go on with, or with a `suffix` to fill up. A setting that is left out is the model's own."""

    model_config = ConfigDict(
        extra="forbid",
        strict=True,
        json_schema_extra={
            "examples": [{"prompt": "the meaning of ", "max_tokens": 32, "seed": 1}, {"prompt": "a ", "suffix": " z"}]
        },
    )

    model: str | None = Field(None, description="as `GET /v1/models` has it; null: the first of them")
    prompt: str | list[str] | list[int] | list[list[int]] | None = Field(
        None, description="text as it is (`_` is an underscore), or ids of tokens; or several of these; null: no text"
    )
    suffix: str | None = Field(None, description="text behind what is to be written")
    max_tokens: Annotated[int, Field(ge=1)] | None = Field(None, description="tokens to write; null: 16")
    n: Annotated[int, Field(ge=1)] | None = Field(None, description="completions of each prompt; null: 1")
    seed: Annotated[int, Field(ge=0, lt=SEED_LIMIT)] | None = Field(
        None, description="of the first completion, the others count up; null: a random one"
    )
    temperature: Annotated[float, Field(ge=0, le=100, allow_inf_nan=False)] | None = Field(
        None, description="0: always the most probable token; null: the model's own setting, as for top_p"
    )
    top_p: Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)] | None = None
    stop: str | list[str] | None = Field(None, description="up to four strings; what is written ends before the first")
    echo: bool | None = Field(None, description="begin each text with its prompt")
    stream: bool | None = Field(None, description="send text as soon as it is certain, from left to right")
    stream_options: StreamOptions | None = None
    user: str | None = Field(None, description="has no effect")
    logprobs: int | None = Field(None, description="can't be had: null")
    best_of: int | None = Field(None, description="can't be had: null, or n")
    presence_penalty: float | None = Field(None, description="can't be had: null or 0")
    frequency_penalty: float | None = Field(None, description="can't be had: null or 0")
    logit_bias: dict[str, float] | None = Field(None, description="can't be had: null or empty")
    sampling: SamplingConfig | None = Field(None, description="the sampler's further settings (not OpenAI's)")
    label: Annotated[int, Field(ge=0)] | None = Field(
        None, description="class, for class-conditional models (likewise)"
    )


class Choice(BaseModel):
    text: str
    index: int
    logprobs: None = None
    finish_reason: Literal["stop", "length"] | None = Field(
        description="length: all tokens were written; stop: the text ended before; null: more is to come"
    )


class Usage(BaseModel):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class Completion(BaseModel):
    """Completions, those of the first prompt first; or, in a stream, what is new of them."""

    id: str
    object: Literal["text_completion"] = "text_completion"
    created: int = Field(description="seconds since 1970")
    model: str
    system_fingerprint: str = Field(description="of the weights")
    choices: list[Choice]
    usage: Usage | None = None


class ImageRequest(BaseModel):
    """Images of a class, or of none in particular."""

    model_config = ConfigDict(
        extra="forbid", strict=True, json_schema_extra={"examples": [{"prompt": "", "n": 2, "seed": 1}]}
    )

    prompt: str = Field("", description="number of a class; empty: none")
    model: str | None = Field(None, description="as `GET /v1/models` has it; null: the first that makes images")
    n: Annotated[int, Field(ge=1)] | None = Field(None, description="images; null: 1")
    size: str | None = Field(None, description="auto, or the model's own as WIDTHxHEIGHT")
    response_format: Literal["b64_json"] | None = None
    output_format: Literal["png"] | None = None
    stream: Literal[False] | None = None
    quality: Literal["auto", "standard"] | None = Field(None, description="has no effect, as the next three")
    moderation: Literal["auto", "low"] | None = None
    user: str | None = None
    safety_identifier: str | None = None
    seed: Annotated[int, Field(ge=0, lt=SEED_LIMIT)] | None = Field(
        None, description="of the first image, the others count up (not OpenAI's, as sampling)"
    )
    sampling: SamplingConfig | None = None


class Picture(BaseModel):
    b64_json: str = Field(description="a PNG")
    seed: int = Field(description="gives this very image again")


class ImageResponse(BaseModel):
    created: int = Field(description="seconds since 1970")
    data: list[Picture]
    size: str
    output_format: Literal["png"] = "png"


class Model(BaseModel):
    """A model that is served. Beside what OpenAI's clients read: what it is, and its settings."""

    id: str
    object: Literal["model"] = "model"
    created: int = Field(description="when the service began, in seconds since 1970")
    owned_by: Literal["md4"] = "md4"
    info: ModelInfo


class ModelList(BaseModel):
    object: Literal["list"] = "list"
    data: list[Model]


# What a request may hold of what can't be had. Anything else is refused by name.
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "logprobs": (None,),
    "presence_penalty": (None, 0),
    "frequency_penalty": (None, 0),
    "logit_bias": (None, {}),
}
