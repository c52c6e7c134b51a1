"""What answers requests, as HTTP sees it: the interface, the errors, and an implementation within this process."""

from collections.abc import AsyncIterator, Container, Mapping, Sequence
from contextlib import aclosing
from typing import TYPE_CHECKING, Protocol

from pydantic import BaseModel, Field

from md4.errors import UserError
from md4.samplers import SamplingConfig
from md4.samplers.saved import Saved
from orchestration.sampling import Answer, ModelFacts, Request
from orchestration.serving.events import Event

if TYPE_CHECKING:
    from orchestration.serving.engine import Engine


class TrialInfo(ModelFacts):
    """A version that is tried, and its figures."""

    share: float = Field(description="of the requests")
    answered: int = Field(description="requests, in all replicas, as far as the one knows that was asked")
    errors: int


class ModelInfo(ModelFacts):
    """A model that is served, and how it samples if a request says nothing else."""

    name: str
    run: str
    version: str = Field(description="of the program")
    vocabulary: str
    vocab_size: int = Field(description="tokens that there are; of images levels")
    length: int = Field(description="tokens of a text unless a request says otherwise, or of an image")
    shape: tuple[int, int, int] | None = Field(None, description="height, width, channels of an image; null for text")
    classes: int = Field(0, description="classes a sample can be asked of; 0 = none")
    objective: str
    sampling: SamplingConfig = Field(description="settings of requests that name none")
    samplers: dict[str, list[str]] = Field(description="samplers of this model, and what can be set of each alone")
    saved: Saved = Field(Saved(), description="settings that were found for this model, which requests may name")
    candidate: TrialInfo | None = Field(None, description="another version, tried with a share of the requests")


class Score(BaseModel):
    """How well a model knows a text: an upper bound on -ln p, estimated. Errors are standard errors of the estimate.

    They are made of the spread of the draws; these are spread evenly over the noise levels, so that the true error is
    rather smaller.
    """

    nats: float = Field(description="of the whole text")
    nats_error: float | None = Field(description="null for a single draw, as all errors")
    bits_per_token: float
    bits_per_token_error: float | None
    bits_per_character: float | None = Field(description="null for images")
    bits_per_character_error: float | None
    tokens: int = Field(description="scored; with the end of the text if the model learned single documents")
    characters: int | None
    draws: int
    seed: int
    estimator: str
    model: ModelFacts


class Busy(UserError):
    """Too many are waiting; worth trying again after `retry_after_s` seconds (HTTP 503)."""

    def __init__(self, message: str, retry_after_s: float):
        super().__init__(message)
        self.retry_after_s = retry_after_s


class UnknownModel(UserError):
    """No model of that name is served (HTTP 404)."""


class Broken(RuntimeError):
    """The network's answer was no prediction, or it failed (HTTP 500). Says what can be told to a client."""


class Lost(RuntimeError):
    """What was to answer has ended; another try may find another (HTTP 503)."""

    retry_after_s = 1.0


def status_of(error: BaseException) -> int:
    """What HTTP answers to an error of `Models`; 500 for one that is none of them."""
    kinds: dict[type[BaseException], int] = {Busy: 503, Lost: 503, UnknownModel: 404, UserError: 422}
    return next((status for kind, status in kinds.items() if isinstance(error, kind)), 500)


def split_version(model: str, names: Container[str]) -> tuple[str, str | None]:
    """NAME@VERSION, by which one of several versions is asked for, as name and version, unless it is a name itself."""
    name, at, version = model.rpartition("@")
    return (model, None) if model in names or not at else (name, version)


class Models(Protocol):
    """What answers requests: an engine in this process, or deployments of one on a cluster.

    Whoever cancels the task that awaits an answer, or closes a stream, cancels the request: its rows leave at the next
    step. A model of None is the first, NAME@VERSION one of several versions of a model. All raise `UserError` for what
    can't be asked, `UnknownModel`, `Busy`, `Broken` and `Lost`.
    """

    async def describe(self) -> list[ModelInfo]:
        """The models that are served; the first is the default."""
        ...

    async def sample(self, model: str | None, request: Request) -> Answer: ...

    def stream(self, model: str | None, request: Request) -> AsyncIterator[Event]:
        """`Begun`, steps, `Done`. Errors raise before `Begun`; after it the last event is `Failed`."""
        ...

    async def score(
        self, model: str | None, texts: Sequence[str], draws: int, seed: int, label: int | None
    ) -> list[Score]:
        """The bound of each text; an image is written as levels with spaces between. Equal for equal text and seed."""
        ...


class Local(Models):
    """Engines in this process, by the names under which they are served."""

    def __init__(self, engines: "Mapping[str, Engine]"):
        if not engines:
            raise UserError("at least one model is needed")
        self.engines = dict(engines)

    def engine(self, model: str | None) -> "Engine":
        if model is None:
            return next(iter(self.engines.values()))
        if model not in self.engines:
            raise UnknownModel(f"model {model!r} is not served; allowed: {', '.join(self.engines)}")
        return self.engines[model]

    async def describe(self) -> list[ModelInfo]:
        return [engine.describe(name) for name, engine in self.engines.items()]

    async def sample(self, model: str | None, request: Request) -> Answer:
        return await self.engine(model).sample(request)

    async def stream(self, model: str | None, request: Request) -> AsyncIterator[Event]:
        # Closing this iterator must close the engine's at once, not when it is collected.
        async with aclosing(self.engine(model).stream(request)) as events:
            async for event in events:
                yield event

    async def score(
        self, model: str | None, texts: Sequence[str], draws: int, seed: int, label: int | None
    ) -> list[Score]:
        return await self.engine(model).score(texts, draws, seed, label)

    async def close(self, drain: bool = True) -> None:
        """End all engines; drain: after what they have accepted."""
        for engine in self.engines.values():
            await engine.close(drain)
