"""The two deployments of the service: replicas that hold models, and gateways that speak HTTP in front of them.

They are apart so that the death of a replica, which a model can cause, is not that of the connections: the gateway asks
another one, or tells the client what happened.
"""

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import aclosing
from dataclasses import replace
from typing import TYPE_CHECKING
from weakref import WeakValueDictionary

import fastapi
import torch
from ray import serve
from ray.serve.handle import DeploymentHandle

from orchestration import checkpoints
from orchestration.runs import Run, load_model
from orchestration.sampling import Answer, Request
from orchestration.serving.client import Client
from orchestration.serving.config import ServingConfig
from orchestration.serving.engine import Engine
from orchestration.serving.events import Event
from orchestration.serving.http import make_api
from orchestration.serving.metrics import EngineMetrics
from orchestration.serving.models import ModelInfo, Score, UnknownModel
from orchestration.serving.outcomes import ERRORS, Refusal
from orchestration.serving.page import router as page

if TYPE_CHECKING:
    from orchestration.runs import Loaded

_METRICS_S = 2.0  # between looks at an engine's state
_log = logging.getLogger("ray.serve")

Load = Callable[[str], "Loaded"]  # a model by its run's folder


class Held:
    """A model in a replica: its engine, its metrics, and the look-out for newer weights.

    newest: the checkpoint that was the newest before `loaded` was loaded.
    """

    def __init__(
        self, name: str, run: str, load: Load, loaded: "Loaded", newest: str | None, config: ServingConfig
    ) -> None:
        self._run, self._load, self._device = run, load, config.num_gpus > 0
        self._metrics = EngineMetrics(name)
        self.name = name
        self.engine = Engine(self._placed(loaded), config.engine, observe=self._metrics.observe)
        self._newest = newest
        self._tasks = [asyncio.ensure_future(self._measure())]
        if config.refresh_s:
            self._tasks.append(asyncio.ensure_future(self._look(config.refresh_s)))
        self._closed = False

    @property
    def healthy(self) -> bool:
        """Whether it answers, or was ended on purpose."""
        return self._closed or self.engine.healthy

    async def refresh(self) -> None:
        """Take the newest weights of the run, if they are others. If that fails, those that are there stay."""
        newest = await asyncio.to_thread(_find_newest, self._run)
        if newest == self._newest:
            return
        loaded = await asyncio.to_thread(lambda: self._placed(self._load(self._run)))
        if loaded.weights_hash != self.engine.loaded.weights_hash:
            await self.engine.refresh(loaded)
            _log.info("model %s has weights %.12s of step %d now", self.name, loaded.weights_hash, loaded.step)
        self._newest = newest  # not before: what has failed is tried again

    async def close(self) -> None:
        """End the engine once it has answered what it has accepted."""
        if not self._closed:
            self._closed = True
            for task in self._tasks:
                task.cancel()
            await self.engine.close()

    def __del__(self) -> None:
        """Called by Serve, in a thread of its own, when the model makes room for another one."""
        if not self._closed:
            self._closed = True
            loop = self._tasks[0].get_loop()
            for task in self._tasks:
                loop.call_soon_threadsafe(task.cancel)
            asyncio.run(self.engine.close())

    def _placed(self, loaded: "Loaded") -> "Loaded":
        return replace(loaded, model=loaded.model.to("cuda")) if self._device else loaded

    async def _look(self, every: float) -> None:
        while True:
            await asyncio.sleep(every)
            try:
                await self.refresh()
            except Exception as error:
                _log.warning("model %s keeps its weights: %s", self.name, error)

    async def _measure(self) -> None:
        while True:
            self._metrics.update(self.engine.stats())
            await asyncio.sleep(_METRICS_S)


def _find_newest(run: str) -> str | None:
    """The checkpoint that would be loaded; cheap, and not yet known to be sound."""
    found = checkpoints.committed_in(Run(run).checkpoints)
    return found[0].url if found else None


class EngineReplica:
    """Holds models, and answers what `Models` asks of them; errors are returned, as `Refusal`.

    Args:
        runs: folders by the names under which they are served.
        load: how a run becomes a model.
    """

    async def __init__(self, runs: Mapping[str, str], config: ServingConfig, load: Load = load_model) -> None:
        # Two threads of OpenMP beside Ray's processes on a busy machine wait for each other at every barrier.
        torch.set_num_threads(max(1, int(config.num_cpus)))
        self._runs = dict(runs)
        self._held: WeakValueDictionary[str, Held] = WeakValueDictionary()  # Serve decides which stay

        async def hold(name: str) -> Held:
            run = self._runs[name]
            newest = await asyncio.to_thread(_find_newest, run)
            loaded = await asyncio.to_thread(load, run)
            held = self._held[name] = Held(name, run, load, loaded, newest, config)
            return held

        most = len(self._runs) if config.models_per_replica is None else config.models_per_replica
        self._hold: Callable[[str], Awaitable[Held]] = serve.multiplexed(  # type: ignore[assignment]
            hold, max_num_models_per_replica=most
        )
        for name in list(self._runs)[:most]:
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
        return list(self._runs)

    async def describe(self, model: str) -> ModelInfo | Refusal:
        try:
            return (await self._engine(model)).describe(model)
        except ERRORS as error:
            return Refusal.of(error)

    async def sample(self, model: str, request: Request) -> Answer | Refusal:
        try:
            return await (await self._engine(model)).sample(request)
        except ERRORS as error:
            return Refusal.of(error)

    async def stream(self, model: str, request: Request) -> AsyncIterator[Event | Refusal]:
        try:
            async with aclosing((await self._engine(model)).stream(request)) as events:
                async for event in events:
                    yield event
        except ERRORS as error:
            yield Refusal.of(error)

    async def score(
        self, model: str, texts: Sequence[str], draws: int, seed: int, label: int | None
    ) -> list[Score] | Refusal:
        try:
            return await (await self._engine(model)).score(texts, draws, seed, label)
        except ERRORS as error:
            return Refusal.of(error)

    async def _engine(self, model: str) -> Engine:
        if model not in self._runs:
            raise UnknownModel(f"model {model!r} is not served; allowed: {', '.join(self._runs)}")
        return (await self._hold(model)).engine

    async def __del__(self) -> None:
        """Called by Serve when the replica ends and nothing is under way any more."""
        for held in list(self._held.values()):
            await held.close()


@serve.ingress()
class Gateway:
    """Speaks HTTP (`http.make_api`), shows the page, and asks the replicas."""

    async def __init__(self, engines: DeploymentHandle, config: ServingConfig) -> None:
        self._config = config
        # Who only looks must not wake replicas that shrink to none, nor have models loaded in the place of others.
        harmless = config.fewest > 0 and config.models_per_replica is None
        self._client = Client(handle=engines, look_s=max(1.0, config.refresh_s) if harmless else None)
        await self._client.describe()  # ready once the models are

    def __serve_build_asgi_app__(self) -> fastapi.FastAPI:
        return make_api(self._client, self._config, [page], proxied=True)
