"""Request ids, and one line of JSON for each request.

    {"message": "request", "time": "2026-01-31T12:00:00.000+00:00", "id": "3f2a...", "client": "10.0.0.7",
     "method": "POST", "route": "/v1/samples", "status": 200, "seconds": 0.81, "key": "alice", "model": "demo",
     "count": 2, "queue_s": 0.003, "calls": 64, "tokens": 512}

The logger is `md4.access`; without a handler of its own it writes to the file `serving.access_log`, or to standard
error. What was asked for in words is not logged, unless `log_prompts` says so.
"""

import logging
import re
import secrets
from datetime import UTC, datetime
from logging.handlers import WatchedFileHandler
from pathlib import Path
from time import perf_counter
from typing import Any

from pythonjsonlogger.json import JsonFormatter
from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from md4.errors import UserError
from orchestration.serving.errors import refusal

HEADER = "x-request-id"
LOGGER = logging.getLogger("md4.access")
_SANE = re.compile(r"[A-Za-z0-9._:-]{1,64}")
_CLOSED = 499  # nginx's word for a client that left before the answer


def start(file: Path | None = None) -> None:
    """Give the logger a handler, if it has none. file: None = standard error, which Ray keeps among its logs.

    Raises `UserError` for a file that can't be written.
    """
    if not LOGGER.handlers:
        # Of a file that is moved away (logrotate) a new one is begun.
        try:
            handler = logging.StreamHandler() if file is None else WatchedFileHandler(file, encoding="utf-8")
        except OSError as error:
            raise UserError(f"the log of requests can't be written to {file}: {error.strerror}") from None
        handler.setFormatter(JsonFormatter())
        LOGGER.addHandler(handler)
        LOGGER.setLevel(logging.INFO)
        LOGGER.propagate = False


def note(scope: Scope, **facts: Any) -> None:
    """Put facts into the request's line; None is left out."""
    scope["state"].setdefault("log", {}).update({name: fact for name, fact in facts.items() if fact is not None})


def request_id(scope: Scope) -> str:
    return scope["state"]["id"]


class AccessLog:
    """Gives every request an id (the client's own, if it is sane), every answer that id, and logs both.

    An error that nobody expected ends here: as a 500, and in the log with its stack trace.

    tells: whether answers get the id here; Ray Serve's proxy gives it to requests and answers itself.
    """

    def __init__(self, app: ASGIApp, tells: bool = True) -> None:
        self.app, self.tells = app, tells

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        given = Headers(scope=scope).get(HEADER, "")
        name = given if _SANE.fullmatch(given) else secrets.token_hex(16)
        # A dictionary of its own: the one that the server gives may be shared between requests.
        scope["state"] = {**scope.get("state", {}), "id": name, "log": {}, "headers": {}}
        began, status = perf_counter(), _CLOSED

        async def marked(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                headers = MutableHeaders(scope=message)
                if self.tells:
                    headers[HEADER] = name
                headers.update(scope["state"]["headers"])
            await send(message)

        try:
            await self.app(scope, receive, marked)
        except Exception as error:
            LOGGER.exception("unexpected error", extra={"id": name, "route": scope["path"]})
            if status != _CLOSED:
                raise  # the answer has begun: cut it off
            await refusal(error).response(scope)(scope, receive, marked)
        finally:
            client = scope.get("client")
            LOGGER.info(
                "request",
                extra={
                    "time": datetime.now(UTC).isoformat(timespec="milliseconds"),
                    "id": name,
                    "client": client[0] if client else None,
                    "method": scope["method"],
                    "route": getattr(scope.get("route"), "path_format", scope["path"]),
                    "status": status,
                    "seconds": round(perf_counter() - began, 4),
                    **scope["state"]["log"],
                },
            )
