"""Samples of text and images, whole or as they come."""

from time import perf_counter
from typing import Any

import fastapi
from fastapi import APIRouter
from fastapi.sse import format_sse_event
from pydantic import BaseModel
from starlette.responses import Response

from md4.errors import UserError
from orchestration.sampling import Answer, Request, random_seed
from orchestration.serving import pixels
from orchestration.serving.access_log import note
from orchestration.serving.errors import refusal
from orchestration.serving.events import Done, Event, Failed
from orchestration.serving.messages import EVENTS, Drawn, Finished, SampleRequest, SampleResponse, Timings
from orchestration.serving.models import ModelInfo
from orchestration.serving.routes.answers import WORKS, Answers, event_of, or_events
from orchestration.serving.service import Service, facts_of

_ANSWERS: Answers = {
    **or_events(
        "Samples; or, with `stream`, server-sent events, each a line `event: TYPE` and a line `data: JSON`.",
        *(event_of(model, kind=model.model_fields["type"].default) for model in EVENTS),
    ),
    **WORKS,
}


def router(service: Service) -> APIRouter:
    routes = APIRouter(tags=["samples"])

    @routes.post("/v1/samples", responses=_ANSWERS, response_model=SampleResponse)
    async def samples(body: SampleRequest, request: fastapi.Request) -> Any:
        """Write texts or draw images. The same seed, prompt, settings and model give the same samples."""
        arrived = perf_counter()
        info = await service.model(body.model)
        note(request.scope, model=info.name, count=body.count)
        wanted = _wanted(body, info, service)
        if service.config.log_prompts:
            note(request.scope, prompt=body.prompt)
        await service.charge(request, body.count * (wanted.length or info.length))

        def finished(answer: Answer) -> SampleResponse:
            note(request.scope, **facts_of(answer))
            return _response(answer, info, body.png, perf_counter() - arrived)

        def encode(event: Event | Exception) -> bytes:
            if isinstance(event, Exception):
                problem = refusal(event)
                return _sent(Failed(status=problem.status, detail=problem.detail))
            if isinstance(event, Failed):
                note(request.scope, failed=event.status)
            return _sent(Finished(answer=finished(event.answer)) if isinstance(event, Done) else event)

        if body.stream:
            return await service.stream(request, service.models.stream(info.name, wanted), encode)
        answer = finished(await service.attend(request, service.models.sample(info.name, wanted)))
        # As it is: what was just made needs no second validation.
        return Response(answer.model_dump_json(), media_type="application/json")

    return routes


def _sent(event: BaseModel) -> bytes:
    return format_sse_event(data_str=event.model_dump_json(), event=getattr(event, "type", None))


def _wanted(body: SampleRequest, info: ModelInfo, service: Service) -> Request:
    """The request in the terms of `orchestration.sampling`. UserError for what goes beyond limits or together."""
    service.check_count(body.count)
    longest = max(service.config.max_length, info.length)
    if body.length is not None and body.length > longest:
        raise UserError(f"length={body.length}: at most {longest:,} tokens a text")
    given = [name for name in ("prompt", "pixels", "image") if getattr(body, name) is not None]
    if len(given) > 1:
        raise UserError(f"{' and '.join(given)}: only one of them can be given")
    if (body.image is None) != (body.mask is None):
        raise UserError("image and mask go together: an image is filled where its mask is white")
    if body.png:
        pixels.shape_of(info)
    tokens = None
    if body.pixels is not None:
        tokens = pixels.from_lists(body.pixels, info)
    elif body.image is not None and body.mask is not None:
        tokens = pixels.from_pngs(body.image, body.mask, info)
    changes = {} if body.sampling is None else body.sampling.model_dump(exclude_unset=True)
    return Request(
        prompt=body.prompt,
        count=body.count,
        length=body.length,
        seed=random_seed() if body.seed is None else body.seed,
        label=body.label,
        settings=service.settings(info, changes),
        order=body.order,
        stop=body.stop,
        tokens=tokens,
        longest=longest,
    )


def _response(answer: Answer, info: ModelInfo, png: bool, seconds: float) -> SampleResponse:
    return SampleResponse(
        samples=[
            Drawn(**sample.model_dump(), png=pixels.png_of(sample.text, info) if png else None)
            for sample in answer.samples
        ],
        model=answer.model,
        settings=answer.settings,
        timings=Timings(
            queue_ms=_ms(answer.queue_s),
            sample_ms=_ms(answer.seconds),
            total_ms=_ms(seconds),
            first_token_ms=None if answer.first_token_s is None else _ms(answer.first_token_s),
        ),
        calls=answer.network_calls,
        draws=answer.draws,
        draws_mode=answer.mode,
        counted=answer.counted,
    )


def _ms(seconds: float) -> float:
    return round(1e3 * seconds, 3)
