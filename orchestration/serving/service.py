"""What all routes share: the models, the limits, and how a request is looked after until it is answered."""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from contextlib import aclosing
from dataclasses import dataclass
from typing import TypeVar

import fastapi
from fastapi.sse import KEEPALIVE_COMMENT, EventSourceResponse
from starlette.types import Receive, Scope, Send

from orchestration.sampling import Answer, ModelFacts
from orchestration.serving.access_log import LOGGER, note, request_id
from orchestration.serving.config import ServingConfig
from orchestration.serving.errors import Refused, refusal
from orchestration.serving.models import Broken, ModelInfo, Models, UnknownModel, split_version
from orchestration.serving.rates import Rates

VERSION_HEADER = "x-model-version"
_PING_S = 15.0  # proxies cut connections over which nothing comes for about a minute
T = TypeVar("T")


class Left(Exception):
    """The client closed the connection."""


@dataclass(frozen=True)
class Service:
    """What routes need."""

    models: Models
    config: ServingConfig
    rates: Rates

    async def model(self, name: str | None) -> ModelInfo:
        """The model of that name, or NAME@VERSION, or the first. Raises `UnknownModel`."""
        found = await self.models.describe()
        if name is None:
            return found[0]
        model, version = split_version(name, [info.name for info in found])
        for info in found:
            if info.name == model:
                # Whether there is such a version is for replicas to say: they know it first.
                return info if version is None else info.model_copy(update={"name": name})
        raise UnknownModel(f"model {name!r} is not served; allowed: {', '.join(info.name for info in found)}")

    async def charge(self, request: fastapi.Request, tokens: int) -> None:
        """Count tokens that a request asks for against its client's rate; a 429 if there are none left."""
        state = request.scope["state"]
        state["headers"].update(await self.rates.take(state["who"], "tokens", tokens))

    async def attend(self, request: fastapi.Request, work: Awaitable[T]) -> T:
        """The result of `work`, which is cancelled when the client leaves (`Left`) or time is up (Refused: 504)."""
        task, gone = asyncio.ensure_future(work), asyncio.ensure_future(_disconnected(request.receive))
        both: set[asyncio.Future] = {task, gone}
        try:
            await asyncio.wait(both, timeout=self.config.timeout_s, return_when=asyncio.FIRST_COMPLETED)
            if task.done():
                return task.result()
            if gone.done():
                raise Left
            raise self._late()
        finally:
            for future in both:
                future.cancel()
            await asyncio.gather(*both, return_exceptions=True)

    async def stream(
        self, request: fastapi.Request, events: AsyncIterator[T], encode: Callable[[T | Exception], bytes]
    ) -> "EventStream":
        """Events as an answer; what is wrong before the first of them raises, and becomes an ordinary answer.

        encode: an event in the format of server-sent events, or an error as the last of them.
        """
        until = asyncio.get_running_loop().time() + self.config.timeout_s
        paced = _paced(events, until, self._late())
        try:
            first = await self.attend(request, _first(paced))
        except BaseException:
            await paced.aclose()
            raise
        return EventStream(_encoded(request.scope, first, paced, encode), paced)

    def _late(self) -> Refused:
        return Refused(504, f"the answer took longer than {self.config.timeout_s:g} s", code="timeout")


class EventStream(EventSourceResponse):
    """Server-sent events. Their source is closed whatever happens, so that nobody works for a client that left."""

    def __init__(self, chunks: AsyncIterator[bytes], source: AsyncIterator[object]) -> None:
        # nginx would collect them.
        super().__init__(chunks, headers={"cache-control": "no-store", "x-accel-buffering": "no"})
        self.chunks, self.source = chunks, source

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        # Closing the chunks closes their source, but not if the client left before the first of them was sent.
        async with aclosing(self.source), aclosing(self.chunks):  # type: ignore[type-var]
            await super().__call__(scope, receive, send)


def tell_version(request: fastapi.Request, model: ModelFacts) -> None:
    """Have log and headers say which version of the registry has answered; headers, unless they are sent already."""
    if model.model_version is not None:
        note(request.scope, version=model.model_version)
        request.scope["state"]["headers"][VERSION_HEADER] = str(model.model_version)


def facts_of(answer: Answer) -> dict[str, float | int]:
    """What the log tells of an answer."""
    return {
        "queue_s": round(answer.queue_s, 4),
        "calls": sum(sample.calls for sample in answer.samples),
        "tokens": sum(sample.completion_tokens for sample in answer.samples),
        "count": len(answer.samples),
    }


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


class _Ping:
    """Stands where nothing came for a while."""


async def _first(paced: AsyncIterator[T | _Ping]) -> T | None:
    async for event in paced:
        if not isinstance(event, _Ping):
            return event
    return None


async def _paced(events: AsyncIterator[T], until: float, late: Exception) -> AsyncGenerator[T | _Ping, None]:
    """Events as they come, a `_Ping` where none does for a while; raises `late` at the loop's time `until`."""
    loop = asyncio.get_running_loop()
    end = object()

    async def next_one() -> T | object:
        return await anext(events, end)

    waiting: asyncio.Task | None = None
    try:
        while True:
            waiting = waiting or loop.create_task(next_one())
            await asyncio.wait({waiting}, timeout=max(0.0, min(_PING_S, until - loop.time())))
            if waiting.done():
                found, waiting = waiting.result(), None
                if found is end:
                    return
                yield found  # type: ignore[misc]
            elif loop.time() >= until:
                raise late
            else:
                yield _Ping()
    finally:
        if waiting is not None:
            waiting.cancel()
            await asyncio.gather(waiting, return_exceptions=True)
        await events.aclose()  # type: ignore[attr-defined]


async def _encoded(
    scope: Scope, first: T | None, paced: AsyncIterator[T | _Ping], encode: Callable[[T | Exception], bytes]
) -> AsyncIterator[bytes]:
    ended = False
    try:
        async with aclosing(paced):  # type: ignore[type-var]
            if first is not None:
                yield encode(first)
            async for event in paced:
                yield KEEPALIVE_COMMENT if isinstance(event, _Ping) else encode(event)
            ended = True
    except Exception as error:
        # The status has been sent: the error is the last event.
        ended = True
        problem = refusal(error)
        if problem.status == 500 and not isinstance(error, Broken):
            LOGGER.exception("unexpected error", extra={"id": request_id(scope)})
        note(scope, failed=problem.status, reason=problem.detail)
        yield encode(error)
    finally:
        if not ended:
            note(scope, left=True)
