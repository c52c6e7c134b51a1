"""Text completion and infilling as OpenAI's clients ask for it."""

import asyncio
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any, Literal

import fastapi
from fastapi import APIRouter
from fastapi.sse import format_sse_event
from starlette.responses import Response

from md4.samplers import SamplingConfig
from md4.samplers.registry import sampler_class
from md4.samplers.settings import Objective
from orchestration.sampling import SEED_LIMIT, Answer, Request, Sample, random_seed
from orchestration.serving.access_log import note, request_id
from orchestration.serving.errors import Refused, refusal
from orchestration.serving.events import Begun, Done, Event, Failed, Step
from orchestration.serving.models import ModelInfo
from orchestration.serving.openai_messages import NEUTRAL, Choice, Completion, CompletionRequest, OpenAIProblem, Usage
from orchestration.serving.prefix import Prefix, cut
from orchestration.serving.routes.answers import OPENAI_WORKS, Answers, event_of, or_events
from orchestration.serving.sample_requests import settings_of
from orchestration.serving.service import Service, facts_of, tell_version

_STOPS = 4  # strings that a request may name
_MAX_TOKENS = 16  # OpenAI's default
_DONE = b"data: [DONE]\n\n"

_ANSWERS: Answers = {
    **or_events(
        "Completions; or, with `stream`, server-sent events, each a line `data: JSON`, the last of them "
        "`data: [DONE]`, or an error.",
        event_of(Completion, OpenAIProblem),
        {"type": "object", "required": ["data"], "properties": {"data": {"const": "[DONE]"}}},
    ),
    **OPENAI_WORKS,
}


def router(service: Service) -> APIRouter:
    routes = APIRouter(tags=["OpenAI"])

    @routes.post("/v1/completions", responses=_ANSWERS, response_model=Completion)
    async def completions(body: CompletionRequest, request: fastapi.Request) -> Any:
        """Go on with a text, or with `suffix` write what lies between.

        The network looks at prompt, completion and suffix together. If these are more tokens than it sees at once, and
        `sampling.block` is not given, they are written from left to right in blocks of half of that, and what lies
        farther away is not seen.
        """
        info = await service.model(body.model)
        wishes = _wishes(body, info, service)
        note(request.scope, model=info.name, count=len(wishes) * wishes[0].count)
        if service.config.log_prompts:
            note(request.scope, prompt=body.prompt, suffix=body.suffix)
        await service.charge(request, sum(wish.count * (wish.fill or 0) for wish in wishes))
        head = _Head(f"cmpl-{request_id(request.scope)}", int(time.time()), info, body, wishes)
        if body.stream:
            chunks = _Chunks(head, request)
            merged = _merged([service.models.stream(info.name, wish) for wish in wishes])
            return await service.stream(request, chunks.all(merged), chunks.encode)
        work = _together([service.models.sample(info.name, wish) for wish in wishes])
        answers = await service.attend(request, work)
        note(request.scope, **_facts(answers))
        tell_version(request, answers[0].model)
        choices = []
        for place, answer in enumerate(answers):
            for index, sample in enumerate(answer.samples):
                text, stopped = cut(sample.completion or "", head.stops, answer.echoed)
                choices.append(
                    Choice(text=text, index=head.index(place, index), finish_reason=_reason(sample, stopped))
                )
        found = head.completion(answers[0].model.hash, choices, _usage(answers))
        return Response(found.model_dump_json(), media_type="application/json")

    return routes


@dataclass(frozen=True)
class _Head:
    """What all of an answer, or all chunks of a stream, have in common."""

    name: str
    created: int
    info: ModelInfo
    body: CompletionRequest
    wishes: Sequence[Request]  # one for each prompt

    @property
    def stops(self) -> list[str]:
        return _stops(self.body)

    def index(self, place: int, sample: int) -> int:
        """Of a choice: those of the first prompt come first."""
        return place * self.wishes[0].count + sample

    def completion(self, weights: str, choices: list[Choice], usage: Usage | None) -> Completion:
        return Completion(
            id=self.name,
            created=self.created,
            model=self.info.name,
            system_fingerprint=f"fp_{weights[:12]}",
            choices=choices,
            usage=usage,
        )


class _Chunks:
    """Turns the events of all prompts into chunks of text."""

    def __init__(self, head: _Head, request: fastapi.Request) -> None:
        self.head, self.request = head, request
        self.prefixes: dict[tuple[int, int], Prefix] = {}
        self.answers: dict[int, Answer] = {}
        self.weights = ""

    async def all(self, events: AsyncIterator[tuple[int, Event]]) -> AsyncIterator[Completion | bytes | Refused]:
        """Chunks, and `_DONE`; or a refusal as the last of them."""
        async with aclosing(events):  # type: ignore[type-var]
            async for place, event in events:
                if isinstance(event, Failed):
                    note(self.request.scope, failed=event.status)
                    yield Refused(event.status, event.detail)
                    return
                for chunk in self._chunks(place, event):
                    yield chunk
        note(self.request.scope, **_facts(list(self.answers.values())))
        options = self.head.body.stream_options
        if options is not None and options.include_usage:
            answers = [self.answers[place] for place in range(len(self.head.wishes))]
            yield self.head.completion(self.weights, [], _usage(answers))
        yield _DONE

    def encode(self, found: Completion | bytes | Exception) -> bytes:
        if isinstance(found, bytes):
            return found
        if isinstance(found, Exception):
            # The client raises for an object `error` in a stream.
            return format_sse_event(data_str=bytes(refusal(found).response(self.request.scope).body).decode())
        return format_sse_event(data_str=found.model_dump_json())

    def _chunks(self, place: int, event: Event) -> list[Completion]:
        if isinstance(event, Begun):
            self.weights = event.model.hash
            for index, sample in enumerate(event.samples):
                self.prefixes[place, index] = self._prefix(place, sample.canvas)
            new = {index: self.prefixes[place, index].grown() for index in range(len(event.samples))}
            # An empty text for each, so that the client knows at once that work has begun.
            return [self._chunk(place, index, text, None) for index, text in new.items()]
        if isinstance(event, Step):
            text = self.prefixes[place, event.sample].show(event)
            return [self._chunk(place, event.sample, text, None)] if text else []
        assert isinstance(event, Done)
        self.answers[place] = event.answer
        chunks = []
        for index, sample in enumerate(event.answer.samples):
            text, stopped = self.prefixes[place, index].rest(sample.completion or "", event.answer.echoed)
            chunks.append(self._chunk(place, index, text, _reason(sample, stopped)))
        return chunks

    def _prefix(self, place: int, canvas: Sequence[Any]) -> Prefix:
        wish = self.head.wishes[place]
        assert wish.fill is not None
        first = next(position for position, piece in enumerate(canvas) if piece is None)
        revises = _revises(wish.settings, self.head.info)
        return Prefix(canvas, first, first + wish.fill, self.head.stops, echo=wish.echo, revises=revises)

    def _chunk(self, place: int, index: int, text: str, reason: Literal["stop", "length"] | None) -> Completion:
        choice = Choice(text=text, index=self.head.index(place, index), finish_reason=reason)
        return self.head.completion(self.weights, [choice], None)


def _wishes(body: CompletionRequest, info: ModelInfo, service: Service) -> list[Request]:
    """One request for each prompt, in the terms of `orchestration.sampling`. Raises `UserError`, Refused."""
    if info.shape is not None:
        raise Refused(422, f"model {info.name!r} makes images: ask /v1/images/generations", param="model")
    _refuse_what_cannot_be_had(body)
    fill, count = body.max_tokens or _MAX_TOKENS, body.n or 1
    longest = max(service.config.max_length, info.length)
    if fill > longest:
        raise Refused(422, f"max_tokens={fill}: at most {longest:,}", param="max_tokens")
    prompts = _prompts(body.prompt)
    if len(prompts) * count > service.config.max_count:
        asked = f"{len(prompts)} prompts with n={count}"
        raise Refused(422, f"{asked}: at most {service.config.max_count} completions a request", param="n")
    seed = random_seed() if body.seed is None else body.seed
    if seed + len(prompts) * count > SEED_LIMIT:
        raise Refused(422, f"seed={seed}: too large for {len(prompts) * count} completions", param="seed")
    settings = settings_of(info, _changes(body), service.config)
    group = None if len(prompts) == 1 else repr((seed, prompts, body.suffix, body.label))  # one version for all
    return [
        Request(
            prompt=prompt if isinstance(prompt, str) else None,
            tokens=None if isinstance(prompt, str) else tuple(prompt),
            count=count,
            seed=seed + place * count,
            label=body.label,
            settings=settings,
            literal=True,
            fill=fill,
            suffix=body.suffix,
            echo=bool(body.echo),
            longest=longest,
            group=group,
        )
        for place, prompt in enumerate(prompts)
    ]


def _refuse_what_cannot_be_had(body: CompletionRequest) -> None:
    for name, allowed in NEUTRAL.items():
        value = getattr(body, name)
        if value not in allowed:
            raise Refused(422, f"{name} can't be had of this service: leave it out", param=name)
    if body.best_of not in (None, body.n or 1):
        raise Refused(422, f"best_of={body.best_of} can't be had of this service: leave it out", param="best_of")
    stops = _stops(body)
    if len(stops) > _STOPS or not all(stops):
        raise Refused(422, f"stop: wanted are up to {_STOPS} strings, none of them empty", param="stop")
    if body.stream_options is not None and not body.stream:
        raise Refused(422, "stream_options need stream=true", param="stream_options")


def _stops(body: CompletionRequest) -> list[str]:
    return [body.stop] if isinstance(body.stop, str) else list(body.stop or ())


def _prompts(prompt: str | list[Any] | None) -> list[str | list[int]]:
    """All prompts; ids of tokens where it is no text."""
    if prompt is None or isinstance(prompt, str):
        return [prompt or ""]
    if not prompt:
        raise Refused(422, "prompt: the list is empty", param="prompt")
    if isinstance(prompt[0], int):
        return [prompt]
    if not all(prompt) and not isinstance(prompt[0], str):
        raise Refused(422, "prompt: a list of tokens is empty", param="prompt")
    return prompt


def _changes(body: CompletionRequest) -> dict[str, Any]:
    """Changes to the model's settings: those of `sampling`, and OpenAI's own."""
    changes = {} if body.sampling is None else body.sampling.model_dump(exclude_unset=True)
    for name in ("temperature", "top_p"):
        value = getattr(body, name)
        if value is None:
            continue
        if name in changes:
            raise Refused(422, f"{name} is given twice, by itself and in 'sampling'", param=name)
        # 0 is OpenAI's word for the most probable token.
        changes |= {name: value} if value else {name: 1.0, "top_k": 1}
    return changes


def _revises(settings: SamplingConfig, info: ModelInfo) -> bool:
    """May the sampler take back what it revealed?"""
    objective: Objective = "genmd4" if info.objective == "genmd4" else "md4"
    return sampler_class(objective, info.saved.fill(settings, objective).resolve(objective)).revises


def _reason(sample: Sample, stopped: bool) -> Literal["stop", "length"]:
    return "stop" if stopped or sample.stopped else "length"


def _usage(answers: Sequence[Answer]) -> Usage:
    """Of several completions of a prompt the prompt counts once, as OpenAI counts."""
    given = sum(answer.samples[0].prompt_tokens for answer in answers)
    written = sum(sample.completion_tokens for answer in answers for sample in answer.samples)
    return Usage(prompt_tokens=given, completion_tokens=written, total_tokens=given + written)


def _facts(answers: Sequence[Answer]) -> dict[str, float | int]:
    """What the log tells of the answers to all prompts."""
    found = [facts_of(answer) for answer in answers]
    facts = {name: sum(one[name] for one in found) for name in ("calls", "tokens", "count")}
    return {**facts, "queue_s": max((one["queue_s"] for one in found), default=0.0)}


async def _together(works: Sequence[Any]) -> list[Answer]:
    """All answers; the first error cancels the others."""
    try:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(work) for work in works]
    except ExceptionGroup as errors:
        raise errors.exceptions[0] from None
    return [task.result() for task in tasks]


async def _merged(streams: Sequence[AsyncIterator[Event]]) -> AsyncIterator[tuple[int, Event]]:
    """Events of several streams as they come, each with its stream's number. An error of one ends all."""
    queue: asyncio.Queue[tuple[int, Event | BaseException | None]] = asyncio.Queue(maxsize=len(streams))

    async def pump(place: int, events: AsyncIterator[Event]) -> None:
        end = None
        try:
            async with aclosing(events):  # type: ignore[type-var]
                async for event in events:
                    await queue.put((place, event))
        except Exception as error:
            end = error
        await queue.put((place, end))

    tasks = [asyncio.create_task(pump(place, events)) for place, events in enumerate(streams)]
    try:
        running = len(streams)
        while running:
            place, found = await queue.get()
            if isinstance(found, BaseException):
                raise found
            if found is None:
                running -= 1
            else:
                yield place, found
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
