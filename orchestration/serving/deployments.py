"""The two deployments of the service: replicas that hold models, and gateways that speak HTTP in front of them.

They are apart so that the death of a replica, which a model can cause, is not that of the connections: the gateway asks
another one, or tells the client what happened.
"""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import aclosing
from weakref import WeakValueDictionary

import fastapi
import torch
from ray import serve
from ray.serve.handle import DeploymentHandle

from orchestration.runs import load_model
from orchestration.sampling import Answer, Request
from orchestration.serving import sources
from orchestration.serving.client import Client
from orchestration.serving.config import ServingConfig
from orchestration.serving.events import Event
from orchestration.serving.following import Following
from orchestration.serving.held import Held, Single
from orchestration.serving.http import make_api
from orchestration.serving.models import ModelInfo, Score, UnknownModel, split_version
from orchestration.serving.outcomes import ERRORS, Refusal
from orchestration.serving.page import router as page
from orchestration.serving.sources import Load


async def hold(name: str, text: str, config: ServingConfig, load: Load, registry: str | None) -> Held:
    """A model ready to answer. text: where it comes from, see `sources`. Raises `UserError`."""
    if sources.follows(text):
        replica = serve.get_replica_context().replica_id.unique_id
        return await Following.open(name, text, config, registry, replica)
    source = sources.open_source(text, registry, load)
    newest = await asyncio.to_thread(source.look)  # before it is loaded
    return Single(name, source, await asyncio.to_thread(source.load), newest, config, moves=sources.moves(text))


class EngineReplica:
    """Holds models, and answers what `Models` asks of them; errors are returned, as `Refusal`.

    A model is asked for by its name, or as NAME@VERSION where several versions of it are served.

    Args:
        models: where they come from, see `sources`, by the names under which they are served.
        load: how a run becomes a model.
        registry: where it is; None: as `Registry` finds it.
    """

    async def __init__(
        self, models: Mapping[str, str], config: ServingConfig, load: Load = load_model, registry: str | None = None
    ) -> None:
        # Two threads of OpenMP beside Ray's processes on a busy machine wait for each other at every barrier.
        torch.set_num_threads(max(1, int(config.num_cpus)))
        self._models = dict(models)
        self._held: WeakValueDictionary[str, Held] = WeakValueDictionary()  # Serve decides which stay

        async def find(name: str) -> Held:
            held = self._held[name] = await hold(name, self._models[name], config, load, registry)
            return held

        most = len(self._models) if config.models_per_replica is None else config.models_per_replica
        self._hold: Callable[[str], Awaitable[Held]] = serve.multiplexed(  # type: ignore[assignment]
            find, max_num_models_per_replica=most
        )
        for name in list(self._models)[:most]:
            await self._hold(name)

    async def reconfigure(self, user_config: dict) -> None:
        """Called at a deployment whose `user_config` is another one, whatever stands in it: look for newer weights."""
        for held in list(self._held.values()):
            await held.refresh()

    def check_health(self) -> None:
        """Serve starts the replica anew when this raises."""
        for held in list(self._held.values()):
            if not held.healthy:
                raise RuntimeError(f"the engine of model {held.name} has failed")

    async def names(self) -> list[str]:
        """The models that there are; the first is the default."""
        return list(self._models)

    async def describe(self, model: str) -> ModelInfo | Refusal:
        try:
            held, _ = await self._find(model)
            return held.describe()
        except ERRORS as error:
            return Refusal.of(error)

    async def sample(self, model: str, request: Request) -> Answer | Refusal:
        try:
            held, version = await self._find(model)
            return await held.sample(request, version)
        except ERRORS as error:
            return Refusal.of(error)

    async def stream(self, model: str, request: Request) -> AsyncIterator[Event | Refusal]:
        try:
            held, version = await self._find(model)
            async with aclosing(held.stream(request, version)) as events:
                async for event in events:
                    yield event
        except ERRORS as error:
            yield Refusal.of(error)

    async def score(
        self, model: str, texts: Sequence[str], draws: int, seed: int, label: int | None
    ) -> list[Score] | Refusal:
        try:
            held, version = await self._find(model)
            return await held.score(texts, draws, seed, label, version)
        except ERRORS as error:
            return Refusal.of(error)

    async def _find(self, model: str) -> tuple[Held, str | None]:
        """A model, and which version of it is asked for."""
        name, version = split_version(model, self._models)
        if name not in self._models:
            raise UnknownModel(f"model {model!r} is not served; allowed: {', '.join(self._models)}")
        return await self._hold(name), version

    async def __del__(self) -> None:
        """Called by Serve when the replica ends and nothing is under way any more."""
        for held in list(self._held.values()):
            await held.close()


@serve.ingress()
class Gateway:
    """Speaks HTTP (`http.make_api`), shows the page, and asks the replicas."""

    async def __init__(self, engines: DeploymentHandle, config: ServingConfig, moves: bool = False) -> None:
        """moves: a model is served that is a name in the registry, or its latest version."""
        self._config = config
        # Who only looks must not wake replicas that shrink to none, nor have models loaded in the place of others.
        harmless = config.fewest > 0 and config.models_per_replica is None
        self._client = Client(handle=engines, look_s=max(1.0, config.look_s(moves)) if harmless else None)
        await self._client.describe()  # ready once the models are

    def __serve_build_asgi_app__(self) -> fastapi.FastAPI:
        return make_api(self._client, self._config, [page], proxied=True)
