"""Samples of text and images, whole or as they come."""

from time import perf_counter
from typing import Any

import fastapi
from fastapi import APIRouter
from fastapi.sse import format_sse_event
from pydantic import BaseModel
from starlette.responses import Response

from orchestration.sampling import Answer
from orchestration.serving.access_log import note
from orchestration.serving.errors import refusal
from orchestration.serving.events import Done, Event, Failed
from orchestration.serving.messages import EVENTS, Finished, SampleRequest, SampleResponse, Timings
from orchestration.serving.models import ModelInfo
from orchestration.serving.routes.answers import WORKS, Answers, event_of, or_events
from orchestration.serving.sample_requests import drawn, request_of
from orchestration.serving.service import Service, facts_of, tell_version

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
        wanted = request_of(body, info, service.config)
        if service.config.log_prompts:
            note(request.scope, prompt=body.prompt)
        await service.charge(request, body.count * (wanted.length or info.length))

        def finished(answer: Answer) -> SampleResponse:
            note(request.scope, **facts_of(answer))
            tell_version(request, answer.model)
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


def _response(answer: Answer, info: ModelInfo, png: bool, seconds: float) -> SampleResponse:
    return SampleResponse(
        samples=drawn(answer, info, png),
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
