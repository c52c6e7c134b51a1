"""Images as OpenAI's clients ask for them."""

import asyncio
import time

import fastapi
from fastapi import APIRouter

from md4.errors import UserError
from orchestration.sampling import Request, random_seed
from orchestration.serving import pixels
from orchestration.serving.access_log import note
from orchestration.serving.models import ModelInfo
from orchestration.serving.openai_messages import ImageRequest, ImageResponse, Picture
from orchestration.serving.routes.answers import OPENAI_WORKS
from orchestration.serving.sample_requests import check_count, settings_of
from orchestration.serving.service import Service, facts_of, tell_version


def router(service: Service) -> APIRouter:
    routes = APIRouter(tags=["OpenAI"])

    @routes.post("/v1/images/generations", responses=OPENAI_WORKS)
    async def images(body: ImageRequest, request: fastapi.Request) -> ImageResponse:
        """Images of a class, or of none in particular, as PNGs."""
        info = await _model(service, body.model)
        count = body.n or 1
        note(request.scope, model=info.name, count=count)
        check_count(count, service.config, "n")
        height, width, _ = pixels.shape_of(info)
        if body.size not in (None, "auto", f"{width}x{height}"):
            raise UserError(f"size={body.size[:40]!r}: this model makes images of {width}x{height}")
        await service.charge(request, count * info.length)
        changes = {} if body.sampling is None else body.sampling.model_dump(exclude_unset=True)
        wanted = Request(
            count=count,
            seed=random_seed() if body.seed is None else body.seed,
            label=_label(body.prompt, info),
            settings=settings_of(info, changes, service.config),
        )
        answer = await service.attend(request, service.models.sample(info.name, wanted))
        note(request.scope, **facts_of(answer))
        tell_version(request, answer.model)
        pngs = await asyncio.to_thread(lambda: [pixels.png_of(sample.text, info) for sample in answer.samples])
        return ImageResponse(
            created=int(time.time()),
            data=[Picture(b64_json=png, seed=one.seed) for png, one in zip(pngs, answer.samples, strict=True)],
            size=f"{width}x{height}",
        )

    return routes


async def _model(service: Service, name: str | None) -> ModelInfo:
    """The model of that name; if there is none, the first that makes images."""
    if name is None:
        for info in await service.models.describe():
            if info.shape is not None:
                return info
    return await service.model(name)


def _label(prompt: str, info: ModelInfo) -> int | None:
    word = prompt.strip()
    if not word:
        return None
    if not word.isascii() or not word.isdecimal() or len(word) > 9:
        allowed = f"the number of a class, 0 to {info.classes - 1}" if info.classes else "empty: it has no classes"
        raise UserError(f"prompt={word[:40]!r}: of this model a prompt is {allowed}")
    return int(word)
