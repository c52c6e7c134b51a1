"""A model in a replica: its engine, its metrics, and the look-out for newer weights."""

import asyncio
import logging
from collections.abc import AsyncGenerator, Iterator, Sequence
from contextlib import aclosing, contextmanager
from dataclasses import replace
from time import monotonic
from typing import TYPE_CHECKING, Protocol

from orchestration.sampling import Answer, Request
from orchestration.serving.config import EngineConfig, ServingConfig
from orchestration.serving.engine import Engine
from orchestration.serving.events import Event
from orchestration.serving.metrics import EngineMetrics
from orchestration.serving.models import ModelInfo, Score, UnknownModel
from orchestration.serving.sources import Source

if TYPE_CHECKING:
    from orchestration.runs import Loaded

AGAIN_S = 60.0  # before weights that can't be served are loaded again
_METRICS_S = 2.0  # between looks at an engine's state
_log = logging.getLogger("ray.serve")


class Side:
    """Weights under way: an engine, and its metrics.

    name: of the model; places: rows that a call takes, if that is known; None: it is measured.
    """

    def __init__(self, name: str, loaded: "Loaded", config: ServingConfig, places: int | None = None) -> None:
        self._name = name
        self._metrics = EngineMetrics(name, loaded.model_version)
        own: EngineConfig = config.engine
        if own.max_rows is None and places is not None:
            own = own.model_copy(update={"max_rows": places})
        self.engine = Engine(loaded, own, observe=lambda what, value: self._metrics.observe(what, value))
        self._under_way = 0
        self._idle = asyncio.Event()
        self._idle.set()
        self._measuring = asyncio.ensure_future(self._measure())
        self.closed = False

    @property
    def version(self) -> int | None:
        """In the registry."""
        return self.engine.loaded.model_version

    @contextmanager
    def used(self) -> Iterator[Engine]:
        """The engine, which `close` leaves alone until whoever uses it is done."""
        self._under_way += 1
        self._idle.clear()
        try:
            yield self.engine
        finally:
            self._under_way -= 1
            if not self._under_way:
                self._idle.set()

    async def refresh(self, loaded: "Loaded") -> None:
        """Other weights of the same model, see `Engine.refresh`."""
        await self.engine.refresh(loaded)
        if loaded.model_version is not None:
            self._metrics.end(self.engine.stats())
            self._metrics = EngineMetrics(self._name, loaded.model_version, self.engine.stats())

    async def ready(self) -> bool:
        """Once it is known how many rows a call takes; False if it has failed."""
        while self.engine.healthy and not self.engine.stats().ready:
            await asyncio.sleep(0.02)
        return self.engine.healthy

    async def close(self) -> None:
        """End the engine once nobody uses it and it has answered what it has accepted."""
        if not self.closed:
            self.closed = True
            await self._idle.wait()
            self._measuring.cancel()
            await self.engine.close()
            self._metrics.end(self.engine.stats())

    def abandon(self) -> None:
        """The same from another thread, which waits until it is done."""
        if not self.closed:
            self.closed = True
            self._measuring.get_loop().call_soon_threadsafe(self._measuring.cancel)
            asyncio.run(self.engine.close())

    async def _measure(self) -> None:
        while True:
            self._metrics.update(self.engine.stats())
            await asyncio.sleep(_METRICS_S)


class Held(Protocol):
    """A model in a replica. A version is one that a request asks for by its number, where there are several."""

    name: str

    @property
    def healthy(self) -> bool:
        """Whether it answers, or was ended on purpose."""
        ...

    async def refresh(self) -> None:
        """Take newer weights, if there are any. If that fails, those that are there stay."""
        ...

    async def close(self) -> None:
        """End, once what was accepted is answered."""
        ...

    def describe(self) -> ModelInfo: ...

    async def sample(self, request: Request, version: str | None) -> Answer: ...

    def stream(self, request: Request, version: str | None) -> AsyncGenerator[Event, None]: ...

    async def score(
        self, texts: Sequence[str], draws: int, seed: int, label: int | None, version: str | None
    ) -> list[Score]: ...


class Single(Held):
    """A model with one engine: of a run, an exported folder, or a version.

    newest: what was the newest before `loaded` was loaded, see `Source`.
    moves: whether it is looked at without being told, see `sources`.
    """

    def __init__(
        self,
        name: str,
        source: Source,
        loaded: "Loaded",
        newest: str | None,
        config: ServingConfig,
        *,
        moves: bool = False,
    ) -> None:
        self.name, self._source, self._newest, self._config = name, source, newest, config
        self._refused: tuple[str | None, float] | None = None  # what can't be taken, and until when it isn't tried
        self.side = Side(name, placed(loaded, config), config)
        self._looking = look_out(self, config.look_s(moves))

    @property
    def healthy(self) -> bool:
        return self.side.closed or self.side.engine.healthy

    async def refresh(self) -> None:
        newest = await asyncio.to_thread(self._source.look)
        if newest == self._newest:
            return
        if self._refused is not None and self._refused[0] == newest and monotonic() < self._refused[1]:
            return
        try:
            loaded = await asyncio.to_thread(lambda: placed(self._source.load(), self._config))
            if loaded.weights_hash != self.side.engine.loaded.weights_hash:
                await self.side.refresh(loaded)
                _log.info("model %s has weights %.12s of step %d now", self.name, loaded.weights_hash, loaded.step)
        except Exception:
            self._refused = newest, monotonic() + AGAIN_S
            raise
        self._newest = newest  # not before: what has failed is tried again

    async def close(self) -> None:
        stop(self._looking)
        await self.side.close()

    def __del__(self) -> None:
        """Called by Serve, in a thread of its own, when the model makes room for another one."""
        if not self.side.closed:
            stop(self._looking)
            self.side.abandon()

    def describe(self) -> ModelInfo:
        return self.side.engine.describe(self.name)

    async def sample(self, request: Request, version: str | None) -> Answer:
        self._check(version)
        return await self.side.engine.sample(request)

    async def stream(self, request: Request, version: str | None) -> AsyncGenerator[Event, None]:
        self._check(version)
        async with aclosing(self.side.engine.stream(request)) as events:
            async for event in events:
                yield event

    async def score(
        self, texts: Sequence[str], draws: int, seed: int, label: int | None, version: str | None
    ) -> list[Score]:
        self._check(version)
        return await self.side.engine.score(texts, draws, seed, label)

    def _check(self, version: str | None) -> None:
        if version is not None and version != str(self.side.version):
            raise UnknownModel(f"version {version!r} of model {self.name} is not served; leave out @{version}")


def placed(loaded: "Loaded", config: ServingConfig) -> "Loaded":
    """The model where it is to work."""
    return replace(loaded, model=loaded.model.to("cuda")) if config.num_gpus > 0 else loaded


def look_out(held: Held, every: float, *, at_once: bool = False) -> asyncio.Task | None:
    """Have `refresh` called every so many seconds, the first time at once or after them; never for 0."""

    async def look() -> None:
        if not at_once:
            await asyncio.sleep(every)
        while True:
            try:
                await held.refresh()
            except Exception as error:
                _log.warning("model %s keeps its weights: %s", held.name, error)
            await asyncio.sleep(every)

    return asyncio.ensure_future(look()) if every else None


def stop(task: asyncio.Task | None) -> None:
    """Cancel a task, from whatever thread."""
    if task is not None:
        task.get_loop().call_soon_threadsafe(task.cancel)
