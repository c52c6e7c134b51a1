"""Problems as HTTP answers: `{"detail": ...}`, or on OpenAI's routes the object that its clients read."""

import math
from collections.abc import Iterable, Sequence
from typing import Any

import fastapi
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel, Field
from starlette.exceptions import HTTPException
from starlette.types import Scope

from md4.errors import UserError
from md4.samplers import wording
from orchestration.serving.models import Broken, Busy, Lost, UnknownModel, status_of
from orchestration.serving.openai_messages import OpenAIError, OpenAIProblem

_OPENAI = ("/v1/completions", "/v1/models", "/v1/images/generations")
_SHORTEST_WAIT_S = 1  # Retry-After is a whole number of seconds


class Problem(BaseModel):
    """Why a request was not answered."""

    detail: str = Field(examples=["count=0: input should be greater than or equal to 1"])


class Refused(Exception):
    """An answer other than the one that was asked for.

    status: HTTP's; param, code: of OpenAI's error object, the field that is wrong and a name for programs.
    """

    def __init__(
        self,
        status: int,
        detail: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        detail, param = _writable(detail), None if param is None else _writable(param)
        super().__init__(detail)
        self.status, self.detail, self.param, self.code = status, detail, param, code
        self.headers = headers or {}

    def response(self, scope: Scope) -> JSONResponse:
        """The answer, in the form of the route that was called."""
        if not is_openai(scope):
            return JSONResponse(Problem(detail=self.detail).model_dump(), self.status, self.headers)
        status = 400 if self.status in (415, 422) else self.status  # OpenAI knows 400 alone for these
        kind = "server_error" if status >= 500 else "rate_limit_error" if status == 429 else "invalid_request_error"
        error = OpenAIError(message=self.detail, type=kind, param=self.param, code=self.code)
        return JSONResponse(OpenAIProblem(error=error).model_dump(), status, self.headers)


def is_openai(scope: Scope) -> bool:
    """Is the route one of OpenAI's?"""
    path = scope["path"]
    return any(path == route or path.startswith(f"{route}/") for route in _OPENAI)


def refusal(error: BaseException) -> Refused:
    """What is answered to an error of `Models`, or a user's mistake."""
    if isinstance(error, Refused):
        return error
    status = status_of(error)
    if isinstance(error, TimeoutError):
        return Refused(504, "the answer took too long", code="timeout")
    if isinstance(error, (Busy, Lost)):
        wait = max(_SHORTEST_WAIT_S, math.ceil(error.retry_after_s))
        return Refused(status, str(error), code="overloaded", headers={"retry-after": str(wait)})
    if isinstance(error, UnknownModel):
        return Refused(status, str(error), param="model", code="model_not_found")
    if isinstance(error, UserError):
        return Refused(status, str(error))
    if isinstance(error, Broken):
        return Refused(500, str(error), code="model_failed")
    return Refused(500, "internal error; the server's log has more, under the x-request-id of this answer")


def handle(api: fastapi.FastAPI) -> None:
    """Let the application answer every expected error in the form of its route."""

    async def known(request: fastapi.Request, error: Exception) -> JSONResponse:
        return refusal(error).response(request.scope)

    for kind in (Refused, UserError, Broken, Lost, TimeoutError):
        api.add_exception_handler(kind, known)
    api.add_exception_handler(RequestValidationError, _malformed)
    api.add_exception_handler(HTTPException, _http)


async def _http(request: fastapi.Request, error: Exception) -> JSONResponse:
    """What the framework refuses: no such route or method, a body that is none."""
    assert isinstance(error, HTTPException)
    headers = {name.lower(): value for name, value in (error.headers or {}).items()}
    status, detail = error.status_code, str(error.detail)
    if status == 404:
        detail = f"there is nothing at {request.url.path}; /docs describes what there is"
    elif status == 405:
        allowed = f"; allowed: {headers['allow']}" if "allow" in headers else ""
        detail = f"{request.method} is no method of {request.url.path}{allowed}"
    elif status == 400:
        status, detail = 422, "the body can't be read as JSON: it must be UTF-8, and not nested or its numbers long"
    return Refused(status, detail, headers=headers).response(request.scope)


async def _malformed(request: fastapi.Request, error: Exception) -> JSONResponse:
    """A body that is not what the route wants."""
    assert isinstance(error, RequestValidationError)
    if isinstance(error.body, bytes):
        kind = request.headers.get("content-type", "none")
        problem = Refused(415, f"the content-type is {kind[:80]!r}; wanted is 'application/json'")
        return problem.response(request.scope)
    problems = [{**problem, "loc": _in_body(problem)} for problem in error.errors()]
    first = next((".".join(map(str, path)) for problem in problems if (path := _path(problem))), None)
    return Refused(422, complaints(problems, _fields(request.scope)), param=first).response(request.scope)


def complaints(problems: Sequence[Any], fields: Iterable[str]) -> str:
    """What pydantic complains of in a body that may have these fields, in one line."""
    try:
        found = [_describe(problem, fields) for problem in problems]
    except RecursionError:
        found = ["it is nested too deeply"]
    return "; ".join(dict.fromkeys(found))


def _describe(problem: Any, fields: Iterable[str]) -> str:
    if problem["type"] == "json_invalid":
        return wording.describe(problem, ())
    path = _path(problem)
    if not path and problem["type"] == "missing":
        return "a JSON object is needed as the body"
    if problem["type"] == "extra_forbidden" and len(path) == 1 and path[0] in wording.SETTINGS:
        return f"{path[0]} is a setting of the sampler: it belongs into the object 'sampling'"
    return wording.describe(problem, wording.SETTINGS if path[:1] == ("sampling",) else fields, path)


def _path(problem: Any) -> tuple[str | int, ...]:
    """Where in the body: without pydantic's names of several allowed types. Empty for what concerns all of it."""
    where = problem["loc"] if problem["type"] != "json_invalid" else ()
    return tuple(part for place, part in enumerate(where) if not (place and _is_branch(part)))


def _in_body(problem: Any) -> tuple[str | int, ...]:
    """FastAPI names the part of the request first; of what is no JSON the place is a character."""
    return problem["loc"] if problem["type"] == "json_invalid" else problem["loc"][1:]


def _is_branch(part: str | int) -> bool:
    return isinstance(part, str) and (part in ("str", "int", "float") or "[" in part)


def _fields(scope: Scope) -> tuple[str, ...]:
    """Names of the fields that the body of the route may have."""
    body: Any = getattr(scope.get("route"), "body_field", None)
    model: Any = getattr(getattr(body, "field_info", None), "annotation", None)
    return tuple(getattr(model, "model_fields", ()))


def _writable(text: str) -> str:
    """Text as UTF-8 can hold it: JSON may name halves of characters, and messages repeat them."""
    return text.encode("utf-8", "backslashreplace").decode()
