"""The engine with real small models: what a request gets, whoever else asks, gives up, fails or waits."""

import asyncio
import random
import threading
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import aclosing, asynccontextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

from md4.errors import UserError
from md4.likelihood import nelbo
from md4.samplers import SamplingConfig
from orchestration.runs import Loaded
from orchestration.sampling import Answer, Request, answer, prepare
from orchestration.serving.config import EngineConfig
from orchestration.serving.engine import Engine
from orchestration.serving.events import Begun, Canvas, Done, Event, Failed, Step, played
from orchestration.serving.models import Broken, Busy, Local, Lost, UnknownModel
from orchestration.serving.watching import KEPT
from tests.orchestration.serving.small_model import small_images, small_model


@asynccontextmanager
async def running(loaded: Loaded, observe: Any = None, **config: Any) -> AsyncIterator[Engine]:
    engine = Engine(loaded, EngineConfig(**{"max_rows": 8, **config}), observe=observe)
    try:
        yield engine
    finally:
        await engine.close(drain=False)


async def until(condition: Callable[[], bool], seconds: float = 20) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not come to that"
        await asyncio.sleep(0.001)


def ask(prompt: str | None = None, *, count: int = 1, length: int | None = None, seed: int = 0, **settings: Any):
    return Request(prompt, count, length, seed, settings=SamplingConfig(**settings))


def alone(loaded: Loaded, requests: Sequence[Request]) -> list[Answer]:
    """What the samplers give without an engine."""
    found = answer(loaded, requests, [prepare(loaded, request) for request in requests])
    assert all(isinstance(one, Answer) for one in found)
    return found  # type: ignore[return-value]


def check(found: Sequence[Answer], expected: Sequence[Answer]) -> None:
    assert [one.samples for one in found] == [one.samples for one in expected]
    assert [(one.settings, one.model) for one in found] == [(one.settings, one.model) for one in expected]


SETTINGS: list[dict[str, Any]] = [
    {"steps": 5},
    {"steps": 300, "top_p": 0.9},
    {"sampler": "first_hitting"},
    {"sampler": "first_hitting", "steps": 6, "extrapolate": True, "correct": True},
    {"sampler": "confidence", "steps": 7, "temperature": 0.7},
    {"sampler": "entropy", "entropy_bound": 0.5},
    {"sampler": "remdm", "steps": 12, "eta": 0.2},
    {"sampler": "p2", "steps": 9},
    {"sampler": "ancestral", "steps": 8, "block": 9},
]


def mixed(number: int) -> list[Request]:
    """Requests that differ in everything."""
    found = []
    for index in range(number):
        settings = SETTINGS[index % len(SETTINGS)]
        length = 70 if "block" in settings and index % 2 else [None, 9, 17][index // 3 % 3]
        prompt = [None, "th_ _f", "a___"][index // 2 % 3]
        found.append(ask(prompt, count=1 + index % 3, length=length, seed=10 * index, **settings))
    return found


# --- what a request gets ---


def test_many_requests_that_join_and_leave_at_any_time():
    """64 requests that come one after the other, every fifth of which gives up: the others' tokens are their own."""
    loaded, requests, draw = small_model(), mixed(64), random.Random(1)
    expected = alone(loaded, requests)
    gone = set(draw.sample(range(64), 13))

    async def one(engine: Engine, index: int) -> Answer | None:
        await asyncio.sleep(0.4 * draw.random())
        task = asyncio.create_task(engine.sample(requests[index]))
        if index in gone:
            await asyncio.sleep(0.05 * draw.random())
            task.cancel()
        return (await asyncio.gather(task, return_exceptions=True))[0]  # type: ignore[return-value]

    async def main() -> None:
        async with running(loaded, max_rows=6, slice_calls=5) as engine:
            found = await asyncio.gather(*(one(engine, index) for index in range(64)))
            kept = [index for index in range(64) if isinstance(found[index], Answer)]
            assert set(range(64)) - gone <= set(kept)
            check([found[index] for index in kept], [expected[index] for index in kept])  # type: ignore[misc]
            await until(lambda: engine.stats().answered + engine.stats().cancelled == 64)
            stats = engine.stats()
            assert (stats.requests, stats.broken, stats.refused, stats.lost) == (64, 0, 0, 0)
            assert stats.rows_running == stats.rows_waiting == stats.lengths_running == 0
            assert max(stats.rows_per_call) <= 6 * 32 // 9  # as many tokens as six rows of the model's length have
            assert 0 < stats.cancelled <= 64 - len(kept)

    asyncio.run(main())


def test_an_answer_tells_how_it_came_about():
    loaded, seen = small_model(), []

    async def main() -> None:
        async with running(loaded, observe=lambda name, value: seen.append((name, value))) as engine:
            request = ask("th_ _", count=3, steps=6)
            found = await engine.sample(request)
            (expected,) = alone(loaded, [request])
            check([found], [expected])
            assert found.network_calls == expected.network_calls
            assert found.model.hash == loaded.weights_hash
            assert found.first_token_s is not None
            assert 0 <= found.queue_s <= found.first_token_s <= found.queue_s + found.seconds
            full = await engine.sample(ask("a" * 32))
            assert full.samples[0].text == "a" * 32
            assert (full.network_calls, full.first_token_s) == (0, None)

    asyncio.run(main())
    names = [name for name, _ in seen]
    assert names.count("queue_seconds") == names.count("last_token_seconds") == names.count("request_calls") == 2
    assert names.count("first_token_seconds") == 1
    assert names.count("rows_per_call") == names.count("call_seconds")
    assert {value for name, value in seen if name == "rows_per_call"} <= {1, 2, 3}


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (ask("ü"), "position 0"),
        (ask(count=0), "count is 0"),
        (ask(length=33), "need block=N"),
        (ask(sampler="thinning"), "not for models of objective md4"),
        (ask(count=73), "73 samples or texts are too many at once; allowed are 72"),
    ],
)
def test_what_cannot_be_asked_is_refused_at_once(request_, message):
    async def main() -> None:
        async with running(small_model(), max_waiting_rows=64) as engine:
            with pytest.raises(UserError, match=message):
                await engine.sample(request_)
            with pytest.raises(UserError, match=message):
                async with aclosing(engine.stream(request_)) as events:
                    await anext(events)
            assert engine.stats().requests == 0

    asyncio.run(main())


# --- who waits for whom ---


class Gate(nn.Module):
    """A network that makes a call only when it is let; remembers the first token of each row that it was shown."""

    def __init__(self, network: nn.Module):
        super().__init__()
        self.network = network
        self.allowed, self.entered = threading.Semaphore(0), threading.Semaphore(0)
        self.shown: list[list[int]] = []

    def forward(self, z, t, labels=None):
        self.shown.append(z[:, 0].tolist())
        self.entered.release()
        assert self.allowed.acquire(timeout=20)
        return self.network(z, t, labels)

    async def called(self) -> None:
        """Wait until the network has been called once more."""
        await asyncio.to_thread(self.entered.acquire)


def gated(**overrides: Any) -> tuple[Loaded, Gate]:
    loaded = small_model()
    gate = Gate(loaded.model.network)
    loaded.model.network = gate
    return loaded, gate


def test_a_cancelled_request_makes_room_at_the_next_step():
    loaded, gate = gated()

    async def main() -> None:
        async with running(loaded, max_rows=1, slice_calls=1000) as engine:
            first = asyncio.create_task(engine.sample(ask("a", seed=1)))
            await gate.called()
            second = asyncio.create_task(engine.sample(ask("b", seed=2)))
            await until(lambda: engine.stats().rows_waiting == 1)
            first.cancel()
            await asyncio.gather(first, return_exceptions=True)
            gate.allowed.release()  # the call under way; the next one is for the other
            await gate.called()
            assert gate.shown[0][0] == 0
            assert gate.shown[1][0] == 1
            gate.allowed.release(1000)
            assert (await second).samples[0].text.startswith("b")

    asyncio.run(main())


def test_a_stream_that_is_closed_makes_room_too():
    loaded, gate = gated()

    async def main() -> None:
        async with running(loaded, max_rows=1) as engine:
            async with aclosing(engine.stream(ask("a"))) as events:
                assert isinstance(await anext(events), Begun)
                await gate.called()
            gate.allowed.release(1000)
            await until(lambda: engine.stats().cancelled == 1)
            assert engine.stats().rows_running == 0

    asyncio.run(main())


def test_a_large_request_does_not_block_small_ones():
    """64 long rows hold all places; ten short requests end first, after a number of calls that knows nothing of it."""
    loaded = small_model()

    async def main() -> None:
        async with running(loaded, max_rows=8) as engine:
            large = asyncio.create_task(engine.sample(ask(count=64, sampler="first_hitting")))
            await until(lambda: engine.stats().calls > 3)
            began = engine.stats().calls
            requests = [ask(seed=seed, steps=4) for seed in range(10)]
            found = await asyncio.gather(*map(engine.sample, requests))
            assert not large.done()
            assert engine.stats().calls - began < 40
            check([*found, await large], alone(loaded, [*requests, ask(count=64, sampler="first_hitting")]))

    asyncio.run(main())


def test_more_requests_than_places_take_turns():
    """Long ones hold both places when a short one comes: it waits for a slice of calls, not for their end."""
    loaded = small_model()

    async def main() -> None:
        async with running(loaded, max_rows=2, slice_calls=4) as engine:
            requests = [ask(seed=seed, length=70, block=1) for seed in range(4)]
            long = [asyncio.create_task(engine.sample(request)) for request in requests]
            await until(lambda: engine.stats().calls > 6)
            began = engine.stats().calls
            short = await engine.sample(ask(seed=9, steps=2))
            assert engine.stats().calls - began < 30
            assert not any(task.done() for task in long)
            check([short, *[await task for task in long]], alone(loaded, [ask(seed=9, steps=2), *requests]))

    asyncio.run(main())


def test_lengths_take_turns():
    """Short texts of seven lengths beside long rows of another: they end first, whatever the long ones still need."""
    loaded = small_model()

    async def main() -> None:
        async with running(loaded) as engine:
            long = asyncio.create_task(engine.sample(ask(sampler="first_hitting", count=8, length=70, block=1)))
            await until(lambda: engine.stats().calls > 0)
            began = engine.stats().calls
            requests = [ask(length=length, seed=length, steps=3) for length in (5, 6, 7, 8, 9, 10, 5)]
            check(await asyncio.gather(*map(engine.sample, requests)), alone(loaded, requests))
            assert engine.stats().calls - began < 60
            assert not long.done()
            check([await long], alone(loaded, [ask(sampler="first_hitting", count=8, length=70, block=1)]))

    asyncio.run(main())


def test_the_queue_is_bounded():
    loaded, gate = gated()

    async def main() -> None:
        async with running(loaded, max_rows=1, max_waiting_rows=3) as engine:
            tasks = [asyncio.create_task(engine.sample(ask(seed=seed))) for seed in range(4)]
            await gate.called()
            with pytest.raises(Busy, match="too many requests are waiting") as refused:
                await engine.sample(ask(seed=5))
            assert 1 <= refused.value.retry_after_s <= 60
            with pytest.raises(Busy):
                await engine.score(["abcdefgh" * 4])
            gate.allowed.release(100_000)
            check(await asyncio.gather(*tasks), alone(small_model(), [ask(seed=seed) for seed in range(4)]))
            await engine.sample(ask(seed=5))
            assert engine.stats().refused == 2

    asyncio.run(main())


# --- what fails ---


class Sick(nn.Module):
    """A network that answers NaN, or raises, for rows that begin with "qq"; or raises for more than `most` rows."""

    def __init__(self, network: nn.Module, error: Callable[[], Exception] | None = None, most: int | None = None):
        super().__init__()
        self.network, self.error, self.most = network, error, most

    def forward(self, z, t, labels=None):
        q = "abcdefghijklmnopq".index("q")
        sick = (z[:, :2] == q).all(dim=1)
        if self.error is not None and (bool(sick.any()) if self.most is None else len(z) > self.most):
            raise self.error()
        found = self.network(z, t, labels)
        return torch.where(sick[:, None, None], torch.nan, found) if self.error is None else found


def sick(error: Callable[[], Exception] | None = None, most: int | None = None) -> Loaded:
    loaded = small_model()
    loaded.model.network = Sick(loaded.model.network, error, most)
    return loaded


@pytest.mark.parametrize(
    ("error", "message"), [(None, "NaN"), (lambda: RuntimeError("no such kernel"), "failed: RuntimeError: no such")]
)
def test_a_request_that_the_network_cannot_answer_ends_alone(error, message):
    requests = [ask(seed=seed, count=2, steps=9) for seed in range(3)]

    async def main() -> None:
        async with running(sick(error)) as engine:
            bad = [engine.sample(ask("qq", count=2)), engine.sample(ask("qq", steps=3))]
            found = await asyncio.gather(*map(engine.sample, requests), *bad, return_exceptions=True)
            check(found[:3], alone(small_model(), requests))  # type: ignore[arg-type]
            for one in found[3:]:
                assert isinstance(one, Broken)
                assert message in str(one)
            check([await engine.sample(requests[0])], alone(small_model(), requests[:1]))
            assert engine.healthy
            assert engine.stats().broken == 2
            events = [event async for event in engine.stream(ask("qq"))]
            assert [type(event) for event in events] == [Begun, Failed]
            assert (events[1].status, message in events[1].detail) == (500, True)  # type: ignore[union-attr]

    asyncio.run(main())


def test_too_little_memory_makes_calls_smaller():
    """The network takes four rows at most: after a call that failed no call is as large again, and nobody notices."""
    requests = [ask(seed=seed, count=4, **SETTINGS[seed % 8]) for seed in range(8)]
    loaded = sick(lambda: torch.OutOfMemoryError("out of memory"), most=4)

    async def main() -> None:
        async with running(loaded, max_rows=16) as engine:
            check(await asyncio.gather(*map(engine.sample, requests)), alone(small_model(), requests))
            stats = engine.stats()
            assert 1 <= stats.failed_calls <= 3
            assert stats.broken == 0

    asyncio.run(main())


def test_when_the_device_is_lost_nobody_waits_for_ever():
    loaded = sick(lambda: torch.AcceleratorError("device-side assert"))

    async def main() -> None:
        async with running(loaded) as engine:
            found = await asyncio.gather(
                engine.sample(ask("qq")), engine.sample(ask(count=3)), engine.score(["abc"]), return_exceptions=True
            )
            assert isinstance(found[0], Lost)
            assert "AcceleratorError" in str(found[0])
            await until(lambda: not engine.healthy)
            with pytest.raises(Lost, match="has failed"):
                await engine.sample(ask())
            assert engine.stats().healthy is False

    asyncio.run(main())


# --- other weights, the end ---


def test_other_weights_in_the_middle():
    """Who has begun ends with the old weights, all rows of it; who waits or comes gets the new ones."""
    old, new = small_model(), small_model(seed=5, step=9)
    before, waited, after = ask(count=3, seed=1), ask(count=2, seed=50, steps=5), ask(seed=2)

    async def main() -> None:
        async with running(old, max_rows=1, slice_calls=1000) as engine:
            first = asyncio.create_task(engine.sample(before))
            await until(lambda: engine.stats().calls > 0)
            second = asyncio.create_task(engine.sample(waited))
            await until(lambda: engine.stats().requests_waiting == 1)
            await engine.refresh(new)
            assert engine.describe("m").hash == new.weights_hash
            check([await engine.sample(after), await second], alone(new, [after, waited]))
            check([await first], alone(old, [before]))
            await until(lambda: len(engine._worker._weights) == 1)
            with pytest.raises(UserError, match="of another model"):
                await engine.refresh(small_model("data.length=16"))
            assert engine.stats().refreshes == 1

    asyncio.run(main())


def test_the_end_comes_after_what_was_accepted():
    loaded, requests = small_model(), mixed(12)

    async def main() -> None:
        async with running(loaded, max_rows=4) as engine:
            tasks = [asyncio.create_task(engine.sample(request)) for request in requests]
            await until(lambda: engine.stats().requests == 12)
            closing = asyncio.create_task(engine.close())
            await asyncio.sleep(0)
            with pytest.raises(Lost, match="shut down"):
                await engine.sample(ask())
            await closing
            check([await task for task in tasks], alone(loaded, requests))
            assert not engine.healthy

    asyncio.run(main())


def test_the_end_without_delay_is_told():
    loaded, gate = gated()

    async def main() -> None:
        async with running(loaded, max_rows=1) as engine:
            tasks = [asyncio.create_task(engine.sample(ask(seed=seed))) for seed in range(3)]
            await gate.called()
            closing = asyncio.create_task(engine.close(drain=False))
            await asyncio.sleep(0.01)
            gate.allowed.release(100)
            await closing
            found = await asyncio.gather(*tasks, return_exceptions=True)
            assert [type(one) for one in found] == [Lost] * 3

    asyncio.run(main())


# --- watching ---


async def watched(engine: Engine, request: Request) -> tuple[Begun, list[Step], Answer]:
    events: list[Event] = [event async for event in engine.stream(request)]
    begun, *steps, done = events
    assert isinstance(begun, Begun)
    assert isinstance(done, Done)
    assert all(isinstance(step, Step) for step in steps)
    return begun, steps, done.answer  # type: ignore[return-value]


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_events_played_back_are_the_sample(settings):
    loaded = small_model()
    request = ask("th_ _f", count=3, length=40 if "block" in settings else None, seed=3, **settings)

    async def main() -> None:
        async with running(loaded) as engine:
            (begun, steps, found), *_ = await asyncio.gather(watched(engine, request), engine.sample(ask(count=4)))
            (expected,) = alone(loaded, [request])
            check([found], [expected])
            start = Canvas(seed=3, canvas=[*"th", None, " ", None, "f", *[None] * (len(begun.samples[0].canvas) - 6)])
            assert begun.samples == [start, replace_seed(start, 4), replace_seed(start, 5)]
            assert ["".join(map(str, row)) for row in played(begun, steps)] == [s.text for s in expected.samples]
            for row in range(3):
                calls = [step.call for step in steps if step.sample == row]
                assert calls == sorted(set(calls))
                assert set(calls) <= set(range(expected.samples[row].calls))
                if settings.get("sampler") not in ("remdm", "p2"):
                    revealed = [place for step in steps if step.sample == row for place in step.positions]
                    assert set(revealed) >= set(range(6, 32)) | {2, 4}
            if settings.get("sampler") in ("remdm", "p2"):
                assert any(step.hidden for step in steps)

    asyncio.run(main())


def replace_seed(canvas: Canvas, seed: int) -> Canvas:
    return canvas.model_copy(update={"seed": seed})


def test_events_of_a_text_that_stops():
    loaded = small_model()
    request = replace(ask(count=6, sampler="first_hitting"), stop="e")

    async def main() -> None:
        async with running(loaded) as engine:
            begun, steps, found = await watched(engine, request)
            check([found], alone(loaded, [request]))
            assert any(sample.stopped for sample in found.samples)
            for row, sample in zip(played(begun, steps), found.samples, strict=True):
                assert "".join(map(str, row[: len(sample.text)])) == sample.text

    asyncio.run(main())


def test_events_of_images():
    loaded = small_images()
    shape = loaded.config.data.shape
    assert shape is not None
    request = ask("3 _{40}", seed=4, steps=5)

    async def main() -> None:
        async with running(loaded) as engine:
            begun, steps, found = await watched(engine, request)
            assert begun.shape == shape
            assert begun.samples[0].canvas == [3, *[None] * (loaded.config.model.length - 1)]
            (row,) = played(begun, steps)
            assert " ".join(map(str, row)) == found.samples[0].text
            assert all(step.pieces is None for step in steps)

    asyncio.run(main())


def test_a_slow_reader_slows_nobody_and_misses_nothing_but_steps():
    loaded = small_model()
    request = ask(count=2, seed=1, sampler="first_hitting")

    async def main() -> None:
        async with running(loaded) as engine:
            async with aclosing(engine.stream(request)) as events:
                begun = await anext(events)
                assert isinstance(begun, Begun)
                await engine.sample(ask(seed=7))
                await until(lambda: engine.stats().answered == 2)  # while nobody reads
                rest = [event async for event in events]
            *steps, done = rest
            assert isinstance(done, Done)
            check([done.answer], alone(loaded, [request]))
            assert len(steps) <= 2 * KEPT < 2 * 32
            rows = played(begun, steps)  # type: ignore[arg-type]
            assert ["".join(map(str, row)) for row in rows] == [sample.text for sample in done.answer.samples]

    asyncio.run(main())


# --- scores ---


def test_scores_are_the_likelihoods_whatever_else_is_asked():
    """Texts of several lengths, more than a call takes, scored while the engine samples, and again one by one."""
    loaded = small_model()
    texts = ["the cat sat on the mat", "a", "another one", "the cat sat on the hat", "z" * 32, "another man"]

    async def main() -> None:
        async with running(loaded, max_rows=1) as engine:
            found, _ = await asyncio.gather(engine.score(texts, 4, 11), engine.sample(ask(count=4)))
            for text, score in zip(texts, found, strict=True):
                tokens = torch.from_numpy(loaded.vocabulary.encode(text).astype("int64"))[None]
                nats = nelbo(loaded.model, tokens, draws=4, seed=11, ids=torch.zeros(1, dtype=torch.int64))[0]
                assert score.nats == float(nats.mean())
                assert score.nats_error == pytest.approx(float(nats.std() / 2))
                bits = float(nats.mean()) / len(text) / 0.6931471805599453
                assert score.bits_per_token == score.bits_per_character == pytest.approx(bits)
                assert (score.draws, score.seed, score.tokens, score.characters) == (4, 11, len(text), len(text))
                assert (score.estimator, score.model.hash) == ("mask_count", loaded.weights_hash)
            assert [(await engine.score([text], 4, 11))[0] for text in texts] == found
            assert (await engine.score(texts[:1], 1))[0].nats_error is None
            assert engine.stats().scored == 13

    asyncio.run(main())


def test_scores_of_images_and_of_single_documents():
    images = small_images()
    pixels = " ".join(str(place % 17) for place in range(images.config.model.length))

    async def main() -> None:
        async with running(images) as engine:
            (score,) = await engine.score([pixels], 2)
            assert (score.bits_per_character, score.tokens) == (None, images.config.model.length)
            with pytest.raises(UserError, match=r"texts\[1\]: an image of this model has"):
                await engine.score([pixels, "1 2 3"])

    asyncio.run(main())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([], 4, 0, None), "no text"),
        ((["a", "Z"], 4, 0, None), r"texts\[1\]: text: character 'Z' at position 0"),
        ((["a" * 33], 4, 0, None), "33 tokens; allowed are 1 to 32"),
        (([""], 4, 0, None), "0 tokens"),
        ((["a"], 0, 0, None), "draws is 0"),
        ((["a"], 4, -1, None), "seed is -1"),
        ((["a"], 4, 0, 2), "this model has no classes"),
        ((["\ud800"], 4, 0, None), "not proper Unicode"),
    ],
)
def test_what_cannot_be_scored_is_named(arguments, message):
    async def main() -> None:
        async with running(small_model()) as engine:
            with pytest.raises(UserError, match=message):
                await engine.score(*arguments)

    asyncio.run(main())


def test_a_score_that_the_network_cannot_give():
    async def main() -> None:
        async with running(sick()) as engine:
            # Of many tokens some draw leaves both letters visible.
            found = await asyncio.gather(
                engine.score(["qq" + "a" * 30], 16), engine.score(["abc"]), return_exceptions=True
            )
            assert isinstance(found[0], Broken)
            assert not isinstance(found[1], BaseException)

    asyncio.run(main())


# --- several models ---


def test_models_by_name():
    first, second = small_model(), small_model(seed=3)

    async def main() -> None:
        async with running(first) as one, running(second) as two:
            models = Local({"one": one, "two": two})
            described = await models.describe()
            assert [(info.name, info.hash) for info in described] == [
                ("one", first.weights_hash),
                ("two", second.weights_hash),
            ]
            assert described[0].samplers["p2"] == ["steps", "eta"]
            check([await models.sample(None, ask()), await models.sample("two", ask())], [
                *alone(first, [ask()]), *alone(second, [ask()]),
            ])  # fmt: skip
            events = [event async for event in models.stream("two", ask())]
            assert isinstance(events[-1], Done)
            assert (await models.score("one", ["abc"], 2, 0, None))[0].model.hash == first.weights_hash
            with pytest.raises(UnknownModel, match="model 'three' is not served; allowed: one, two"):
                await models.sample("three", ask())

    asyncio.run(main())
