"""Small models to be registered, and figures that evaluations would have found of them."""

from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np
import pytest

from orchestration import results
from orchestration.registry import Registry
from orchestration.results import Contributions, Result
from orchestration.runs import export
from tests.orchestration.small_run import write_run
from tests.s3 import BUCKET

NOW = datetime(2026, 3, 1, 12, tzinfo=UTC)
BITS = "likelihood/pydocs/validation"
ENTROPY = "quality/entropy"


class Clock:
    """A clock that stands still until it is moved."""

    def __init__(self):
        self.time = NOW

    def __call__(self) -> datetime:
        return self.time

    def advance(self, **time: float) -> None:
        self.time += timedelta(**time)


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture(scope="session")
def run(tmp_path_factory) -> Path:
    return write_run(tmp_path_factory.mktemp("run"))


@pytest.fixture(scope="session")
def exports(tmp_path_factory) -> Callable[[int], Path]:
    """`exports(seed)`: the folder of an exported model; another seed, other weights."""
    made: dict[int, Path] = {}

    def make(seed: int) -> Path:
        if seed not in made:
            place = tmp_path_factory.mktemp(f"model-{seed}")
            made[seed] = export(write_run(place / "runs", seed=seed), place / "export", report=lambda text: None)
        return made[seed]

    return make


@pytest.fixture(params=["local", "s3"])
def place(request, tmp_path) -> str:
    """Where a registry can be."""
    if request.param == "local":
        return str(tmp_path / "registry")
    request.getfixturevalue("s3")
    return f"s3://{BUCKET}/registry"


@pytest.fixture
def registry(tmp_path, clock) -> Registry:
    return Registry(tmp_path / "registry", now=clock)


@pytest.fixture
def three(registry, exports) -> Registry:
    """A registry with versions 1, 2 and 3 of the model `small`."""
    for seed in (1, 2, 3):
        registry.add("small", exports(seed), by="ada", say=lambda text: None)
    return registry


@pytest.fixture
def measured(tmp_path, three, clock):
    """`measured(version, **changes)`: an evaluation of a version noted in the table; gives the table's folder."""
    counter = iter(range(10**6))

    def measure(version: int, value: float, *, rows: np.ndarray | None = None, **changes) -> None:
        kept = {} if rows is None else {changes.get("metric", BITS): Contributions.of_mean(value + rows)}
        one = Result(
            **{
                "created": clock(),
                "suite": "pydocs",
                "model": "small",
                "weights_hash": three.version("small", version).manifest.weights[0],
                "metric": BITS,
                "value": value,
                "standard_error": 0.01,
                "unit": "bits per character",
                "better": "lower",
                "data_fingerprint": "d1",
                "settings": "s1",
                "attempt": f"attempt-{next(counter)}",
                **changes,
            }
        )
        results.append(tmp_path / "results", [one], kept)

    return measure
