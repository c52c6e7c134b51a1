"""One model that samples many requests at once: they join and leave between any two network calls.

    engine = Engine(load_model("runs/mine"))
    answer = await engine.sample(Request(prompt="the ______ of", seed=1))
    await engine.close()

The samplers are those of `md4.samplers`: a request with a seed gets the tokens that it gets alone, whatever its
company, and whoever of it leaves. Rows share a call if the network sees equally many tokens of them. (It would see what
a shorter text is filled up with, and predict something else.)

What happens between the calls stands in `worker`, who gets a place in a call in `lanes`.
"""

import asyncio
from collections.abc import AsyncGenerator, Sequence
from dataclasses import replace
from importlib.metadata import version
from time import perf_counter
from typing import TYPE_CHECKING

import numpy as np

from md4.errors import UserError
from md4.samplers import SamplingConfig
from md4.samplers.saved import Saved
from md4.samplers.settings import BEST, SAMPLERS
from orchestration import sampling
from orchestration.sampling import Answer, Request
from orchestration.serving import scoring
from orchestration.serving.config import EngineConfig
from orchestration.serving.engine_stats import EngineStats, Observe
from orchestration.serving.events import Done, Event, Failed
from orchestration.serving.models import Broken, Lost, ModelInfo, Score, status_of
from orchestration.serving.tickets import Outcome, Scoring, Ticket, Waiter
from orchestration.serving.watching import Canvases, Snapshot, Watch
from orchestration.serving.worker import Worker

if TYPE_CHECKING:
    from orchestration.runs import Loaded

_LONG_PROMPT = 10_000  # characters; longer ones are read in a thread, so that others are not kept waiting


class Engine:
    """A model that answers requests, from any number of tasks at once.

    Args:
        loaded: the model, on the device where it is to stay.
        config: how rows share the network.
        settings: of requests that name none, told by `describe`; None: the run's own.
        observe: is told of single values, see `engine_stats`.
    """

    def __init__(
        self,
        loaded: "Loaded",
        config: EngineConfig | None = None,
        *,
        settings: SamplingConfig | None = None,
        observe: Observe | None = None,
    ):
        self.settings = settings or loaded.config.sampling
        self._pieces: dict[int, str] = {}
        loaded.model.eval()
        self._worker = Worker(loaded, config or EngineConfig(), observe)

    @property
    def loaded(self) -> "Loaded":
        """The weights that new requests get."""
        return self._worker.loaded

    @property
    def healthy(self) -> bool:
        """Whether requests are answered; once False, it stays so."""
        return self._worker.healthy

    def stats(self) -> EngineStats:
        """Counters and the present state."""
        return self._worker.stats()

    def describe(self, name: str) -> ModelInfo:
        """What is served, under this name."""
        loaded = self.loaded
        model, saved = loaded.config.model, loaded.model.saved or Saved()
        best = {BEST: ["steps"]} if BEST in saved.named else {}
        return ModelInfo(
            **sampling.facts(loaded).model_dump(),
            name=name,
            run=loaded.config.name,
            version=version("md4"),
            vocabulary=loaded.vocabulary.name,
            vocab_size=model.vocab_size,
            length=model.length,
            shape=loaded.config.data.shape,
            classes=model.classes,
            objective=model.objective,
            sampling=self.settings,
            samplers={sampler: list(own) for sampler, own in SAMPLERS[loaded.model.objective].items()} | best,
            saved=saved,
        )

    async def sample(self, request: Request) -> Answer:
        """The answer to a request; see `Models` for errors. Cancelled, its rows leave at the next step."""
        ticket = await self._submit(request, watched=False)
        try:
            return self._read(ticket, await ticket.result)
        finally:
            self._worker.give_up(ticket)

    async def stream(self, request: Request) -> AsyncGenerator[Event, None]:
        """Events of a request, see `Models`. Closed, its rows leave at the next step.

        Who reads too slowly gets fewer, larger steps, and slows nobody.
        """
        ticket = await self._submit(request, watched=True)
        assert ticket.begun is not None
        try:
            await asyncio.wait([ticket.begun, ticket.result], return_when=asyncio.FIRST_COMPLETED)
            if not ticket.begun.done():
                await ticket.result  # an error
            loaded = ticket.begun.result()
            canvases = Canvases(request, ticket.job, loaded.model.mask_id, loaded.config.data.shape, self._piece)
            yield canvases.begun(sampling.facts(loaded))
            try:
                while snapshots := await self._snapshots(ticket):
                    for row, snapshot in snapshots:
                        step = canvases.step(row, snapshot)
                        if step is not None:
                            yield step
                answer = self._read(ticket, await ticket.result)
            except (UserError, Broken, Lost) as error:
                yield Failed(status=status_of(error), detail=str(error))
            else:
                yield Done(answer=answer)
        finally:
            self._worker.give_up(ticket)

    @staticmethod
    async def _snapshots(ticket: Ticket) -> list[tuple[int, Snapshot]]:
        """The next snapshots; none when the request has ended and all were taken."""
        assert ticket.watch is not None
        while True:
            ended = ticket.result.done()  # all snapshots were put before
            ticket.watch.changed.clear()
            found = ticket.watch.take()
            if found or ended:
                return found
            await ticket.watch.changed.wait()

    async def score(
        self, texts: Sequence[str], draws: int = 16, seed: int = 0, label: int | None = None
    ) -> list[Score]:
        """Likelihood bounds of texts, see `Score`; sampling goes on meanwhile."""
        loaded = self.loaded
        read = await asyncio.to_thread(scoring.read_texts, loaded, texts, draws, seed, label)
        loop = asyncio.get_running_loop()
        waiter = Scoring(
            loop=loop,
            result=loop.create_future(),
            rows=len(read),
            work=scoring.score(loaded, read, draws, seed, label, self.places),
        )
        self._worker.score(waiter, max(len(text.tokens) for text in read))
        try:
            return await waiter.result
        finally:
            self._worker.give_up(waiter)

    def places(self, length: int) -> int:
        """Rows of that length that a network call takes; once the engine is ready, it is what was measured."""
        return self._worker.capacity.places(length)

    async def refresh(self, loaded: "Loaded") -> None:
        """Let new requests have other weights of the same model. Rows under way end with those that they began with.

        Raises `UserError` for another model or vocabulary, `Lost` if the engine has ended.
        """
        old = self.loaded
        if loaded.config.model != old.config.model or loaded.vocabulary.name != old.vocabulary.name:
            raise UserError(
                f"the weights of {loaded.config.name} are of another model than those of {old.config.name}: "
                "serve it under a name of its own"
            )
        loaded.model.eval()
        loop = asyncio.get_running_loop()
        waiter = Waiter(loop=loop, result=loop.create_future(), rows=0)
        self._worker.refresh(loaded, waiter)
        await waiter.result

    async def close(self, drain: bool = True) -> None:
        """End the engine; drain: once what it has accepted is answered, else that gets `Lost`."""
        await asyncio.to_thread(self._worker.close(drain).join)

    async def _submit(self, request: Request, watched: bool) -> Ticket:
        arrived, loaded = perf_counter(), self.loaded
        if len(request.prompt or "") > _LONG_PROMPT:
            job = await asyncio.to_thread(sampling.prepare, loaded, request)
        else:
            job = sampling.prepare(loaded, request)
        loop, length = asyncio.get_running_loop(), job.canvas.shape[1]
        ticket = Ticket(
            loop=loop,
            result=loop.create_future(),
            rows=len(job),
            arrived=arrived,
            request=request,
            job=job,
            first=0,
            cost=1 if request.settings.guidance == 1 else 2,
            view=min(length, job.window or length),
            watch=Watch(len(job)) if watched else None,
            begun=loop.create_future() if watched else None,
            left=len(job),
        )
        self._worker.sample(ticket)
        return ticket

    @staticmethod
    def _read(ticket: Ticket, outcome: Outcome) -> Answer:
        answer = sampling.read(outcome.loaded, ticket.request, ticket.job, outcome.samples)
        if isinstance(answer, UserError):
            raise Broken(str(answer))
        return replace(answer, queue_s=outcome.queue_s, first_token_s=outcome.first_token_s)

    def _piece(self, token: int) -> str:
        """The words of a token."""
        if token not in self._pieces:
            self._pieces[token] = self.loaded.vocabulary.decode(np.array([token]))
        return self._pieces[token]
