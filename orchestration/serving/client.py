"""The models of a service on this Ray cluster, for programs in Python: what the gateways use themselves."""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import aclosing, suppress
from time import monotonic
from typing import Any

from ray import serve
from ray.exceptions import RayActorError, TaskCancelledError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError, ReplicaUnavailableError
from ray.serve.handle import DeploymentHandle

from orchestration.sampling import Answer, ModelFacts, Request
from orchestration.serving.events import Begun, Event, Failed
from orchestration.serving.models import Busy, Lost, ModelInfo, Models, Score, UnknownModel, split_version, status_of
from orchestration.serving.outcomes import Refusal

APPLICATION, ENGINE, GATEWAY = "md4", "Engine", "Gateway"  # names in Ray Serve
_TRIES = 2
_AGAIN_S = 0.5  # the dead replica may be taken for alive until then
_GONE = (RayActorError, ReplicaUnavailableError, DeploymentUnavailableError, TaskCancelledError)


class Client(Models):
    """Models that Ray Serve serves on the cluster that this process has joined.

        ray.init("auto")
        client = Client()
        answer = await client.sample(None, Request(prompt="the ______ of", seed=1))

    No HTTP, no keys, no limits of rates. A request whose replica dies before it has told anything is asked once more of
    another one; it samples the same, as its seed is in it. (A single answer is all or nothing.)

    Args:
        application: name of the Serve application.
        handle: to its replicas; None: found by name.
        look_s: age in seconds at which what is known of the models is looked at anew, by the way; None: never, and only
            what answers tell of their weights is taken over.
    """

    def __init__(
        self, application: str = APPLICATION, *, handle: DeploymentHandle | None = None, look_s: float | None = None
    ) -> None:
        self._handle = handle or serve.get_deployment_handle(ENGINE, application)
        self._look_s = look_s
        self._infos: dict[str, ModelInfo] = {}  # in the order in which they are served
        self._looked = 0.0
        self._look: asyncio.Task | None = None

    async def describe(self) -> list[ModelInfo]:
        if not self._infos:
            await self._describe()
        elif self._look_s is not None and monotonic() - self._looked > self._look_s:
            self._looked = monotonic()
            self._look = asyncio.ensure_future(self._describe())  # nobody waits for it
            self._look.add_done_callback(lambda task: task.cancelled() or task.exception())
        return list(self._infos.values())

    async def sample(self, model: str | None, request: Request) -> Answer:
        answer: Answer = await self._ask(await self._name(model), "sample", request)
        self._learn(answer.model, model)
        return answer

    async def stream(self, model: str | None, request: Request) -> AsyncIterator[Event]:
        name = await self._name(model)
        for tries_left in reversed(range(_TRIES)):
            begun = False
            try:
                async with aclosing(self._events(name, request)) as events:
                    async for event in events:
                        begun = True
                        if isinstance(event, Begun):
                            self._learn(event.model, name)
                        yield event
                return
            except Lost as error:
                if begun:
                    yield Failed(status=status_of(error), detail=str(error))
                    return
                if not tries_left:
                    raise
                await asyncio.sleep(_AGAIN_S)

    async def score(
        self, model: str | None, texts: Sequence[str], draws: int, seed: int, label: int | None
    ) -> list[Score]:
        return await self._ask(await self._name(model), "score", list(texts), draws, seed, label)

    async def _describe(self) -> None:
        names = list(self._infos) or await self._ask("", "names")
        found = {name: await self._ask(name, "describe") for name in names}
        self._infos, self._looked = found, monotonic()

    async def _name(self, model: str | None) -> str:
        infos = self._infos or {info.name: info for info in await self.describe()}
        if model is None:
            return next(iter(infos))
        if split_version(model, infos)[0] not in infos:
            raise UnknownModel(f"model {model!r} is not served; allowed: {', '.join(infos)}")
        return model

    def _learn(self, facts: ModelFacts, model: str | None) -> None:
        """An answer tells of newer weights. (One that was begun before tells of older ones.)"""
        name = next(iter(self._infos)) if model is None else model
        if facts.trial or name not in self._infos:
            return  # a version that is tried, or was asked for, says nothing of the others
        info = self._infos[name]
        if facts.step > info.step or facts.model_version != info.model_version:
            self._infos[info.name] = info.model_copy(update=facts.model_dump())

    def _method(self, name: str, method: str, stream: bool = False) -> DeploymentHandle:
        # A single model is in every replica: none needs to be looked for.
        model = split_version(name, self._infos)[0] if len(self._infos) > 1 else ""
        return self._handle.options(method_name=method, stream=stream, multiplexed_model_id=model)

    async def _ask(self, name: str, method: str, *arguments: Any) -> Any:
        """What a replica answers; asked again if it is lost."""
        for _ in range(_TRIES - 1):
            with suppress(Lost):
                return await self._ask_once(name, method, *arguments)
            await asyncio.sleep(_AGAIN_S)
        return await self._ask_once(name, method, *arguments)

    async def _ask_once(self, name: str, method: str, *arguments: Any) -> Any:
        response = self._method(name, method).remote(*([name] if name else []), *arguments)
        try:
            found = await response
        except asyncio.CancelledError:
            response.cancel()
            raise
        except (*_GONE, BackPressureError) as error:
            raise _told(error) from None
        if isinstance(found, Refusal):
            raise found.error()
        return found

    async def _events(self, name: str, request: Request) -> AsyncGenerator[Event, None]:
        response = self._method(name, "stream", stream=True).remote(name, request)
        ended = False
        try:
            async for event in response:  # type: ignore[attr-defined]
                if isinstance(event, Refusal):
                    ended = True
                    raise event.error()
                yield event
            ended = True
        except (*_GONE, BackPressureError) as error:
            ended = True
            raise _told(error) from None
        finally:
            if not ended:
                response.cancel()


def _told(error: Exception) -> Busy | Lost:
    """What it means for who asked."""
    if isinstance(error, BackPressureError):
        return Busy("too many requests are waiting", error.retry_after_s or 1.0)
    if isinstance(error, DeploymentUnavailableError):
        return Lost("the model could not be started")
    return Lost("the process that held the model has ended")
