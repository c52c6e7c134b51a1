"""Is anything there, and which weights?"""

from typing import Any

from fastapi import APIRouter

from orchestration.serving.errors import Problem
from orchestration.serving.messages import Health
from orchestration.serving.service import Service

_ANSWERS: dict[int | str, dict[str, Any]] = {
    503: {"model": Problem, "description": "No model is ready."},
    413: {"model": Problem, "description": "The body is too long."},
    500: {"model": Problem, "description": "Something unexpected happened."},
}


def router(service: Service) -> APIRouter:
    routes = APIRouter(tags=["service"])

    @routes.get("/healthz", responses=_ANSWERS)
    async def health() -> Health:
        """Answers 200 once the models are loaded. Needs no key."""
        found = await service.models.describe()
        tried = {info.name: info.candidate for info in found if info.candidate is not None}
        return Health(hash=found[0].hash, models={info.name: info for info in found}, candidates=tried)

    return routes
