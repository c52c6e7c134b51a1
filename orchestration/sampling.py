"""From a wish in words to samples in words: what `md4 sample` and the HTTP service both call."""

import secrets
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from time import perf_counter
from typing import TYPE_CHECKING, Any

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from md4 import samplers
from md4.errors import UserError
from md4.samplers import Job, SamplingConfig

if TYPE_CHECKING:
    from orchestration.runs import Loaded

SEED_LIMIT = 2**53  # seeds below are whole numbers in every JSON reader


@dataclass(frozen=True)
class Request:
    """Some samples of one prompt. Sample i has the seed `seed + i`: asked for alone by that seed, it is the same."""

    prompt: str | None = None  # `_` for a position to fill; shorter than the canvas: the beginning of the text
    count: int = 1
    length: int | None = None  # of the canvas, in tokens; None: the length the model was trained at
    seed: int = 0
    label: int | None = None  # class, for class-conditional models
    settings: SamplingConfig = field(default_factory=SamplingConfig)
    order: bool = False  # tell at which step each token was revealed


class Sample(BaseModel):
    """One text."""

    text: str
    seed: int = Field(description="gives this very text again, with the same prompt, settings and model")
    calls: int = Field(description="network calls that this text needed")
    order: list[int] | None = Field(
        None, description="step at which each token was revealed, -1 where the prompt gave it; only if asked for"
    )


@dataclass(frozen=True)
class Answer:
    """The result of one request."""

    samples: list[Sample]
    mode: str  # how tokens were drawn
    draws: int  # categorical draws
    network_calls: int  # forward passes of the run that the request was part of
    seconds: float  # of that run


class SampleReport(BaseModel):
    """What `md4 sample` writes: the texts and everything that is needed to get them again."""

    model_config = ConfigDict(extra="forbid")

    run: str
    step: int
    weights_hash: str
    settings: SamplingConfig
    mode: str
    network_calls: int
    draws: int
    seconds: float
    samples: list[Sample]
    prompts: list[str | None] = Field(description="of each sample")

    def text(self) -> str:
        """The samples for a reader: one block each."""
        blocks = []
        for sample, prompt in zip(self.samples, self.prompts, strict=True):
            given = "" if prompt is None else f", prompt {prompt!r}"
            blocks.append(f"[seed {sample.seed}, {sample.calls} network calls{given}]\n{sample.text}\n")
        return "\n".join(blocks)


def random_seed() -> int:
    """A seed for who named none, short enough to be typed again."""
    return secrets.randbelow(2**31)


def override(base: SamplingConfig, changes: Mapping[str, Any]) -> SamplingConfig:
    """`base` with some settings changed; those that are None stay.

    Raises `UserError` that names the setting, its value and what is allowed.
    """
    given = {name: value for name, value in changes.items() if value is not None}
    try:
        return base.changed(given)
    except ValidationError as error:
        raise UserError("; ".join(describe(problem) for problem in error.errors())) from None


def describe(problem: Any) -> str:
    """One line for one of pydantic's complaints."""
    message = problem["msg"].removeprefix("Value error, ")
    if problem["type"] == "json_invalid":
        return f"not valid JSON: {problem['ctx']['error']} at character {problem['loc'][-1]}"
    name = ".".join(str(part) for part in problem["loc"])
    if not name:
        return message
    value = repr(problem["input"])
    shown = "" if problem["type"] in ("missing", "extra_forbidden") else f"={value[:80]}{'...' * (len(value) > 80)}"
    return f"{name}{shown}: {message[0].lower()}{message[1:]}"


def prepare(loaded: "Loaded", request: Request) -> Job:
    """The canvas and seeds of a request. Raises `UserError` for anything that can't be sampled."""
    window = loaded.config.model.length
    length = window if request.length is None else request.length
    if not 1 <= length <= window:
        raise UserError(f"length is {length}; this model writes 1 to {window} tokens")
    shape = loaded.config.data.shape
    if shape is not None and length != window:
        size = " x ".join(map(str, shape))
        raise UserError(f"length is {length}; this model makes images of {size}: {window} tokens")
    if request.count < 1:
        raise UserError(f"count is {request.count}; at least 1 is needed")
    if not 0 <= request.seed <= SEED_LIMIT - request.count:
        raise UserError(f"seed is {request.seed}; it must lie between 0 and {SEED_LIMIT - request.count}")
    canvas = torch.full((length,), loaded.model.mask_id)
    if request.prompt is not None:
        if not request.prompt:
            raise UserError("the prompt is empty; leave it out to sample without one")
        known = torch.from_numpy(loaded.vocabulary.encode_prompt(request.prompt))
        if len(known) > length:
            raise UserError(f"the prompt has {len(known)} tokens, the canvas only {length}")
        canvas[: len(known)] = known
    classes = loaded.config.model.classes
    if request.label is None and classes:
        raise UserError(f"this model is class-conditional: a label from 0 to {classes - 1} is needed")
    if request.label is not None and not 0 <= request.label < classes:
        allowed = f"allowed are 0 to {classes - 1}" if classes else "this model has no classes"
        raise UserError(f"label is {request.label}; {allowed}")
    return Job(
        canvas=canvas.expand(request.count, -1),
        seeds=torch.arange(request.seed, request.seed + request.count),
        settings=request.settings,
        labels=None if request.label is None else torch.full((request.count,), request.label),
    )


def answer(
    loaded: "Loaded", requests: Sequence[Request], jobs: Sequence[Job], batch_size: int = 64
) -> list[Answer | UserError]:
    """Sample requests together, each with its job from `prepare`; every one gets what it would get alone.

    A request for which the network's answer was no prediction gets a `UserError` in its place; the others are unharmed.
    """
    lengths: dict[int, list[int]] = defaultdict(list)
    for index, job in enumerate(jobs):
        lengths[job.canvas.shape[1]].append(index)
    answers: dict[int, Answer | UserError] = {}
    for indices in lengths.values():
        results = samplers.run(loaded.model, [jobs[i] for i in indices], batch_size)
        for index, result in zip(indices, results, strict=True):
            answers[index] = _read(loaded, requests[index], result)
    return [answers[index] for index in range(len(jobs))]


def _read(loaded: "Loaded", request: Request, result: samplers.Samples) -> Answer | UserError:
    if bool(result.broken.any()):
        return UserError("the network answered with NaN or infinity: the model is damaged or its training diverged")
    samples = [
        Sample(
            text=loaded.vocabulary.decode(tokens.numpy()),
            seed=request.seed + index,
            calls=int(calls),
            order=event.tolist() if request.order else None,
        )
        for index, (tokens, calls, event) in enumerate(zip(result.tokens, result.calls, result.event, strict=True))
    ]
    return Answer(samples, result.mode, result.draws, result.network_calls, result.seconds)


def sample(
    loaded: "Loaded",
    *,
    prompts: Sequence[str] = (),
    count: int = 1,
    length: int | None = None,
    seed: int | None = None,
    label: int | None = None,
    settings: SamplingConfig | None = None,
    batch_size: int = 64,
) -> SampleReport:
    """`count` samples for each prompt, or `count` free ones without any.

    seed: of the first sample, the others count up from it; None: a random one, which the report states.
    settings: the run's own if None.

    Raises `UserError` for a prompt, length, count or seed that can't be sampled, or a model that answers NaN.
    """
    began = perf_counter()
    seed = random_seed() if seed is None else seed
    settings = loaded.config.sampling if settings is None else settings
    asked: list[str | None] = list(prompts) or [None]
    requests = [
        Request(prompt, count, length, seed + place * count, label, settings) for place, prompt in enumerate(asked)
    ]
    answers = answer(loaded, requests, [prepare(loaded, request) for request in requests], batch_size)
    sound: list[Answer] = []
    for one in answers:
        if isinstance(one, UserError):
            raise one
        sound.append(one)
    return SampleReport(
        run=loaded.config.name,
        step=loaded.step,
        weights_hash=loaded.weights_hash,
        settings=settings,
        mode=settings.mode,
        network_calls=max(one.network_calls for one in sound),
        draws=sum(one.draws for one in sound),
        seconds=perf_counter() - began,
        samples=[sample for one in sound for sample in one.samples],
        prompts=[prompt for prompt, one in zip(asked, sound, strict=True) for _ in one.samples],
    )
