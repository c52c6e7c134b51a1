"""What routes answer beside their own 200, for the OpenAPI document."""

from typing import Any

from pydantic import BaseModel

from orchestration.serving.errors import Problem
from orchestration.serving.openai_messages import OpenAIProblem

Answers = dict[int | str, dict[str, Any]]

_WAIT = {"description": "whole seconds after which another try may succeed", "schema": {"type": "integer"}}
_MEANINGS = {
    400: "The request is malformed, or can't be answered.",
    401: "A key is needed, or this one is not known.",
    404: "No model of this name is served.",
    413: "The body is too long.",
    415: "The body is not declared as JSON.",
    422: "The request is malformed, or can't be answered.",
    429: "The key's, or address's, requests or tokens of a minute are spent.",
    500: "The model's answer was no prediction, or something unexpected happened.",
    503: "Too many requests are waiting, or what was to answer has ended.",
    504: "The time for a request is up.",
}


def _described(form: type[BaseModel], *statuses: int) -> Answers:
    found: Answers = {}
    for status in statuses:
        found[status] = {"model": form, "description": _MEANINGS[status]}
        if status in (429, 503):
            found[status]["headers"] = {"Retry-After": _WAIT}
        if status == 401:
            found[status]["headers"] = {"WWW-Authenticate": {"schema": {"type": "string"}}}
    return found


def or_events(description: str, *forms: dict[str, Any]) -> Answers:
    """A 200 that may also be a stream of server-sent events, each of one of these `forms`; see `event_of`."""
    # `itemSchema` is of OpenAPI 3.2; readers of 3.1 see the description.
    return {200: {"description": description, "content": {"text/event-stream": {"itemSchema": {"anyOf": [*forms]}}}}}


def event_of(*models: type[BaseModel], kind: str | None = None) -> dict[str, Any]:
    """The schema of an event whose data are JSON, one of these models."""
    schemas = [{"$ref": f"#/components/schemas/{model.__name__}"} for model in models]
    data = {"type": "string", "contentMediaType": "application/json", "contentSchema": {"anyOf": schemas}}
    named = {} if kind is None else {"event": {"const": kind}}
    return {"type": "object", "required": [*named, "data"], "properties": {**named, "data": data}}


LOOKS = _described(Problem, 401, 413, 429, 500, 503)  # of a route that only tells
WORKS = _described(Problem, 401, 404, 413, 415, 422, 429, 500, 503, 504)  # of one with a body
OPENAI_LOOKS = _described(OpenAIProblem, 401, 404, 413, 429, 500, 503)
OPENAI_WORKS = _described(OpenAIProblem, 400, 401, 404, 413, 429, 500, 503, 504)
