"""What the engine is worth to who asks over HTTP: against `@serve.batch`, whose batches end as one.

    python -m tests.benchmarks.bench_serving [--seconds 40] [--capacity 25] [--tune 12]   about 12 minutes, 2 idle cores

Both are served by the same Ray Serve, behind the same proxy, at the same time: `md4 serve` as it is (a gateway, a
replica with the engine) and `serving.batched`, with the best of some settings. Same small network (random weights,
width 64, 4 layers, 128 tokens), same samplers, one thread each, queues of equal length. The requests, made by locust,
are those of `serving.plan`: 80 % short, 20 % long.

*Capacity* is what each answers when it always has work. Then requests come by a Poisson process: 50, 80 and 120 % of
the capacity of `@serve.batch` to both (equal load), and of the engine's own to the engine. Latency counts from the
moment a request was due. Goals: p99 of short requests three times lower at equal load, or twice the throughput at equal
p99.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import httpx
import numpy as np
from ray import serve
from rich.console import Console
from rich.table import Table

from orchestration.cluster import cluster
from orchestration.serving.app import serve_run
from orchestration.serving.config import EngineConfig, ServingConfig
from tests.benchmarks.harness import RESULTS, machine
from tests.benchmarks.serving import batched, plan
from tests.benchmarks.serving.plan import MIX, Outcome, Plan
from tests.orchestration.small_run import write_run

NETWORK = ("data.length=128", "model.network.feature_dim=16", "model.network.heads=4", "model.network.layers=4")
SHARES = (0.5, 0.8, 1.2)
SETTINGS = ((8, 10.0), (16, 10.0), (32, 10.0), (16, 50.0))  # of @serve.batch: requests a batch, ms to wait for them
QUEUE = 256  # requests that may wait; then 503
CLIENTS = 64  # of a closed loop: always more than a batch or the places of the engine
OPENING = 0.25  # share of a closed loop that is not counted
LOCUSTFILE = Path(__file__).parent / "serving" / "locustfile.py"
CPUS = 0.5  # that Ray counts for a replica; there are two besides the proxy on two cores


@dataclass(frozen=True)
class Side:
    """A service to be measured."""

    name: str
    url: str
    path: str

    def load(self, made: Plan) -> list[Outcome]:
        """What comes of a plan, carried out by locust in a process of its own."""
        with tempfile.TemporaryDirectory() as folder:
            file, result = Path(folder, "plan.json"), Path(folder, "result.json")
            made.write(file)
            command = [sys.executable, "-m", "locust", "--headless", "--only-summary", "--loglevel", "WARNING"]
            command += ["--locustfile", str(LOCUSTFILE), "--host", self.url]
            command += ["--plan", str(file), "--result", str(result)]
            clients = str(made.clients or 1)
            command += ["--users", clients, "--spawn-rate", clients]
            if made.seconds is not None:
                command += ["--run-time", f"{round(made.seconds)}s"]
            done = subprocess.run(command, capture_output=True, text=True)
            if not result.exists():
                raise RuntimeError(f"locust has failed:\n{done.stderr}")
            return plan.read_outcomes(result)

    def idle(self) -> None:
        """Wait until nothing is left of what clients have given up: batches go on with it."""
        body = {"length": 1, "seed": 1, "sampling": {"steps": 1}}
        httpx.post(self.url + self.path, json=body, timeout=300).raise_for_status()

    def capacity(self, seconds: float, seed: int) -> float:
        """Answers a second, of a closed loop."""
        outcomes = self.load(plan.closed(self.path, CLIENTS, seconds, seed))
        self.idle()
        done = sorted(one.done for one in outcomes if one.status == 200)
        # Batches answer in clumps: from the end of one clump to that of another.
        first = [time for time in done if time <= OPENING * seconds][-1:] or done[:1]
        return sum(time > first[0] for time in done) / (done[-1] - first[0])

    def open_loop(self, rate: float, seconds: float, seed: int) -> list[Outcome]:
        return self.load(Plan(self.path, plan.arrivals(rate, seconds, seed)))


def figures(outcomes: Sequence[Outcome]) -> dict[str, Any]:
    """Throughput, and latencies by kind in ms."""
    answered = [one for one in outcomes if one.status == 200]
    status = Counter(one.status for one in outcomes)
    found: dict[str, Any] = {
        "requests": len(outcomes),
        "answered": len(answered),
        "refused": status[503],
        "failed": len(outcomes) - len(answered) - status[503],
        "throughput": round(len(answered) / max(one.done for one in outcomes), 2),
        "sent_late_p99_ms": round(1e3 * float(np.quantile([one.sent - one.due for one in outcomes], 0.99)), 1),
    }
    for kind in (*MIX, "all"):
        own = [1e3 * one.latency for one in answered if kind in (one.kind, "all")] or [float("nan")]
        found[kind] = {"answered": len(own)} | {
            f"p{round(100 * q)}_ms": round(float(np.quantile(own, q)), 1) for q in (0.5, 0.99)
        }
    return found


def same_answers(sides: Sequence[Side]) -> None:
    """Both give the same text for the same request."""
    for wish, _ in zip(plan.wishes(seed=99), range(4), strict=False):
        texts = [
            httpx.post(side.url + side.path, json=wish.body, timeout=120)
            .raise_for_status()
            .json()["samples"][0]["text"]
            for side in sides
        ]
        assert len(set(texts)) == 1, f"{wish} gives {texts}"


def best_batches(side: Side, run: Path, seconds: float) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Try settings of `@serve.batch`; the one with the highest capacity stays deployed."""
    tried: list[dict[str, Any]] = []

    def deploy(size: int, wait_ms: float) -> None:
        application = batched.application(run, size, wait_ms, QUEUE, CPUS)
        serve.run(application, name=batched.NAME, route_prefix=batched.PREFIX)

    for number, (size, wait_ms) in enumerate(SETTINGS):
        deploy(size, wait_ms)
        if number == 0:
            side.load(plan.closed(side.path, CLIENTS, min(5.0, seconds), seed=1))  # to warm up
        found = side.capacity(seconds, seed=2)
        tried.append({"max_batch_size": size, "batch_wait_ms": wait_ms, "requests_per_second": round(found, 2)})
        say(f"@serve.batch, {size} requests, {wait_ms:g} ms: {found:.1f} requests/s")
    chosen = max(tried, key=lambda one: one["requests_per_second"])
    deploy(chosen["max_batch_size"], chosen["batch_wait_ms"])
    return chosen, tried


def goals(points: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The two comparisons of which one is to be met."""
    at = {(one["side"], one["of"], one["share"]): one for one in points}
    lower = {
        f"{share:.0%}": round(
            at["batched", "batched", share]["short"]["p99_ms"] / at["engine", "batched", share]["short"]["p99_ms"], 2
        )
        for share in SHARES
    }
    # Where the engine's p99 is not above that of the batches, of short requests and of all.
    more = {}
    for share in SHARES:
        limit = at["batched", "batched", share]
        within = [
            one["throughput"]
            for one in points
            if one["side"] == "engine"
            and not one["refused"] + one["failed"]
            and all(one[kind]["p99_ms"] <= limit[kind]["p99_ms"] for kind in ("short", "all"))
        ]
        more[f"{share:.0%}"] = round(max(within, default=0.0) / limit["throughput"], 2)
    return {
        "p99_of_short_requests_lower_at_equal_load": {"ratios": lower, "goal": 3.0},
        "throughput_at_equal_p99": {"ratios": more, "goal": 2.0},
        "met": {"latency, at every load": min(lower.values()) >= 3.0, "throughput, at 80 %": more["80%"] >= 2.0},
    }


def table(points: Sequence[dict[str, Any]]) -> Table:
    shown = Table(title="served requests (latency in ms)")
    for column in (
        "service",
        "load",
        "asked/s",
        "answered/s",
        "refused",
        "short p50",
        "p99",
        "long p50",
        "p99",
        "all p99",
    ):
        shown.add_column(column, justify="left" if column in ("service", "load") else "right")
    for one in points:
        shown.add_row(
            one["side"],
            f"{one['share']:.0%} of {one['of']}",
            f"{one['rate']:.1f}",
            f"{one['throughput']:.1f}",
            str(one["refused"]) + (f" + {one['failed']} failed" if one["failed"] else ""),
            *(f"{one[kind][name]:,.0f}" for kind in MIX for name in ("p50_ms", "p99_ms")),
            f"{one['all']['p99_ms']:,.0f}",
        )
    return shown


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=40.0, help="of a point")
    parser.add_argument("--capacity", type=float, default=25.0, help="seconds to measure the capacity of one service")
    parser.add_argument("--tune", type=float, default=12.0, help="seconds for each setting of @serve.batch")
    parser.add_argument("--result", type=Path, default=RESULTS / "serving.json")
    options = parser.parse_args()
    began = time.perf_counter()
    config = ServingConfig(
        port=0, num_cpus=CPUS, max_ongoing=2 * QUEUE, max_queued=QUEUE, engine=EngineConfig(max_waiting_rows=QUEUE)
    )
    with tempfile.TemporaryDirectory() as folder, cluster(num_cpus=4) as own:
        run = write_run(Path(folder), *NETWORK)
        server = serve_run(run, config)
        try:
            engine = Side("engine", server.url, "/v1/samples")
            batches = Side("batched", server.url, f"{batched.PREFIX}/v1/samples")
            chosen, tried = best_batches(batches, run, options.tune)
            batches.idle()
            engine.load(plan.closed(engine.path, CLIENTS, min(5.0, options.tune), seed=1))  # to warm up
            same_answers([engine, batches])
            capacity = {side.name: side.capacity(options.capacity, seed=3) for side in (batches, engine)}
            say(f"capacity, requests/s: {capacity}")
            points: list[dict[str, Any]] = []
            for number, share in enumerate(SHARES):
                at = [(batches, "batched"), (engine, "batched"), (engine, "engine")]
                for side, of in at if number % 2 else reversed(at):
                    rate = share * capacity[of]
                    found = figures(side.open_loop(rate, options.seconds, seed=10 + number))
                    points.append({"side": side.name, "of": of, "share": share, "rate": round(rate, 2), **found})
                    say(f"{points[-1]}")
        finally:
            server.stop(cluster_ends=own)
    points.sort(key=lambda one: (one["of"], one["share"], one["side"]))
    summary = {
        "benchmark": "serving",
        "measured": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": " ".join(["python -m tests.benchmarks.bench_serving", *sys.argv[1:]]),
        "machine": machine(),
        "network": NETWORK,
        "mix": MIX,
        "queue": QUEUE,
        "batched": {"chosen": chosen, "tried": tried},
        "capacity_requests_per_second": {name: round(value, 2) for name, value in capacity.items()},
        "goals": goals(points),
        "points": points,
        "seconds": round(time.perf_counter() - began),
    }
    console = Console(width=140)
    console.print(table(points))
    console.print(json.dumps(summary["goals"], indent=1))
    options.result.parent.mkdir(exist_ok=True)
    options.result.write_text(json.dumps(summary, indent=1) + "\n", encoding="utf-8")
    console.print(f"written: {options.result}")


if __name__ == "__main__":
    main()
