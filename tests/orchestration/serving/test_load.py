"""The service when everything happens at once, and when the same happens for long. Both are long forms (`slow`)."""

import asyncio
import itertools
import json
import os
import random
import signal
import statistics
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import psutil
import pytest

from md4.model import build
from orchestration.runs import Run, load_model
from orchestration.serving.app import Server, serve_run
from orchestration.serving.config import EngineConfig, ServingConfig
from tests.orchestration.serving.conftest import wait_until
from tests.orchestration.serving.processes import processes, replicas
from tests.orchestration.serving.storm import Judge, Progress, Reply, ask, mixed, storm
from tests.orchestration.small_run import disturbed, write_checkpoint, write_run

pytestmark = [pytest.mark.ray, pytest.mark.slow]

REQUESTS = int(os.environ.get("MD4_STORM_REQUESTS", "1000"))
LEAVE = 0.2  # share of requests whose clients close the connection
MINUTES = float(os.environ.get("MD4_MEMORY_MINUTES", "10"))
SETTLED = 0.3  # share of that time after which memory may grow no more
GROWTH = 0.05
CLIENTS, PERIOD_S = 8, 0.8  # each asks for one thing a period


@contextmanager
def serving(folder: Path, **changes) -> Iterator[tuple[Server, Path]]:
    """Two replicas of a small model."""
    run = write_run(folder)
    config = ServingConfig(
        port=0,
        replicas=2,
        num_cpus=0.5,
        max_ongoing=1000,
        max_queued=1000,
        engine=EngineConfig(max_rows=8, max_waiting_rows=4000),
        timeout_s=290,
        **changes,
    )
    server = serve_run(run, config)
    try:
        yield server, run
    finally:
        server.stop()


@pytest.mark.timeout(1200)
def test_nothing_is_lost_or_mixed_up_whatever_happens(ray_cluster, tmp_path):
    """Mixed requests at once; a fifth of the clients leave, a replica is killed, newer weights come.

    Every other request gets what its seed gives alone, of the weights that the answer names; or it is refused with a
    status that says so; or its stream, which had begun, ends with an error.
    """
    draw = random.Random(7)
    wishes = list(itertools.islice(mixed(seed=7), REQUESTS))
    staying = round((1 - LEAVE) * REQUESTS)
    leave = {place: draw.randrange(staying) for place in draw.sample(range(REQUESTS), REQUESTS - staying)}
    progress = Progress()

    async def kill() -> None:
        await progress.reaches(REQUESTS // 5)
        os.kill(replicas()[0].pid, signal.SIGKILL)

    async def train_on(run: Path) -> None:
        await progress.reaches(2 * REQUESTS // 5)
        own = Run(run)
        await asyncio.to_thread(write_checkpoint, own, disturbed(build(own.config.model), seed=5), 9)

    async def everything(server: Server, run: Path) -> list[Reply]:
        found, *_ = await asyncio.gather(storm(server.url, wishes, leave, progress), kill(), train_on(run))
        return found

    async def judge(replies: list[Reply], judge: Judge) -> tuple[Counter[str], list[str]]:
        verdicts, wrong = Counter[str](), []
        for reply in replies:
            try:
                verdicts[await judge.verdict(reply)] += 1
            except Exception as error:
                wrong.append(f"{reply.number} {reply.wish}: {type(error).__name__} {error}")
        await judge.close()
        return verdicts, wrong

    with serving(tmp_path, refresh_s=0.5) as (server, run):
        old = load_model(run)
        wait_until(lambda: len(replicas()) == 2, 30)
        began = time.monotonic()
        replies = asyncio.run(everything(server, run))
        took = time.monotonic() - began
        new = load_model(run)
        # It comes to itself: both replicas are there, with the new weights.
        wait_until(lambda: len(replicas()) == 2, 60)
        wait_until(lambda: httpx.get(f"{server.url}/healthz", timeout=30).json()["hash"] == new.weights_hash, 30)
        again = asyncio.run(storm(server.url, wishes[:20], {}, Progress()))
    assert sorted(reply.number for reply in replies) == sorted(f"storm-{place}" for place in range(REQUESTS))
    weights = Judge([old, new])
    verdicts, wrong = asyncio.run(judge(replies, weights))
    print(f"{took:.0f} s: {dict(verdicts)}, wrong {len(wrong)}, answers by weights {dict(weights.used)}")
    assert not wrong, "\n".join(wrong[:20])
    assert verdicts["answered"] >= 0.6 * REQUESTS
    assert set(weights.used) == {old.weights_hash, new.weights_hash}
    assert asyncio.run(judge(again, Judge([new]))) == ({"answered": 20}, [])


@pytest.mark.timeout(120 * MINUTES + 300)
def test_memory_does_not_grow(ray_cluster, tmp_path):
    """Constant mixed load: what each process of the service has for itself, after the first minutes and at the end."""
    wishes, seconds = mixed(seed=3), 60 * MINUTES
    seen: dict[psutil.Process, list[tuple[float, int]]] = {}
    replies: Counter[str] = Counter()

    async def client(http: httpx.AsyncClient, number: int, began: float) -> None:
        draw, tick = random.Random(number), began + number * PERIOD_S / CLIENTS
        while tick < began + seconds:
            await asyncio.sleep(max(0.0, tick - time.monotonic()))
            tick = max(tick + PERIOD_S, time.monotonic())
            asking = asyncio.create_task(ask(http, next(wishes), f"client-{number}"))
            if draw.random() < LEAVE:
                await asyncio.wait([asking], timeout=draw.random() * PERIOD_S)
                asking.cancel()
                await asyncio.gather(asking, return_exceptions=True)
                replies["left"] += 1
            else:
                reply = await asking
                replies[reply.failure or str(reply.status)] += 1

    async def watch(began: float) -> None:
        for number in itertools.count(1):
            now = time.monotonic() - began
            for process, values in seen.items():
                # What it shares with other processes (libraries) is theirs, too.
                values.append((now / seconds, process.memory_full_info().uss))
            await asyncio.sleep(max(0.0, began + number * seconds / 200 - time.monotonic()))

    async def main(url: str) -> None:
        began = time.monotonic()
        watching = asyncio.create_task(watch(began))
        async with httpx.AsyncClient(base_url=url, timeout=120) as http:
            await asyncio.gather(*(client(http, number, began) for number in range(CLIENTS)))
        watching.cancel()

    with serving(tmp_path) as (server, _):
        titles = processes()
        assert {"ServeController", "ProxyActor"} < set(titles.values())
        seen |= {process: [] for process in titles}
        asyncio.run(main(server.url))
        assert all(process.is_running() for process in titles), "a process ended"

    def level(process: psutil.Process, end: float) -> float:
        """MB in the five hundredths of the time before `end`."""
        return statistics.median(used for share, used in seen[process] if end - 0.05 <= share <= end) / 1e6

    found = {}
    for process, title in titles.items():
        before, after = level(process, SETTLED), level(process, 1.0)
        found[f"{title} {process.pid}"] = (round(before, 1), round(after, 1), round(after / before - 1, 4))
    print(f"requests by status {dict(replies)}; MB before, after, growth:\n{json.dumps(found, indent=1)}")
    assert set(replies) <= {"200", "left"}, replies
    assert replies["200"] > 0.5 * CLIENTS * seconds / PERIOD_S * (1 - LEAVE), "too slow to be a load"
    assert max(growth for *_, growth in found.values()) < GROWTH
