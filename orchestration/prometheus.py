"""A run's newest figures for Prometheus, at http://HOST:PORT/metrics of the first worker's machine.

It is prometheus_client in the worker itself, not Ray's metrics: those leave the machine by an agent that a cluster may
not have, at a port that Ray draws, some ten seconds late, under names of Ray's. Here the port is the configuration's.
It is served from a thread, and answers from what the last rows of metrics said, so a scrape costs the training nothing.
"""

import threading
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

from prometheus_client import CollectorRegistry, start_http_server
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from orchestration.config import Config

_AGAIN_SECONDS = 1.0  # the worker before this one may still hold the port

# Figure of a row -> (name, what it is). Units as in `metrics.jsonl`.
_GAUGES = {
    ("train", "bits_per_token"): ("loss_bits_per_token", "training loss, an upper bound"),
    ("train", "mask_ratio"): ("mask_ratio", "share of the tokens that were hidden"),
    ("train", "gradient_norm"): ("gradient_norm", "before clipping"),
    ("train", "learning_rate"): ("learning_rate", "of the last step"),
    ("train", "seconds_per_step"): ("step_seconds", "of a step, evaluations and checkpoints left out"),
    ("train", "tokens_per_second"): ("tokens_per_second", "of all workers"),
    ("train", "tflops"): ("model_tflops_per_second", "operations that the model needs, of all workers, times 10^12"),
    ("train", "mfu"): ("mfu", "the same as a share of what the devices can do"),
    ("train", "data_wait"): ("data_wait_ratio", "share of the time that the slowest worker waited for data"),
    ("train", "goodput"): ("goodput_ratio", "share of the run's time that went into steps that were not lost"),
    ("evaluation", "bits_per_token"): ("validation_bits_per_token", "of averaged weights, an upper bound"),
    ("checkpoint", "seconds"): ("checkpoint_seconds", "from the copy of the state to the commit, of the last one"),
    ("checkpoint", "blocked"): ("checkpoint_blocked_seconds", "of these, the time that training stood still"),
    ("checkpoint", "step"): ("checkpoint_step", "step of the last checkpoint"),
    ("checkpoint", "time"): ("checkpoint_timestamp_seconds", "when the last checkpoint was told of"),
    ("start", "workers"): ("workers", "workers of the group that runs"),
}
_COUNTERS = {
    ("train", "restarts"): ("restarts", "groups of workers after the first"),
    ("train", "lost_steps"): ("lost_steps", "steps that had to be made again"),
    ("train", "skipped_steps"): ("skipped_steps", "steps left out for a spike or a number that was none"),
}


class Prometheus(Collector):
    """A tracker that is asked. Serves from its making until `close`; tries again until the port is free."""

    def __init__(self, config: Config, port: int):
        self._name, self._steps, self._port = config.name, config.train.steps, port
        self._rows: dict[str, dict[str, Any]] = {}
        self._registry = CollectorRegistry()
        self._registry.register(self)
        self._server: Any = None
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._serve, name="prometheus", daemon=True)
        self._thread.start()

    def log(self, row: dict[str, Any]) -> None:
        self._rows = {**self._rows, row["kind"]: row}

    def close(self) -> None:
        self._done.set()
        self._thread.join()
        if self._server is not None:
            self._server.shutdown()
            self._server.server_close()

    def collect(self) -> Iterator[Metric]:
        """The families of metrics as they are now; asked by prometheus_client."""
        rows = self._rows
        last = max((row["step"] for row in rows.values()), default=0)
        yield self._gauge("step", "of the last row of metrics", last)
        yield self._gauge("steps", "of the whole run", self._steps)
        for (kind, figure), (name, text) in _GAUGES.items():
            if (value := rows.get(kind, {}).get(figure)) is not None:
                yield self._gauge(name, text, value)
        for (kind, figure), (name, text) in _COUNTERS.items():
            if (value := rows.get(kind, {}).get(figure)) is not None:
                family = CounterMetricFamily(f"md4_{name}", text, labels=["run"])
                family.add_metric([self._name], value)
                yield family
        by_time = rows.get("train", {}).get("bits_by_time") or []
        family = GaugeMetricFamily(
            "md4_loss_by_time_bits_per_token", "training loss by time, from t", labels=["run", "t"]
        )
        for place, value in enumerate(by_time):
            if value is not None:
                family.add_metric([self._name, f"{place / len(by_time):g}"], value)
        yield family

    def _gauge(self, name: str, text: str, value: float) -> Metric:
        family = GaugeMetricFamily(f"md4_{name}", text, labels=["run"])
        family.add_metric([self._name], value)
        return family

    def _serve(self) -> None:
        while self._server is None:
            with suppress(OSError):
                self._server, _ = start_http_server(self._port, registry=self._registry)
            if self._server is None and self._done.wait(_AGAIN_SECONDS):
                return
