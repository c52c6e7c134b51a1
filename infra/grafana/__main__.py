"""Prints the dashboard: one row for training, one for the service."""

import json
from typing import Any

_WIDTH, _HEIGHT, _ACROSS = 8, 7, 3  # of a panel, in Grafana's 24 columns; panels beside each other
_WINDOW = "$__rate_interval"
_SERVING = "ray_md4_serving"


def _quantile(figure: str, share: float) -> str:
    buckets = f'{_SERVING}_{figure}_bucket{{model=~"$model"}}'
    return f"histogram_quantile({share}, sum by (le) (rate({buckets}[{_WINDOW}])))"


def _per_second(figure: str) -> str:
    return f'sum(rate({_SERVING}_{figure}_total{{model=~"$model"}}[{_WINDOW}]))'


def _all(figure: str) -> str:
    return f'sum({_SERVING}_{figure}{{model=~"$model"}})'


def _run(figure: str) -> str:
    return f'md4_{figure}{{run=~"$run"}}'


def _quantiles(figure: str, *shares: float) -> dict[str, str]:
    return {f"p{share * 100:g}": _quantile(figure, share) for share in shares}


def _runs(**figures: str) -> dict[str, str]:
    return {legend: _run(figure) for legend, figure in figures.items()}


def _now(**figures: str) -> dict[str, str]:
    return {legend: _all(figure) for legend, figure in figures.items()}


Panel = tuple[str, str, dict[str, str]]  # title, unit as Grafana calls it, and queries by what their lines are called
TRAINING: list[Panel] = [
    ("Loss, bits per token", "none", _runs(training="loss_bits_per_token", validation="validation_bits_per_token")),
    ("Loss by time, bits per token", "none", {"{{t}}": _run("loss_by_time_bits_per_token")}),
    ("Steps", "none", _runs(done="step", of="steps")),
    ("Tokens per second", "none", {"{{run}}": _run("tokens_per_second")}),
    ("Shares of time", "percentunit", _runs(goodput="goodput_ratio", waiting="data_wait_ratio", MFU="mfu")),
    ("Workers and restarts", "none", _runs(workers="workers", restarts="restarts_total")),
    ("Steps lost and skipped", "none", _runs(lost="lost_steps_total", skipped="skipped_steps_total")),
    ("Age of the last checkpoint", "s", {"{{run}}": f"time() - {_run('checkpoint_timestamp_seconds')}"}),
    ("A checkpoint", "s", _runs(all="checkpoint_seconds", standing="checkpoint_blocked_seconds")),
]
_ENDS = ("requests", "answered", "cancelled", "refused", "broken", "lost")
SERVING: list[Panel] = [
    ("Requests per second", "reqps", {end: _per_second(end) for end in _ENDS}),
    ("Time of a request", "s", _quantiles("last_token_seconds", 0.5, 0.9, 0.99)),
    ("Time until its first token", "s", _quantiles("first_token_seconds", 0.5, 0.9, 0.99)),
    ("Time in the queue", "s", _quantiles("queue_seconds", 0.5, 0.9, 0.99)),
    ("Requests now", "none", _now(waiting="requests_waiting", running="requests_running", scoring="scores_running")),
    ("Rows now", "none", _now(waiting="rows_waiting", running="rows_running", places="places")),
    ("Occupancy", "percentunit", {"{{model}}": f'avg by (model) ({_SERVING}_occupancy{{model=~"$model"}})'}),
    ("A network call", "s", _quantiles("call_seconds", 0.5, 0.99)),
    ("Network calls per second", "none", {"all": _per_second("calls"), "again": _per_second("failed_calls")}),
]


def dashboard() -> dict[str, Any]:
    """The dashboard, as Grafana imports it (schema of version 10 and newer)."""
    panels: list[dict[str, Any]] = []
    top = 0
    for title, row in (("Training", TRAINING), ("Service", SERVING)):
        panels.append({"type": "row", "title": title, "gridPos": {"x": 0, "y": top, "w": 24, "h": 1}})
        for place, (name, unit, queries) in enumerate(row):
            left, down = place % _ACROSS * _WIDTH, place // _ACROSS * _HEIGHT
            panels.append(_panel(name, unit, queries, left, top + 1 + down))
        top += 1 + -(-len(row) // _ACROSS) * _HEIGHT
    variables = [
        {"name": "source", "label": "source", "type": "datasource", "query": "prometheus"},
        _variable("run", "label_values(md4_step, run)"),
        _variable("model", f"label_values({_SERVING}_places, model)"),
    ]
    return {
        "uid": "md4",
        "title": "md4",
        "tags": ["md4"],
        "schemaVersion": 39,
        "refresh": "30s",
        "time": {"from": "now-6h", "to": "now"},
        "templating": {"list": variables},
        "panels": [{"id": number, **panel} for number, panel in enumerate(panels, 1)],
    }


_SOURCE = {"type": "prometheus", "uid": "${source}"}


def _panel(title: str, unit: str, queries: dict[str, str], left: int, top: int) -> dict[str, Any]:
    targets = [
        {"refId": chr(ord("A") + number), "datasource": _SOURCE, "expr": expression, "legendFormat": legend}
        for number, (legend, expression) in enumerate(queries.items())
    ]
    return {
        "type": "timeseries",
        "title": title,
        "datasource": _SOURCE,
        "gridPos": {"x": left, "y": top, "w": _WIDTH, "h": _HEIGHT},
        "fieldConfig": {"defaults": {"unit": unit}, "overrides": []},
        "targets": targets,
    }


def _variable(name: str, query: str) -> dict[str, Any]:
    return {
        "name": name,
        "type": "query",
        "datasource": _SOURCE,
        "query": query,
        "refresh": 2,  # whenever the time that is looked at changes
        "multi": True,
        "includeAll": True,
    }


if __name__ == "__main__":
    print(json.dumps(dashboard(), indent=1))
