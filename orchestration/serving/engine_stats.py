"""What an engine counts. `Observe` is told of single values as they come, for histograms."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

Observed = Literal[
    "queue_seconds",  # of a request, from its arrival until its first row was started
    "first_token_seconds",  # of a request, from its arrival until the first network call for it
    "last_token_seconds",  # of a request, from its arrival until all of its rows had ended
    "request_calls",  # network calls that a request was part of
    "rows_per_call",
    "call_seconds",  # of a network call, with all that samplers do around it
]
Observe = Callable[[Observed, float], None]  # called in the engine's thread: it must be quick


@dataclass
class EngineStats:
    """Since the engine began, and as it is now."""

    healthy: bool = True
    ready: bool = False  # the capacity is known
    places: int = 0  # rows of the model's own length that a call takes
    measured: dict[int, float] = field(default_factory=dict)  # seconds of a call by rows; empty if it was not measured

    requests_waiting: int = 0  # none of whose rows was started
    requests_running: int = 0
    rows_waiting: int = 0  # those included that made room for others
    rows_running: int = 0
    lengths_running: int = 0
    scores_running: int = 0  # requests

    requests: int = 0  # accepted
    answered: int = 0
    cancelled: int = 0
    refused: int = 0  # because too many waited
    broken: int = 0  # the network's answer was no prediction, or it failed
    lost: int = 0  # the engine was closed, or failed
    scored: int = 0  # texts

    calls: int = 0
    call_seconds: float = 0.0
    rows_of_calls: int = 0  # summed over calls
    rows_per_call: dict[int, int] = field(default_factory=dict)  # calls by their rows
    failed_calls: int = 0  # that were made again in parts
    refreshes: int = 0
