"""What sampling step by step in company is worth: the engine against batches that end as one, and against no service.

    python -m tests.benchmarks.bench_engine [ROUNDS, 3] [SECONDS of load, 30]       about 10 minutes on two idle cores

*Overhead*: one client asks for one text after the other, of a network that costs nothing: `engine.sample` against
`orchestration.sampling.answer`, interleaved text by text; p50 in ms of each, and their difference. Goal: < 10 ms.

*Load*: requests come by a Poisson process, whether or not earlier ones were answered: 80 % short (32 tokens, 8 steps),
15 % middling (64 tokens, 64 steps, two samples), 5 % long (128 tokens, 256 steps, four samples), each with its own
seed. The engine, and batches until done as a service that gathers requests makes them: up to 16 requests that came
while the last batch ran, or within 10 ms, are sampled together, and the batch ends with its longest. Same model,
samplers and requests. 100 % is what the batches manage when always full. Latency counts from the moment a request was
due. Goal: p99 of short requests at equal load three times lower, or twice the throughput.
"""

import asyncio
import os
import random
import statistics
import sys
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from md4.errors import UserError
from md4.model import build
from md4.objectives import MD4
from md4.samplers import SamplingConfig
from md4.schedules import parse_schedule
from orchestration.config import load
from orchestration.runs import Loaded
from orchestration.sampling import Answer, Request, answer, prepare
from orchestration.serving.config import EngineConfig
from orchestration.serving.engine import Engine
from orchestration.serving.models import Busy
from tests.benchmarks.harness import Benchmark

LOADS = (0.5, 0.8, 1.2)
TEXTS = 100  # of the overhead, a round
KINDS = (
    ("short", 0.80, Request(length=32, settings=SamplingConfig(steps=8))),
    ("middling", 0.15, Request(length=64, count=2, settings=SamplingConfig(steps=64))),
    ("long", 0.05, Request(length=128, count=4, settings=SamplingConfig(steps=256))),
)


class _Free(nn.Module):
    """A network that costs nothing: every token is as likely as any other."""

    def __init__(self, vocabulary: int):
        super().__init__()
        self.flat = nn.Parameter(torch.zeros(1, 1, vocabulary), requires_grad=False)

    def forward(self, z: Tensor, t: Tensor, labels: Tensor | None = None) -> Tensor:
        return self.flat.expand(*z.shape, -1)


def model(free: bool = False) -> Loaded:
    """The demo's network with random weights, or one that costs nothing."""
    config = load("pydocs-tiny", ["data.length=128"])
    made = build(config.model)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in made.parameters():  # a fresh head is 0
            parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
    if free:
        made = MD4(_Free(config.model.vocab_size), parse_schedule("linear"), config.model.vocab_size)
    return Loaded(made.eval(), config.data.tokens, config, 0, "random", Path("nowhere"))


# --- overhead ---


async def overhead(loaded: Loaded) -> dict[str, float]:
    """p50 in ms of a text directly and by the engine."""
    engine, seconds = Engine(loaded, EngineConfig(max_rows=64)), {"direct": [], "engine": []}
    for seed in range(TEXTS):
        request = Request(length=64, seed=seed, settings=SamplingConfig(steps=64))
        for name in ("direct", "engine") if seed % 2 else ("engine", "direct"):
            began = time.perf_counter()
            if name == "engine":
                await engine.sample(request)
            else:
                answer(loaded, [request], [prepare(loaded, request)])
            seconds[name].append(time.perf_counter() - began)
    await engine.close()
    return {name: 1e3 * statistics.median(values) for name, values in seconds.items()}


# --- load ---


@dataclass
class UntilDone:
    """Gathers requests and samples them together until the last one is done, then the next ones."""

    loaded: Loaded
    most: int = 16
    wait_s: float = 0.010
    _waiting: "asyncio.Queue[tuple[Request, asyncio.Future[Answer]]]" = field(default_factory=asyncio.Queue)

    async def sample(self, request: Request) -> Answer:
        future: asyncio.Future[Answer] = asyncio.get_running_loop().create_future()
        await self._waiting.put((request, future))
        return await future

    async def work(self) -> None:
        while True:
            batch = [await self._waiting.get()]
            end = time.perf_counter() + self.wait_s
            while len(batch) < self.most:
                try:
                    batch.append(await asyncio.wait_for(self._waiting.get(), max(0.0, end - time.perf_counter())))
                except TimeoutError:
                    break
            requests = [request for request, _ in batch]
            jobs = [prepare(self.loaded, request) for request in requests]
            for (_, future), found in zip(
                batch, await asyncio.to_thread(answer, self.loaded, requests, jobs), strict=True
            ):
                assert not isinstance(found, UserError)
                future.set_result(found)


def arrivals(rate: float, seconds: float, seed: int) -> list[tuple[float, str, Request]]:
    """When each request is due, its kind, and the request."""
    draw, found, now = random.Random(seed), [], 0.0
    while (now := now + draw.expovariate(rate)) < seconds:
        name, _, request = draw.choices(KINDS, [share for _, share, _ in KINDS])[0]
        found.append((now, name, replace(request, seed=draw.randrange(2**31))))
    return found


@dataclass
class Load:
    """What came of one run of load."""

    latency: dict[str, list[float]]  # seconds, by kind
    refused: int
    rate: float  # answers a second, until the last one was there

    def quantile(self, kind: str, share: float) -> float:
        """In ms."""
        ordered = sorted(self.latency[kind]) or [float("nan")]
        return 1e3 * ordered[min(len(ordered) - 1, int(share * len(ordered)))]


async def drive(sample: Callable[[Request], Awaitable[Answer]], due: list[tuple[float, str, Request]]) -> Load:
    """Ask for everything when it is due."""
    latency: dict[str, list[float]] = {name: [] for name, _, _ in KINDS}
    began, refused = time.perf_counter(), 0

    async def one(at: float, name: str, request: Request) -> None:
        nonlocal refused
        await asyncio.sleep(max(0.0, began + at - time.perf_counter()))
        try:
            await sample(request)
        except Busy:
            refused += 1
        else:
            latency[name].append(time.perf_counter() - began - at)

    await asyncio.gather(*(one(*entry) for entry in due))
    return Load(latency, refused, sum(map(len, latency.values())) / (time.perf_counter() - began))


async def with_engine(loaded: Loaded, due: list[tuple[float, str, Request]], rows: int | None) -> Load:
    engine = Engine(loaded, EngineConfig(max_rows=rows, max_waiting_rows=100_000))
    while not engine.stats().ready:
        await asyncio.sleep(0.01)
    try:
        return await drive(engine.sample, due)
    finally:
        await engine.close()


async def with_batches(loaded: Loaded, due: list[tuple[float, str, Request]]) -> Load:
    service = UntilDone(loaded)
    worker = asyncio.create_task(service.work())
    try:
        return await drive(service.sample, due)
    finally:
        worker.cancel()


def full_rate(loaded: Loaded, seconds: float) -> float:
    """Requests a second that batches manage when all came at once."""
    number = 32
    while True:
        due = [(0.0, name, request) for _, name, request in arrivals(number, 1.0, seed=9)]
        found = asyncio.run(with_batches(loaded, due))
        if len(due) / found.rate > seconds:
            return found.rate
        number *= 2


def main() -> None:
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 3
    seconds = float(sys.argv[2]) if len(sys.argv) > 2 else 30.0
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS") or 1))
    benchmark = Benchmark("engine", "ms", baseline="overhead, direct", higher_is_better=False)
    free, loaded = model(free=True), model()
    full = full_rate(loaded, min(10.0, seconds))
    probe = Engine(loaded)
    while not probe.stats().ready:
        time.sleep(0.01)
    places = probe.stats().places
    asyncio.run(probe.close())
    benchmark.notes["100 % of the load, requests a second"] = round(full, 2)
    benchmark.notes["places of the engine, measured"] = places
    benchmark.notes["threads"] = torch.get_num_threads()

    for number in range(rounds):
        figures: dict[str, float] = {}
        found = asyncio.run(overhead(free))
        figures |= {f"overhead, {name}": value for name, value in found.items()}
        details: dict[str, Any] = {"overhead ms": round(found["engine"] - found["direct"], 3)}
        for share in LOADS:
            due = arrivals(share * full, seconds, seed=number)
            systems: dict[str, Callable[[], Any]] = {
                "batches": lambda due=due: with_batches(loaded, due),
                "engine": lambda due=due: with_engine(loaded, due, places),
            }
            for name in list(systems) if number % 2 else reversed(list(systems)):
                result: Load = asyncio.run(systems[name]())
                figures[f"{share:.0%}, {name}: p99 of short requests"] = result.quantile("short", 0.99)
                details[f"{share:.0%}, {name}"] = {
                    "requests a second": round(result.rate, 2),
                    "refused": result.refused,
                    **{
                        f"{kind} p{round(100 * q)} ms": round(result.quantile(kind, q), 1)
                        for kind, _, _ in KINDS
                        for q in (0.5, 0.99)
                    },
                }
                print(f"round {number + 1}/{rounds}  {share:.0%} {name}: {details[f'{share:.0%}, {name}']}", flush=True)
        benchmark.rounds.append(figures)
        benchmark.notes[f"round {number + 1}"] = details
    for share in LOADS:
        one, other = (f"{share:.0%}, {name}: p99 of short requests" for name in ("engine", "batches"))
        benchmark.goals[one] = (other, None)  # type: ignore[assignment]  # the smaller, the better
    benchmark.report()


if __name__ == "__main__":
    main()
