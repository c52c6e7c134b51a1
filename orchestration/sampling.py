"""From a wish in words to samples in words: what `md4 sample` and the HTTP service both call."""

import secrets
from collections.abc import Sequence
from dataclasses import dataclass, field
from time import perf_counter
from typing import TYPE_CHECKING

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from md4 import samplers
from md4.errors import UserError
from md4.samplers import Job, SamplingConfig
from md4.samplers.rows import KNOWN
from md4.samplers.settings import SAMPLERS
from pipelines.vocabularies import END_OF_TEXT, HOLE, one_token

if TYPE_CHECKING:
    from orchestration.runs import Loaded

SEED_LIMIT = 2**53  # seeds below are whole numbers in every JSON reader
LENGTH_LIMIT = 2**16  # tokens of one text


@dataclass(frozen=True)
class Request:
    """Some samples of one prompt. Sample i has the seed `seed + i`: asked for alone by that seed, it is the same.

    The canvas begins with the prompt, given in words or as `tokens`, and has `length` tokens. Or, with `fill`, it is
    the prompt, that many tokens to write, and the `suffix`; if that is more than the network sees at once and the
    settings have no `block`, it is written in blocks of half of what it sees.
    """

    prompt: str | None = None  # `_` for a position to fill; shorter than the canvas: the beginning of the text
    count: int = 1
    length: int | None = None  # of the canvas, in tokens; None: the length the model was trained at
    seed: int = 0
    label: int | None = None  # class, for class-conditional models
    settings: SamplingConfig = field(default_factory=SamplingConfig)
    order: bool = False  # tell at which network call each token was revealed
    stop: str | None = None  # one token that ends a text; None: `default_stop`
    tokens: tuple[int | None, ...] | None = None  # instead of a prompt: ids, None for a position to fill
    literal: bool = False  # `_` is no hole in the prompt and the suffix
    fill: int | None = None  # tokens to write behind the prompt, instead of a length
    suffix: str | None = None  # text behind these
    echo: bool = False  # a completion begins with the prompt
    longest: int = LENGTH_LIMIT  # tokens that the canvas may have
    group: str | None = None  # requests of one get the same version of a model, if two are served; see serving.canary


class Sample(BaseModel):
    """One text, or the levels of one image with spaces between."""

    text: str = Field(description="up to the first stop token, if one was asked for and came")
    seed: int = Field(description="gives this very text again, with the same prompt, settings and model")
    calls: int = Field(description="network calls that this text needed")
    draws: int = Field(description="categorical draws made for it")
    counted: dict[str, int] = Field({}, description="what its sampler counted beside, such as rejections, by name")
    stopped: bool | None = Field(None, description="whether the stop token came; null if none was asked for")
    order: list[int] | None = Field(
        None,
        description="the text's own network call, from 0, that revealed each token, -1 where the prompt gave it; only "
        "if asked for",
    )
    prompt_tokens: int = Field(0, description="tokens of the text that were given")
    completion_tokens: int = Field(0, description="tokens of the text that were written, a stop token included")
    completion: str | None = Field(
        None, description="what was written behind the prompt, without a stop token; only of a completion"
    )


class ModelFacts(BaseModel):
    """Which weights answered."""

    hash: str = Field(description="of the weights")
    step: int = Field(description="training step")
    # Left out where they say nothing: whoever reads answers of runs meets what there was before registries.
    model_version: int | None = Field(
        default=None,
        exclude_if=lambda found: found is None,
        description="number in the registry, of what comes from there",
    )
    trial: bool = Field(
        default=False,
        exclude_if=lambda found: not found,
        description="this version is tried with a share of the requests",
    )


@dataclass(frozen=True)
class Answer:
    """The result of one request."""

    samples: list[Sample]
    settings: SamplingConfig  # resolved
    network_calls: int  # forward passes of the run that the request was part of
    seconds: float  # of that run
    model: ModelFacts
    queue_s: float = 0.0  # from the request's arrival until its first row was started
    first_token_s: float | None = None  # from its arrival until its first token; None where nothing was to sample
    echoed: int = 0  # characters of each completion that are the prompt's

    @property
    def mode(self) -> str:
        """How tokens were drawn."""
        return self.settings.mode

    @property
    def draws(self) -> int:
        """Categorical draws of all samples."""
        return sum(sample.draws for sample in self.samples)

    @property
    def counted(self) -> dict[str, int]:
        """What the sampler counted beside, over all samples."""
        return total(self.samples)


class SampleReport(BaseModel):
    """What `md4 sample` writes: the texts and everything that is needed to get them again."""

    model_config = ConfigDict(extra="forbid")

    run: str
    step: int
    weights_hash: str
    settings: SamplingConfig = Field(description="with every default filled in")
    mode: str = Field(description="how tokens were drawn: exact, or a legacy form by name")
    stop: str | None = Field(None, description="the token that ends a text")
    label: int | None = None
    network_calls: int = Field(description="forward passes for all samples together")
    draws: int = Field(description="categorical draws")
    counted: dict[str, int] = Field({}, description="what the sampler counted beside, over all samples")
    seconds: float
    samples: list[Sample]
    prompts: list[str | None] = Field(description="of each sample")

    def headline(self) -> str:
        """How the samples came about, in one line."""
        given = self.settings.model_dump(mode="json", exclude_none=True)
        if isinstance(self.settings.grid, tuple):
            given["grid"] = f"{len(self.settings.grid)} times"
        settings = " ".join(f"{name}={value}" for name, value in given.items())
        counted = "".join(f", {count:,} {name}" for name, count in self.counted.items())
        return (
            f"{settings}\ndraws {self.mode}: {self.draws:,} draws, {self.network_calls:,} network calls{counted}, "
            f"{self.seconds:.2f} s"
        )

    def text(self) -> str:
        """The samples for a reader: one block each, and how they came about."""
        blocks = []
        for sample, prompt in zip(self.samples, self.prompts, strict=True):
            given = "" if prompt is None else f", prompt {prompt!r}"
            ended = ", no stop" if sample.stopped is False else ""
            blocks.append(f"[seed {sample.seed}, {sample.calls} network calls{given}{ended}]\n{sample.text}\n")
        return "\n".join([*blocks, self.headline()])


def total(samples: Sequence[Sample]) -> dict[str, int]:
    """What samplers counted, added up by name."""
    names = dict.fromkeys(name for sample in samples for name in sample.counted)
    return {name: sum(sample.counted.get(name, 0) for sample in samples) for name in names}


def random_seed() -> int:
    """A seed for who named none, short enough to be typed again."""
    return secrets.randbelow(2**31)


def default_stop(loaded: "Loaded") -> str | None:
    """What ends a text unless something else is asked for.

    A model of single documents (`data.packing=document`) has learned nothing of what follows an end-of-text token.
    """
    return None if loaded.config.data.end_of_rows is None else END_OF_TEXT


def prepare(loaded: "Loaded", request: Request) -> Job:
    """The canvas and seeds of a request. Raises `UserError` for anything that can't be sampled.

    A model of single documents was shown, in training, how long a document is: its padding is never hidden. So it is
    here: a canvas shorter than the model's is filled up with padding, and the text has (at most) the length asked for.
    """
    model, shape = loaded.config.model, loaded.config.data.shape
    known, behind = _given(loaded, request)
    length = model.length if request.length is None else request.length
    if request.fill is not None:
        length = len(known) + request.fill + len(behind)
    longest = max(request.longest, model.length)
    if shape is not None and length != model.length:
        size = " x ".join(map(str, shape))
        raise UserError(f"length is {length}; this model makes images of {size}: {model.length} tokens")
    if not 1 <= length <= longest:
        asked = "length" if request.fill is None else "the length of prompt, completion and suffix together"
        raise UserError(f"{asked} is {length}; allowed are 1 to {longest:,} tokens")
    if len(known) > length:
        raise UserError(f"the prompt has {len(known)} tokens, the canvas only {length}")
    if request.count < 1:
        raise UserError(f"count is {request.count}; at least 1 is needed")
    if not 0 <= request.seed <= SEED_LIMIT - request.count:
        raise UserError(f"seed is {request.seed}; it must lie between 0 and {SEED_LIMIT - request.count}")
    canvas = torch.full((length,), loaded.model.mask_id)
    canvas[: len(known)] = known
    canvas[length - len(behind) :] = behind
    end = loaded.config.data.end_of_rows
    if end is not None and length < model.length:
        canvas = torch.cat([canvas, torch.full((model.length - length,), end)])
    check_label(loaded, request.label)
    stop = default_stop(loaded) if request.stop is None else request.stop
    job = Job(
        canvas=canvas.expand(request.count, -1),
        seeds=torch.arange(request.seed, request.seed + request.count),
        settings=_in_blocks(loaded, request, length),
        labels=None if request.label is None else torch.full((request.count,), request.label),
        stop=None if stop is None else _stop_token(loaded, stop),
        window=model.length,
    )
    # Whatever a batch would refuse is refused here, where no other request can be harmed by it.
    samplers.check(loaded.model, job)
    return job


def _given(loaded: "Loaded", request: Request) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids of the prompt `[n]`, the mask id for holes, and of the suffix `[m]`."""
    if request.tokens is not None and request.prompt is not None:
        raise UserError("a prompt is given in words or as tokens, not both")
    if request.suffix is not None and request.fill is None:
        raise UserError("a suffix needs to know how many tokens to write before it")
    if request.fill is not None:
        if request.length is not None:
            raise UserError("a completion has as many tokens as are to be written: it can't have a length, too")
        if request.fill < 1:
            raise UserError(f"{request.fill} tokens are to be written; at least 1 is needed")
        if loaded.config.data.shape is not None:
            raise UserError("this model makes images: there is no text to complete")
    known = torch.empty(0, dtype=torch.int64)
    if request.tokens is not None:
        mask = loaded.model.mask_id
        for place, token in enumerate(request.tokens):
            if token is not None and not 0 <= token < mask:
                raise UserError(f"token {token} at position {place} is none of this model: they are 0 to {mask - 1}")
        known = torch.tensor([mask if token is None else token for token in request.tokens], dtype=torch.int64)
    elif request.prompt == "" and request.fill is None:
        raise UserError("the prompt is empty; leave it out to sample without one")
    elif request.prompt:
        known = _ids(loaded, request.prompt, "prompt", request.literal)
    return known, _ids(loaded, request.suffix, "suffix", request.literal) if request.suffix else known[:0]


def _ids(loaded: "Loaded", text: str, what: str, literal: bool) -> torch.Tensor:
    words, text = loaded.vocabulary, proper(text, what)
    # Where there is nothing that could be a hole a prompt may be written more freely than text.
    found = words.encode(text) if literal and HOLE in text else words.encode_prompt(text)
    return torch.from_numpy(found.astype("int64"))


def _in_blocks(loaded: "Loaded", request: Request, length: int) -> SamplingConfig:
    """The settings, nothing in them a mere name; of a completion that is too long for the network, with a block."""
    settings = samplers.filled(loaded.model, request.settings)
    window, objective = loaded.config.model.length, loaded.model.objective
    if request.fill is None or length <= window or settings.block is not None:
        return settings
    name = settings.resolve(objective).sampler
    if name is None or "block" not in SAMPLERS[objective][name]:
        raise UserError(
            f"prompt, completion and suffix have {length} tokens together, the network sees {window}: the sampler "
            f"{name} can't write longer texts"
        )
    return settings.changed({"block": max(1, window // 2)})


def check_label(loaded: "Loaded", label: int | None) -> None:
    """Raises `UserError` for a label that the model doesn't know, or none where it needs one."""
    classes = loaded.config.model.classes
    if label is None and classes:
        raise UserError(f"this model is class-conditional: a label from 0 to {classes - 1} is needed")
    if label is not None and not 0 <= label < classes:
        allowed = f"allowed are 0 to {classes - 1}" if classes else "this model has no classes"
        raise UserError(f"label is {label}; {allowed}")


def _stop_token(loaded: "Loaded", stop: str) -> int:
    if loaded.config.data.shape is not None:
        raise UserError(f"stop is {stop!r}: a stop token ends a text, and this model makes images")
    try:
        return one_token(loaded.vocabulary, proper(stop, "stop"))
    except UserError as error:
        raise UserError(f"stop: {error}") from None


def proper(text: str, what: str) -> str:
    """`text`, if it can be written as UTF-8: JSON may hold halves of characters."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UserError(f"{what}: the character at position {error.start} is not proper Unicode") from None
    return text


def answer(
    loaded: "Loaded", requests: Sequence[Request], jobs: Sequence[Job], batch_size: int = 64
) -> list[Answer | UserError]:
    """Sample requests together, each with its job from `prepare`; every one gets what it would get alone.

    A request for which the network's answer was no prediction gets a `UserError` in its place; the others are unharmed.
    """
    results = samplers.run(loaded.model, jobs, batch_size)
    return [read(loaded, request, job, result) for request, job, result in zip(requests, jobs, results, strict=True)]


def facts(loaded: "Loaded") -> ModelFacts:
    """Which weights these are."""
    return ModelFacts(hash=loaded.weights_hash, step=loaded.step, model_version=loaded.model_version)


def text_end(request: Request, job: Job, tokens: Tensor, sampled: Tensor) -> tuple[int, bool]:
    """Where the text in a row's tokens `[T]` ends, and whether a stop token ends it, one that was `sampled` [T]."""
    ends = ((tokens == job.stop) & sampled).nonzero()[:1, 0].tolist() if job.stop is not None else []
    return (ends[0] + 1, True) if ends else (min(len(tokens), request.length or len(tokens)), False)


def read(loaded: "Loaded", request: Request, job: Job, result: samplers.Samples) -> Answer | UserError:
    """The tokens of a request's rows in words; an error if the network's answer to one of them was no prediction."""
    if bool(result.broken.any()):
        return UserError("the network answered with NaN or infinity: the model is damaged or its training diverged")
    length, begin, behind, echoed = request.length or job.canvas.shape[1], 0, 0, 0
    if request.fill is not None:
        begin, after = map(len, _given(loaded, request))
        behind = begin + request.fill
        length = behind + after
        if request.echo:
            begin, echoed = 0, len(loaded.vocabulary.decode(job.canvas[0, :begin].numpy()))
    found = []
    for row, (tokens, event) in enumerate(zip(result.tokens, result.event, strict=True)):
        end, stopped = text_end(request, job, tokens, event != KNOWN)
        end = min(end, length)
        found.append(
            Sample(
                text=loaded.vocabulary.decode(tokens[:end].numpy()),
                seed=request.seed + row,
                calls=int(result.calls[row]),
                draws=int(result.row_draws[row]),
                counted={name: int(count[row]) for name, count in result.counted.items()},
                stopped=None if job.stop is None else stopped,
                order=event[:end].tolist() if request.order else None,
                prompt_tokens=int((event[:length] == KNOWN).sum()),
                completion_tokens=int((event[:end] != KNOWN).sum()),
                completion=None
                if request.fill is None
                else loaded.vocabulary.decode(tokens[begin : end - 1 if stopped else behind].numpy()),
            )
        )
    return Answer(found, result.settings, result.network_calls, result.seconds, facts(loaded), echoed=echoed)


def sample(
    loaded: "Loaded",
    *,
    prompts: Sequence[str] = (),
    count: int = 1,
    length: int | None = None,
    seed: int | None = None,
    label: int | None = None,
    settings: SamplingConfig | None = None,
    stop: str | None = None,
    batch_size: int = 64,
) -> SampleReport:
    """`count` samples for each prompt, or `count` free ones without any.

    seed: of the first sample, the others count up from it; None: a random one, which the report states.
    settings: the run's own if None; stop: the token, in words, that ends a text; None: `default_stop`.

    Raises `UserError` for a request that can't be sampled, see `prepare`, or a model that answers NaN.
    """
    began = perf_counter()
    seed = random_seed() if seed is None else seed
    stop = default_stop(loaded) if stop is None else stop
    settings = loaded.config.sampling if settings is None else settings
    asked: list[str | None] = list(prompts) or [None]
    requests = [
        Request(prompt, count, length, seed + place * count, label, settings, stop=stop)
        for place, prompt in enumerate(asked)
    ]
    answers = answer(loaded, requests, [prepare(loaded, request) for request in requests], batch_size)
    sound: list[Answer] = []
    for one in answers:
        if isinstance(one, UserError):
            raise one
        sound.append(one)
    samples = [sample for one in sound for sample in one.samples]
    return SampleReport(
        run=loaded.config.name,
        step=loaded.step,
        weights_hash=loaded.weights_hash,
        settings=sound[0].settings,
        mode=sound[0].mode,
        stop=stop,
        label=label,
        network_calls=sound[0].network_calls,
        draws=sum(one.draws for one in sound),
        counted=total(samples),
        seconds=perf_counter() - began,
        samples=samples,
        prompts=[prompt for prompt, one in zip(asked, sound, strict=True) for _ in one.samples],
    )
