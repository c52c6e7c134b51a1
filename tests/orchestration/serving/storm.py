"""Many clients at once: mixed requests, what a client sees of each, and whether that is what the weights give."""

import asyncio
import json
import random
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import httpx
import pytest

from md4.samplers import wording
from orchestration.runs import Loaded
from orchestration.sampling import Answer, Request, answer, prepare
from orchestration.serving.config import EngineConfig
from orchestration.serving.engine import Engine
from orchestration.serving.events import Begun, Step, played
from tests.orchestration.small_run import LENGTH

KINDS = {"samples": 0.35, "stream": 0.25, "completion": 0.15, "completion stream": 0.1, "score": 0.15}
ROUTES = {"samples": "/v1/samples", "stream": "/v1/samples", "score": "/v1/score"}  # the others: /v1/completions
SETTINGS: list[dict[str, Any]] = [
    {},
    {"steps": 5},
    {"steps": 40, "top_p": 0.9},
    {"sampler": "first_hitting", "steps": None},
    {"sampler": "confidence", "steps": 7, "temperature": 0.7},
    {"sampler": "remdm", "steps": 12, "eta": 0.2},
    {"sampler": "p2", "steps": 9},
]
WORDS = ["the", "of a", "some text that", "one _{3} of", "a _ b _ c"]


@dataclass(frozen=True)
class Wish:
    """A request that a client makes."""

    kind: str
    body: dict[str, Any]

    @property
    def route(self) -> str:
        return ROUTES.get(self.kind, "/v1/completions")

    def request(self, loaded: Loaded) -> Request:
        """The same in the terms of the sampler; not of a score."""
        body = self.body
        settings = wording.change(loaded.config.sampling, body["sampling"])
        if "max_tokens" in body:
            own = {name: body[name] for name in ("prompt", "suffix", "seed")}
            return Request(count=body["n"], fill=body["max_tokens"], literal=True, settings=settings, **own)
        own = {name: body[name] for name in ("prompt", "count", "length", "seed")}
        return Request(settings=settings, **own)


def mixed(seed: int) -> Iterator[Wish]:
    """Requests without end, each with a seed of its own."""
    draw, number = random.Random(seed), 0
    while True:
        number += 10  # samples of one request count up from its seed
        kind = draw.choices(list(KINDS), list(KINDS.values()))[0]
        own: dict[str, Any] = {"seed": 1_000_000 * seed + number}
        if kind == "score":
            own |= {"texts": ["".join(draw.choices("abc ", k=draw.randint(3, LENGTH)))], "draws": draw.randint(1, 6)}
        else:
            own["sampling"] = draw.choice(SETTINGS)
            count, words = draw.randint(1, 3), draw.choice(WORDS)
            if kind.startswith("completion"):
                words = words.replace("_", "").replace("{3}", "")
                own |= {"prompt": words, "max_tokens": draw.randint(1, 12), "n": count}
                own["suffix"] = draw.choice([None, " end"])
            else:
                length = draw.choice([16, 20, 24, LENGTH])
                own |= {"prompt": draw.choice([None, words]), "count": count, "length": length}
            if kind.endswith("stream"):
                own["stream"] = True
        yield Wish(kind, own)


@dataclass
class Reply:
    """What a client saw."""

    wish: Wish
    number: str  # the request's id
    status: int = 0
    headers: httpx.Headers = field(default_factory=httpx.Headers)
    body: Any = None
    events: list[Any] = field(default_factory=list)  # of a stream
    left: bool = False  # the client closed the connection
    failure: str | None = None  # of the connection


async def ask(client: httpx.AsyncClient, wish: Wish, number: str) -> Reply:
    """The whole answer to a request; a stream is read to its end."""
    reply = Reply(wish, number)
    try:
        async with client.stream("POST", wish.route, json=wish.body, headers={"x-request-id": number}) as response:
            reply.status, reply.headers = response.status_code, response.headers
            if "event-stream" in response.headers.get("content-type", ""):
                async for line in response.aiter_lines():
                    if line.startswith("data: "):
                        data = line.removeprefix("data: ")
                        reply.events.append(data if data == "[DONE]" else json.loads(data))
            else:
                reply.body = json.loads(await response.aread())
    except (httpx.HTTPError, ValueError) as error:
        reply.failure = repr(error)
    return reply


class Progress:
    """How many requests have come to an end, and who waits for that."""

    def __init__(self) -> None:
        self.ended = 0
        self._waiting: list[tuple[int, asyncio.Future[None]]] = []

    async def reaches(self, number: int) -> None:
        if self.ended < number:
            future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            self._waiting.append((number, future))
            await future

    def one_more(self) -> None:
        self.ended += 1
        for number, future in self._waiting:
            if number == self.ended and not future.done():
                future.set_result(None)


async def storm(url: str, wishes: Sequence[Wish], leave: dict[int, int], progress: Progress) -> list[Reply]:
    """All requests at once. leave: of those that don't wait for the end, how many others have ended when they leave."""
    replies: list[Reply] = []

    async def one(client: httpx.AsyncClient, place: int, wish: Wish) -> None:
        number = f"storm-{place}"
        asking = asyncio.create_task(ask(client, wish, number))
        if place in leave:
            moment = asyncio.create_task(progress.reaches(leave[place]))
            await asyncio.wait([asking, moment], return_when=asyncio.FIRST_COMPLETED)
            moment.cancel()
            if not asking.done():
                asking.cancel()  # closes the connection
        await asyncio.wait([asking])
        replies.append(Reply(wish, number, left=True) if asking.cancelled() else asking.result())
        progress.one_more()

    async with asyncio.TaskGroup() as group:
        # Some clients for all: one would look through all of its connections at each turn.
        places = list(enumerate(wishes))
        for first in range(0, len(places), 50):
            group.create_task(_with_client(url, places[first : first + 50], one))
    return replies


async def _with_client(url: str, part: Sequence[tuple[int, Wish]], one: Any) -> None:
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=0)
    async with httpx.AsyncClient(base_url=url, timeout=300, limits=limits) as client:
        await asyncio.gather(*(one(client, place, wish) for place, wish in part))


class Judge:
    """Knows what each request gets of some weights, alone and without a service."""

    def __init__(self, weights: Sequence[Loaded]) -> None:
        self.weights = {loaded.weights_hash: loaded for loaded in weights}
        self.used: Counter[str] = Counter()  # answers by the weights that gave them
        self._engines: dict[str, Engine] = {}

    async def verdict(self, reply: Reply) -> str:
        """How the request ended, in a word; AssertionError if it may not end so."""
        if reply.left:
            return "left"
        assert reply.failure is None, reply.failure
        numbers = set(reply.headers.get_list("x-request-id"))  # Serve's proxy adds its own
        assert numbers == {reply.number}, f"the answer to {numbers}"
        if reply.status != 200:
            assert reply.status in (429, 503, 504), (reply.status, reply.body)
            assert reply.status == 504 or int(reply.headers["retry-after"]) >= 1, reply.headers
            return f"refused {reply.status}"
        if reply.wish.kind == "samples":
            await self._check_samples(reply.wish, reply.body)
        elif reply.wish.kind == "stream":
            return await self._stream(reply)
        elif reply.wish.kind == "completion":
            found = {choice["index"]: choice["text"] for choice in reply.body["choices"]}
            assert len(found) == len(reply.body["choices"])
            await self._check_completion(reply.wish, reply.body["system_fingerprint"], found)
        elif reply.wish.kind == "completion stream":
            return await self._completion_stream(reply)
        else:
            await self._check_score(reply.wish, reply.body["scores"])
        return "answered"

    async def _check_samples(self, wish: Wish, body: dict[str, Any]) -> None:
        found = await self._alone(wish, body["model"]["hash"])
        assert body["samples"] == [{**sample.model_dump(mode="json"), "png": None} for sample in found.samples]

    async def _stream(self, reply: Reply) -> str:
        types = [event["type"] for event in reply.events]
        assert set(types[1:-1]) <= {"step"}, types
        if types[-1] == "error":
            assert reply.events[-1]["status"] == 503, reply.events[-1]
            return "ended by an error event"
        assert (types[0], types[-1]) == ("begun", "done"), types
        begun = Begun.model_validate(reply.events[0])
        final = reply.events[-1]["answer"]
        await self._check_samples(reply.wish, final)
        assert final["model"] == begun.model.model_dump()
        steps = [Step.model_validate(event) for event in reply.events[1:-1]]
        texts = ["".join(map(str, canvas)) for canvas in played(begun, steps)]
        assert texts == [sample["text"] for sample in final["samples"]]
        return "answered"

    async def _completion_stream(self, reply: Reply) -> str:
        last = reply.events[-1]
        if last != "[DONE]":
            assert last["error"]["type"] == "server_error", last
            return "ended by an error event"
        chunks = reply.events[:-1]
        texts: dict[int, str] = {}
        for choice in (choice for chunk in chunks for choice in chunk["choices"]):
            texts[choice["index"]] = texts.get(choice["index"], "") + choice["text"]
        ends = [choice["index"] for chunk in chunks for choice in chunk["choices"] if choice["finish_reason"]]
        assert sorted(ends) == sorted(texts), "each choice ends once"
        (weights,) = {chunk["system_fingerprint"] for chunk in chunks}
        await self._check_completion(reply.wish, weights, texts)
        return "answered"

    async def _check_completion(self, wish: Wish, fingerprint: str, texts: dict[int, str]) -> None:
        (weights,) = [name for name in self.weights if name.startswith(fingerprint.removeprefix("fp_"))]
        expected = await self._alone(wish, weights)
        assert texts == dict(enumerate(sample.completion for sample in expected.samples))

    async def _check_score(self, wish: Wish, scores: list[dict[str, Any]]) -> None:
        weights = scores[0]["model"]["hash"]
        self.used[weights] += 1
        if weights not in self._engines:
            self._engines[weights] = Engine(self.weights[weights], EngineConfig(max_rows=8))
        body = wish.body
        expected = await self._engines[weights].score(body["texts"], body["draws"], body["seed"])
        assert [one["nats"] for one in scores] == pytest.approx([one.nats for one in expected], rel=1e-4)
        assert [one["seed"] for one in scores] == [one.seed for one in expected]

    async def _alone(self, wish: Wish, weights: str) -> Answer:
        loaded = self.weights[weights]
        self.used[weights] += 1
        request = wish.request(loaded)
        (found,) = answer(loaded, [request], [prepare(loaded, request)])
        assert isinstance(found, Answer)
        return found

    async def close(self) -> None:
        for engine in self._engines.values():
            await engine.close()
