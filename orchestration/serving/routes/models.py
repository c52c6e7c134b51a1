"""Which models are served."""

import time

from fastapi import APIRouter

from orchestration.serving.models import ModelInfo
from orchestration.serving.openai_messages import Model, ModelList
from orchestration.serving.routes.answers import LOOKS, OPENAI_LOOKS
from orchestration.serving.service import Service


def router(service: Service) -> APIRouter:
    routes = APIRouter(tags=["models"])
    began = int(time.time())

    @routes.get("/v1/model", responses=LOOKS)
    async def model() -> ModelInfo:
        """The first model, which answers requests that name none, and its settings."""
        return await service.model(None)

    @routes.get("/v1/models", responses={status: OPENAI_LOOKS[status] for status in OPENAI_LOOKS if status != 404})
    async def models() -> ModelList:
        """All models, in the form that OpenAI's clients know."""
        return ModelList(data=[_model(info) for info in await service.models.describe()])

    # A model may be called by a path.
    @routes.get("/v1/models/{name:path}", responses=OPENAI_LOOKS)
    async def one(name: str) -> Model:
        """One of them."""
        return _model(await service.model(name))

    def _model(info: ModelInfo) -> Model:
        return Model(id=info.name, created=began, info=info)

    return routes
