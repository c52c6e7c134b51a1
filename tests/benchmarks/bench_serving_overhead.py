"""What the service adds to a call of the sampler, and where.

    python -m tests.benchmarks.bench_serving_overhead [--rounds 300]        about 3 minutes on two idle cores

One client asks for one text after the other, of a network that costs nothing (`serving.free`): of the sampler in this
process, and of what is built around it, layer by layer - the engine in this process; the engine behind HTTP in a
process of its own, without Ray; a replica of the engine through Ray Serve's handle (`orchestration.serving.Client`);
and the whole service, through proxy, gateway and replica. Beside it stands what Ray Serve takes for proxy, gateway and
replica that do nothing (`serving.bare`). Interleaved text by text. Every text has 64 tokens: in one
step, which is the request's own overhead, and in 64, which adds that of steps. Goal: less than 10 ms added, p50.
"""

import argparse
import asyncio
import http.client
import json
import logging
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch
from ray import serve
from rich.console import Console
from rich.table import Table

from orchestration.cluster import cluster
from orchestration.runs import Loaded
from orchestration.sampling import Request, answer, prepare
from orchestration.serving import Client
from orchestration.serving.app import free_port, serve_run
from orchestration.serving.config import ServingConfig
from orchestration.serving.engine import Engine
from tests.benchmarks.harness import RESULTS, machine
from tests.benchmarks.serving import bare, free
from tests.orchestration.serving.processes import processes
from tests.orchestration.small_run import write_run

LENGTH, STEPS, GOAL_MS = 64, (1, 64), 10.0
WARM_UP = 20  # rounds that don't count
DIRECT, SERVICE, BARE = "sampler", "service over HTTP", "Ray Serve alone, over HTTP"

Ask = Callable[[Request], Awaitable[Any]]


class Connection:
    """An HTTP client that costs as little as there is, with one connection that stays open."""

    def __init__(self, port: int) -> None:
        self._connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
        self.timings: list[dict[str, float]] = []  # as the service tells them

    def _post(self, path: str, request: Request) -> dict[str, Any]:
        body = {"length": request.length, "seed": request.seed, "sampling": {"steps": request.settings.steps}}
        self._connection.request("POST", path, json.dumps(body), {"content-type": "application/json"})
        response = self._connection.getresponse()
        found = json.loads(response.read())
        assert response.status == 200, found
        return found

    async def ask_nothing(self, request: Request) -> None:
        """Of an application that samples nothing."""
        assert self._post(f"{bare.PREFIX}/v1/samples", request)["seed"] == request.seed

    async def ask(self, request: Request) -> str:
        found = self._post("/v1/samples", request)
        self.timings.append(found["timings"])
        return found["samples"][0]["text"]


@asynccontextmanager
async def process(run: Path) -> AsyncIterator[Connection]:
    """The engine behind HTTP, without Ray."""
    port = free_port("127.0.0.1", 0)
    command = [sys.executable, "-m", "tests.benchmarks.serving.free", str(run), str(port)]
    server = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    try:
        while True:
            try:
                http.client.HTTPConnection("127.0.0.1", port).request("GET", "/healthz")
                break
            except ConnectionRefusedError:
                assert server.poll() is None, "the server has ended"
                await asyncio.sleep(0.2)
        yield Connection(port)
    finally:
        server.terminate()
        server.wait()


async def measure(ways: dict[str, Ask], loaded: Loaded, steps: int, rounds: int) -> dict[str, list[float]]:
    """Seconds of each way, round by round."""
    settings = loaded.config.sampling.changed({"steps": steps})
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    names = list(ways)
    for number in range(-WARM_UP, rounds):
        request, texts = Request(length=LENGTH, seed=number + WARM_UP, settings=settings), set()
        start = number % len(names)
        for name in names[start:] + names[:start]:
            began = time.perf_counter()
            found = await ways[name](request)
            if number >= 0:
                seconds[name].append(time.perf_counter() - began)
            if found is not None:
                texts.add(found if isinstance(found, str) else found.samples[0].text)
        assert len(texts) == 1, texts
    return seconds


async def processor(ask: Ask, loaded: Loaded, steps: int, rounds: int) -> dict[str, float]:
    """Milliseconds of processor time that each process of the service spends on a request."""

    def used() -> dict[str, float]:
        found: dict[str, float] = {}
        for process, title in processes().items():
            found[title] = found.get(title, 0.0) + sum(process.cpu_times()[:2])
        return found

    settings, before = loaded.config.sampling.changed({"steps": steps}), used()
    for seed in range(rounds):
        await ask(Request(length=LENGTH, seed=seed, settings=settings))
    return {title: round(1e3 * (after - before[title]) / rounds, 2) for title, after in used().items()}


def summary(seconds: dict[str, list[float]]) -> dict[str, dict[str, float]]:
    """Milliseconds of each way, and what it took more than the sampler alone in the same round."""
    found = {}
    for name, values in seconds.items():
        own, added = 1e3 * np.array(values), 1e3 * (np.array(values) - np.array(seconds[DIRECT]))
        if name == BARE:
            added = own  # it samples nothing: all of it is added
        found[name] = {
            f"{what}p{round(100 * q)}_ms": round(float(np.quantile(figures, q)), 2)
            for what, figures in (("", own), ("added_", added))
            for q in (0.5, 0.99)
        }
    return found


async def run_all(run: Path, url: str, rounds: int) -> dict[str, Any]:
    loaded = free.load(str(run))
    engine, client, service = Engine(loaded), Client(), Connection(int(url.rpartition(":")[2]))
    found: dict[str, Any] = {}

    async def direct(request: Request) -> Any:
        return answer(loaded, [request], [prepare(loaded, request)])[0]

    try:
        async with process(run) as alone:
            ways: dict[str, Ask] = {
                DIRECT: direct,
                "engine": engine.sample,
                "engine over HTTP, no Ray": alone.ask,
                "replica by handle": lambda request: client.sample(None, request),
                SERVICE: service.ask,
                BARE: service.ask_nothing,
            }
            for steps in STEPS:
                service.timings.clear()
                figures = summary(await measure(ways, loaded, steps, rounds))
                told = {
                    name: round(float(np.median([one[name] for one in service.timings])), 2)
                    for name in ("queue_ms", "sample_ms", "total_ms")
                }
                title = f"{steps} steps" if steps > 1 else "1 step"
                found[title] = {"ways": figures, "told by the service, p50": told}
                found[title]["processor time of a request, ms"] = await processor(service.ask, loaded, steps, rounds)
    finally:
        await engine.close()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=300)
    parser.add_argument("--result", type=Path, default=RESULTS / "serving_overhead.json")
    options = parser.parse_args()
    torch.set_num_threads(1)
    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    with tempfile.TemporaryDirectory() as folder, cluster(num_cpus=4) as own:
        run = write_run(Path(folder), f"data.length={LENGTH}")
        server = serve_run(run, ServingConfig(port=0), load=free.load)
        try:
            serve.run(bare.application(), name=bare.NAME, route_prefix=bare.PREFIX)
            found = asyncio.run(run_all(run, server.url, options.rounds))
        finally:
            server.stop(cluster_ends=own)
    console = Console(width=140)
    for title, part in found.items():
        table = Table(title=f"a text of {LENGTH} tokens in {title} (ms)")
        for column in ("way", "p50", "p99", "added p50", "added p99"):
            table.add_column(column, justify="left" if column == "way" else "right")
        for name, figures in part["ways"].items():
            table.add_row(name, *(f"{value:.2f}" for value in figures.values()))
        console.print(table)
        for name in ("told by the service, p50", "processor time of a request, ms"):
            console.print(f"{name}: {part[name]}", highlight=False)
    added = {title: part["ways"][SERVICE]["added_p50_ms"] for title, part in found.items()}
    alone = {title: part["ways"][BARE]["p50_ms"] for title, part in found.items()}
    console.print(f"added by the service, p50 ms: {added}; goal < {GOAL_MS:g}; Ray Serve alone takes {alone}")
    tree = {
        "benchmark": "serving_overhead",
        "measured": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": " ".join(["python -m tests.benchmarks.bench_serving_overhead", *sys.argv[1:]]),
        "machine": machine(),
        "environment": {name: value for name, value in os.environ.items() if name.startswith("RAY_SERVE_")},
        "tokens": LENGTH,
        "rounds": options.rounds,
        "goal": {"added_p50_ms": GOAL_MS, "found": added, "met": max(added.values()) < GOAL_MS},
        "found": found,
    }
    options.result.parent.mkdir(exist_ok=True)
    options.result.write_text(json.dumps(tree, indent=1) + "\n", encoding="utf-8")
    console.print(f"written: {options.result}")


if __name__ == "__main__":
    main()
