"""A model that follows a signed-off name of the registry, with the version that is tried as it beside (a canary).

The name is looked at every few seconds. A version that it stands for newly gets an engine of its own; requests under
way end with the engine that they began with. A candidate gets its share of the requests (`trial`), and when the figures
of all replicas are enough for a verdict (`canary`), one of them signs it: the candidate takes the name, or loses its
share. That is a compare-and-swap of the name as it was judged: what was changed meanwhile stays.

Whatever is wrong with a candidate, the present version's answers and the replica's health are not touched by it. A
registry that can't be reached changes nothing: the service goes on with what it has.
"""

import asyncio
import logging
from collections.abc import AsyncGenerator, Coroutine, Sequence
from contextlib import aclosing
from time import monotonic
from typing import TYPE_CHECKING, Any

from md4.errors import UserError
from orchestration.registry import Name, Registry
from orchestration.registry.registry import Moved
from orchestration.registry.words import split
from orchestration.sampling import Answer, Request
from orchestration.serving import canary, scoring, trial_record
from orchestration.serving.canary import Quality, Verdict
from orchestration.serving.config import ServingConfig
from orchestration.serving.events import Event
from orchestration.serving.held import AGAIN_S, Held, Side, look_out, placed, stop
from orchestration.serving.models import Busy, ModelInfo, Score, UnknownModel
from orchestration.serving.parts import words
from orchestration.serving.sources import load_version
from orchestration.serving.stand_in import difference, read_texts
from orchestration.serving.trial import Trial

if TYPE_CHECKING:
    from orchestration.runs import Loaded

_SCORED_AGAIN_S = 10.0  # before texts that the present version could not score are scored again
SIGNER = "md4 serve"  # who signs verdicts
_log = logging.getLogger("ray.serve")


class Following(Held):
    """See above.

    Args:
        name: under which it is served.
        state: what the name said when `loaded`, the version that it stood for, was loaded.
        texts: held-out texts that candidates have to score; none if `serving.canary.texts` is null.
        replica: an id of this process, for the figures.
    """

    def __init__(
        self,
        name: str,
        registry: Registry,
        state: Name,
        loaded: "Loaded",
        config: ServingConfig,
        texts: Sequence[str] = (),
        replica: str = "",
    ) -> None:
        self.name, self._registry, self._config = name, registry, config
        self._model, self._ref = state.model, state.name
        self._texts, self._replica = list(texts), replica
        self.present = Side(name, placed(loaded, config), config)
        self.trial: Trial | None = None
        self._scoring: asyncio.Task | None = None
        self._score_at = 0.0  # not before
        self._refused: tuple[int, float] | None = (
            None  # a version that could not be loaded, and until when it isn't again
        )
        self._one = asyncio.Lock()  # look at a time
        self._background: set[asyncio.Task] = set()
        self._looking = look_out(self, config.look_s(moves=True), at_once=state.candidate is not None)

    @classmethod
    async def open(
        cls, name: str, text: str, config: ServingConfig, registry: str | Registry | None, replica: str
    ) -> "Following":
        """The model that MODEL@NAME means. Raises `UserError` for what can't be served or, of texts, scored."""

        def read() -> tuple[Registry, Name, "Loaded", list[str]]:
            place = registry if isinstance(registry, Registry) else Registry(registry)
            model, ref = split(text)
            state = place.name(model, ref)
            loaded = load_version(place.version(model, ref if state.version is None else state.version))
            texts = read_texts(config)
            if texts:
                scoring.read_texts(loaded, texts, config.canary.draws, 0, config.canary.label)
            return place, state, loaded, texts

        place, state, loaded, texts = await asyncio.to_thread(read)
        return cls(name, place, state, loaded, config, texts, replica)

    @property
    def healthy(self) -> bool:
        return self.present.closed or self.present.engine.healthy

    async def close(self) -> None:
        stop(self._looking)
        self._end_trial()
        await self.present.close()
        await asyncio.gather(*self._background)

    def __del__(self) -> None:
        """Called by Serve, in a thread of its own, when the model makes room for another one."""
        if not self.present.closed:
            stop(self._looking)
            stop(self._scoring)
            self.present.abandon()
            if self.trial is not None:
                self.trial.side.abandon()

    # --- requests ---

    def describe(self) -> ModelInfo:
        info = self.present.engine.describe(self.name)
        return info if self.trial is None else info.model_copy(update={"candidate": self.trial.describe()})

    async def sample(self, request: Request, version: str | None) -> Answer:
        side = self._asked_for(version)
        if side is None and self.trial is not None:
            return await self.trial.sample(request, lambda: self.present)
        with (side or self.present).used() as engine:
            return await engine.sample(request)

    async def stream(self, request: Request, version: str | None) -> AsyncGenerator[Event, None]:
        side = self._asked_for(version)
        if side is None and self.trial is not None:
            async with aclosing(self.trial.stream(request, lambda: self.present)) as events:
                async for event in events:
                    yield event
            return
        with (side or self.present).used() as engine:
            async with aclosing(engine.stream(request)) as events:
                async for event in events:
                    yield event

    async def score(
        self, texts: Sequence[str], draws: int, seed: int, label: int | None, version: str | None
    ) -> list[Score]:
        """By the present version, unless another one is asked for: scores are there to be compared with each other."""
        with (self._asked_for(version) or self.present).used() as engine:
            return await engine.score(texts, draws, seed, label)

    def _asked_for(self, version: str | None) -> Side | None:
        """The side that a request asks for; None: whichever it is to get."""
        if version is None or version == self._ref:
            return None
        sides = [self.present, *([] if self.trial is None else [self.trial.side])]
        for side in sides:
            if version == str(side.version):
                return side
        allowed = ", ".join(f"{self.name}@{side.version}" for side in sides)
        raise UnknownModel(f"version {version!r} of model {self.name} is not served; allowed: {self.name}, {allowed}")

    # --- looks at the name ---

    async def refresh(self) -> None:
        async with self._one:
            state = await asyncio.to_thread(self._registry.name, self._model, self._ref)
            await self._follow(state)
            if state.candidate is not None and (self.trial is None or self.trial.change != state.history[-1].id):
                await self._try(state)
            if self.trial is not None:
                await self._judge(self.trial)

    async def _follow(self, state: Name) -> None:
        """Serve the version that the name stands for, and end a trial that is over."""
        trial = self.trial
        if state.version != self.present.version and trial is not None and state.version == trial.side.version:
            self._end_trial(close=False)
            await self._swap(trial.side)
        elif trial is not None and (state.candidate is None or state.candidate.version != trial.side.version):
            self._end_trial()
        if state.version is None or state.version == self.present.version:
            return
        if self._refused is not None and self._refused[0] == state.version and monotonic() < self._refused[1]:
            return
        try:
            side = await self._load(state.version)
        except Exception:
            self._refused = state.version, monotonic() + AGAIN_S
            raise
        await self._swap(side)

    async def _swap(self, side: Side) -> None:
        old, self.present = self.present, side
        self._in_background(old.close())
        _log.warning("model %s is version %s now, before %s", self.name, side.version, old.version)

    async def _load(self, number: int) -> Side:
        """An engine for a version beside the present one. Raises `UserError` if it can't stand in for it."""
        version = await asyncio.to_thread(self._registry.version, self._model, number)
        loaded = placed(await asyncio.to_thread(load_version, version), self._config)
        present = self.present.engine.loaded
        if (problem := difference(present, loaded)) is not None:
            raise UserError(f"{version} can't be served in the place of version {self.present.version}: {problem}")
        # Of the same network it is known how many rows a call takes.
        same = loaded.config.model == present.config.model and await self.present.ready()
        side = Side(self.name, loaded, self._config, self.present.engine.stats().places if same else None)
        if not await side.ready():
            self._in_background(side.close())
            raise RuntimeError("its engine has failed at once")
        return side

    async def _try(self, state: Name) -> None:
        """Begin with a candidate, or, if it is under way, with new figures of it."""
        assert state.candidate is not None
        trial = self.trial
        if trial is not None:
            trial.anew(state)
        else:
            try:
                side = await self._load(state.candidate.version)
            except Exception as error:
                _log.warning("model %s: version %s can't be loaded: %s", self.name, state.candidate.version, error)
                # A registry that could not be reached for a moment is no fault of the version's.
                await asyncio.to_thread(self._registry.name, self._model, self._ref)
                try:
                    side = await self._load(state.candidate.version)
                except Exception as again:
                    why = str(again) if isinstance(again, UserError) else words(again)
                    return await self._sign(state, Verdict("rollback", f"it can't be served: {why}"), {})
            trial = self.trial = Trial(state, side, self._replica, self._config.timeout_s)
        if self._texts:
            stop(self._scoring)
            self._begin_to_score(trial)

    async def _judge(self, trial: Trial) -> None:
        """Write down what was seen here, and sign the verdict on what all replicas saw, if there is one."""
        config, own = self._config.canary, trial.part
        if not trial.side.engine.healthy:
            trial.failed = trial.failed or "its engine has failed"
        if canary.fails_more(own.present, own.candidate, trial.share, config.error_alpha):
            trial.open = False  # from here on it gets nothing, even if the registry is away
        trial.record = await asyncio.to_thread(trial_record.write, self._registry, trial.state, self._replica, own)
        if trial.record is None or self.trial is not trial:
            return  # the name was changed meanwhile
        total, record = trial.record.total(), trial.record
        seconds = (self._registry.now() - record.since).total_seconds()
        verdict = canary.judge(
            total.present, total.candidate, total.quality, config, share=record.share, seconds=seconds
        )
        if verdict.action != "rollback" and trial.failed is not None:
            verdict = Verdict("rollback", f"it can't be served: {trial.failed}")
        if verdict.action != "wait":
            facts = {"against": record.present, "share": record.share, "seconds": round(seconds, 1)}
            facts["replicas"] = len(record.replicas)
            await self._sign(trial.state, verdict, {"canary": facts | total.model_dump(mode="json")})
        elif self._texts and total.quality is None:
            self._score_again(trial)

    async def _sign(self, state: Name, verdict: Verdict, figures: dict[str, Any]) -> None:
        """Have the name follow the verdict, if it still says what was judged."""
        assert state.candidate is not None
        number, registry = state.candidate.version, self._registry

        def sign() -> Name:
            if verdict.action == "confirm":
                return registry.confirm(
                    self._model, self._ref, number, why=verdict.why, by=SIGNER, figures=figures, seen=state
                )
            return registry.rollback(
                self._model, self._ref, verdict.why, version=number, by=SIGNER, figures=figures, seen=state
            )

        try:
            after = await asyncio.to_thread(sign)
        except Moved:
            return  # another replica, or a person, was faster: the next look tells
        _log.warning("model %s, version %s as %s: %s (%s)", self.name, number, self._ref, verdict.action, verdict.why)
        await self._follow(after)

    def _begin_to_score(self, trial: Trial) -> None:
        self._score_at = monotonic() + _SCORED_AGAIN_S
        self._scoring = asyncio.ensure_future(self._score(trial))

    def _score_again(self, trial: Trial) -> None:
        """Unless it is being done, was done meanwhile, or has failed just now."""
        over = self._scoring is None or self._scoring.done()
        if over and trial.part.quality is None and monotonic() >= self._score_at:
            self._begin_to_score(trial)

    async def _score(self, trial: Trial) -> None:
        """Have both versions score the held-out texts. If the present one fails with them, a later look tries again."""
        config = self._config.canary
        found: list[list[Score]] = []
        for side in (self.present, trial.side):
            while len(found) < 2:
                try:
                    with side.used() as engine:
                        found.append(await engine.score(self._texts, config.draws, 0, config.label))
                    break
                except Busy as error:
                    await asyncio.sleep(error.retry_after_s)
                except Exception as error:
                    if side is trial.side:
                        trial.failed = f"the held-out texts can't be scored: {error}"
                    else:
                        _log.warning("model %s: the held-out texts can't be scored: %s", self.name, error)
                    return
        pairs = zip(*found, strict=True)
        quality = Quality.of([new.bits_per_token - old.bits_per_token for old, new in pairs])
        trial.part = trial.part.model_copy(update={"quality": quality})

    def _end_trial(self, close: bool = True) -> None:
        trial, self.trial = self.trial, None
        if trial is not None:
            stop(self._scoring)
            if close:
                self._in_background(trial.side.close())

    def _in_background(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.ensure_future(work)
        self._background.add(task)
        task.add_done_callback(self._background.discard)
