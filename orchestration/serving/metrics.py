"""Figures of an engine for Prometheus, through Ray: each node's agent serves them, named `ray_md4_serving_...`.

All have the labels `model` and `version` (of the registry; empty for runs), beside Ray's own (node, deployment,
replica).
"""

from ray.util.metrics import Counter, Gauge, Histogram

from orchestration.serving.engine_stats import EngineStats, Observed

_SECONDS: list[float] = [0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300]
_CALL_SECONDS: list[float] = [0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5]
_COUNTS: list[float] = [1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024]
_HISTOGRAMS: dict[Observed, tuple[str, list[float]]] = {
    "queue_seconds": ("of a request, from its arrival until its first row was started", _SECONDS),
    "first_token_seconds": ("of a request, from its arrival until the first network call for it", _SECONDS),
    "last_token_seconds": ("of a request, from its arrival until all of its rows had ended", _SECONDS),
    "request_calls": ("network calls that a request was part of", [*_COUNTS, 4096, 16384]),
    "rows_per_call": ("rows of a network call", _COUNTS),
    "call_seconds": ("of a network call, with all that samplers do around it", _CALL_SECONDS),
}
_GAUGES = {
    "places": "rows of the model's own length that a call takes",
    "requests_waiting": "requests none of whose rows was started",
    "requests_running": "requests of which rows are under way",
    "rows_waiting": "rows that wait for a place",
    "rows_running": "rows that are under way",
    "scores_running": "requests to score texts",
}
_COUNTERS = {
    "requests": "accepted requests",
    "answered": "requests that got their answer",
    "cancelled": "requests that were given up by who asked",
    "refused": "requests that were refused because too many waited",
    "broken": "requests for which the network's answer was no prediction, or it failed",
    "lost": "requests that ended with the engine",
    "scored": "texts",
    "calls": "network calls",
    "failed_calls": "network calls that were made again in parts",
    "refreshes": "changes of weights",
}
_LABELS = ("model", "version")


class EngineMetrics:
    """Of one version of a model in this process. since: what the engine had done before it had that version."""

    def __init__(self, model: str, version: int | None = None, since: EngineStats | None = None) -> None:
        self._tags = {"model": model, "version": "" if version is None else str(version)}
        self._histograms = {
            name: Histogram(f"md4_serving_{name}", text, boundaries=bounds, tag_keys=_LABELS)
            for name, (text, bounds) in _HISTOGRAMS.items()
        }
        self._gauges = {name: Gauge(f"md4_serving_{name}", text, _LABELS) for name, text in _GAUGES.items()}
        self._occupancy = Gauge("md4_serving_occupancy", "rows of network calls lately, as a share of places", _LABELS)
        self._counters = {name: Counter(f"md4_serving_{name}_total", text, _LABELS) for name, text in _COUNTERS.items()}
        self._last = since or EngineStats()

    def observe(self, name: Observed, value: float) -> None:
        """One value, as the engine tells it."""
        self._histograms[name].observe(value, self._tags)

    def update(self, stats: EngineStats) -> None:
        """The state now, and what was added since the last time."""
        for name, gauge in self._gauges.items():
            gauge.set(getattr(stats, name), self._tags)
        for name, counter in self._counters.items():
            if added := getattr(stats, name) - getattr(self._last, name):
                counter.inc(added, self._tags)
        calls, rows = stats.calls - self._last.calls, stats.rows_of_calls - self._last.rows_of_calls
        self._occupancy.set(rows / (calls * stats.places) if calls and stats.places else 0.0, self._tags)
        self._last = stats

    def end(self, stats: EngineStats) -> None:
        """The engine is gone: what it did last, and that it does nothing any more."""
        self.update(stats)
        for gauge in (*self._gauges.values(), self._occupancy):
            gauge.set(0.0, self._tags)
