"""The service over HTTP: one FastAPI application over whatever answers requests (`models.Models`).

    POST /v1/samples             texts and images, whole or step by step    GET /v1/model      the first model
    POST /v1/score               how well the model knows texts             GET /healthz       which weights are in
    POST /v1/completions         as OpenAI's clients ask for text           GET /docs          all of it, described
    POST /v1/images/generations  as they ask for images                     GET /v1/models     as they ask for models

From the outside in, a request passes: the log (`access_log`), the limit of bodies (`body_limit`), keys and rates
(`gate`), and the route, whose work ends when the client leaves or time is up (`service`).
"""

from collections.abc import Iterable
from importlib.metadata import version
from typing import Any

import fastapi
from fastapi import APIRouter, Depends
from fastapi.security import HTTPBearer
from pydantic.json_schema import models_json_schema
from starlette.middleware import Middleware
from starlette.responses import Response

from orchestration.serving import access_log
from orchestration.serving.body_limit import LimitBody
from orchestration.serving.config import ServingConfig
from orchestration.serving.errors import handle
from orchestration.serving.gate import Gate
from orchestration.serving.keys import Keys
from orchestration.serving.messages import EVENTS
from orchestration.serving.models import Models
from orchestration.serving.rates import Rates
from orchestration.serving.routes import completions, health, images, models, samples, score
from orchestration.serving.service import Left, Service

_DESCRIPTION = """
Samples of masked diffusion models: free, of a given beginning, or filled into the holes of a text or an image.

`/v1/samples` has all that the models can do. `/v1/completions`, `/v1/images/generations` and `/v1/models` speak
OpenAI's protocol: its clients work with `base_url` set to this service and `/v1`. Every answer has an `x-request-id`.
"""


def make_api(
    served: Models, config: ServingConfig, pages: Iterable[APIRouter] = (), *, proxied: bool = False
) -> fastapi.FastAPI:
    """The application. pages: further routes, open to all and not described; proxied: by Ray Serve's proxy.

    Raises `UserError` for keys or a storage of rates that can't be used.
    """
    keys = None if config.keys is None else Keys(config.keys)
    rates = Rates(config.requests_per_minute, config.tokens_per_minute, config.rate_storage)
    service = Service(served, config, rates)
    access_log.start(config.access_log)
    api = fastapi.FastAPI(
        title="md4",
        version=version("md4"),
        description=_DESCRIPTION,
        middleware=[
            Middleware(access_log.AccessLog, tells=not proxied),
            Middleware(LimitBody, limit=config.max_body_bytes),
            Middleware(Gate, keys=keys, rates=rates),
        ],
    )
    handle(api)
    api.add_exception_handler(Left, _left)
    # The gate has looked at the key already; this tells the OpenAPI document of it.
    described = [] if keys is None else [Depends(HTTPBearer(auto_error=False, description="API key"))]
    api.include_router(health.router(service))
    for part in (samples, score, models, completions, images):
        api.include_router(part.router(service), dependencies=described)
    for page in pages:
        api.include_router(page, include_in_schema=False)
    _correct_description(api)
    return api


async def _left(_: fastapi.Request, __: Exception) -> Response:
    """Nobody reads this; the status is for the log."""
    return Response(status_code=499)


def _correct_description(api: fastapi.FastAPI) -> None:
    """Make the OpenAPI document true.

    It gets the events of streams, which no route returns by themselves, and loses the framework's own 422, which no
    route answers.
    """
    plain = api.openapi

    def openapi() -> dict[str, Any]:
        if api.openapi_schema is not None:
            return api.openapi_schema
        document = plain()
        schemas = document["components"]["schemas"]
        template = "#/components/schemas/{model}"
        _, events = models_json_schema([(event, "serialization") for event in EVENTS], ref_template=template)
        for name, schema in events["$defs"].items():
            schemas.setdefault(name, schema)
        for route in (route for routes in document["paths"].values() for route in routes.values()):
            content = route["responses"].get("422", {}).get("content", {}).get("application/json", {})
            if content.get("schema", {}).get("$ref") == template.format(model="HTTPValidationError"):
                del route["responses"]["422"]
        for name in ("HTTPValidationError", "ValidationError"):
            schemas.pop(name, None)
        return document

    api.openapi = openapi  # type: ignore[method-assign]
