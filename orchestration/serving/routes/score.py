"""How well a model knows texts."""

import fastapi
from fastapi import APIRouter

from md4.errors import UserError
from orchestration.serving.access_log import note
from orchestration.serving.messages import ScoreRequest, ScoreResponse
from orchestration.serving.routes.answers import WORKS
from orchestration.serving.sample_requests import check_count
from orchestration.serving.service import Service


def router(service: Service) -> APIRouter:
    routes = APIRouter(tags=["scores"])

    @routes.post("/v1/score", responses=WORKS)
    async def score(body: ScoreRequest, request: fastapi.Request) -> ScoreResponse:
        """Upper bounds on -ln p of texts (NELBO), with standard errors. The same seed gives the same numbers.

        Of the limit of tokens a minute each character counts as one.
        """
        info = await service.model(body.model)
        note(request.scope, model=info.name, count=len(body.texts))
        check_count(len(body.texts), service.config, "texts")
        if body.draws > service.config.max_draws:
            raise UserError(f"draws={body.draws}: at most {service.config.max_draws} for each text")
        longest = max(service.config.max_length, info.length)
        for place, text in enumerate(body.texts):
            _check(text, place, longest if info.shape is None else 8 * longest)
        if service.config.log_prompts:
            note(request.scope, texts=body.texts)
        await service.charge(request, sum(map(len, body.texts)))
        work = service.models.score(info.name, body.texts, body.draws, body.seed, body.label)
        scores = await service.attend(request, work)
        note(request.scope, tokens=sum(score.tokens for score in scores))
        return ScoreResponse(scores=scores)

    return routes


def _check(text: str, place: int, longest: int) -> None:
    if not text:
        raise UserError(f"texts.{place}: the text is empty")
    if len(text) > longest:
        raise UserError(f"texts.{place}: {len(text):,} characters; at most {longest:,}")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UserError(f"texts.{place}: the character at position {error.start} is not proper Unicode") from None
