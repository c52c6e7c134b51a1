"""The service as its clients meet it, without Ray: real engines with small networks, a real server, real sockets."""

import asyncio
import io
import json
import logging
import socket
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from time import monotonic, sleep

import httpx
import pytest
import torch
import uvicorn
from fastapi import APIRouter
from pythonjsonlogger.json import JsonFormatter

from md4.samplers import SamplingConfig
from md4.samplers.saved import SavedSettings
from orchestration.grids import keep
from orchestration.runs import load_model
from orchestration.serving.access_log import LOGGER
from orchestration.serving.config import EngineConfig, ServingConfig
from orchestration.serving.engine import Engine
from orchestration.serving.http import make_api
from orchestration.serving.models import Local, Models
from tests.orchestration.small_run import write_run
from tests.orchestration.test_pictures import write_image_run
from tests.pipelines.small_tokenizer import write_tokenizer

CONFIG = ServingConfig(max_count=8, max_length=200, max_steps=1000, timeout_s=30)


# Kept with the model "small".
SAVED = (
    SavedSettings(name="searched", steps=4, settings=SamplingConfig(grid=(1.0, 0.9, 0.5, 0.3, 0.0))),
    SavedSettings(name="best", steps=8, settings=SamplingConfig(sampler="remdm", steps=7, grid="cosine", eta=0.3)),
)


class Slow(torch.nn.Module):
    """A network that takes a while for each call."""

    def __init__(self, network: torch.nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, z, t, labels=None):
        sleep(0.03)
        return self.network(z, t, labels)


class Poisoned(torch.nn.Module):
    """A network that answers NaN."""

    def __init__(self, network: torch.nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, z, t, labels=None):
        return self.network(z, t, labels) * torch.nan


@pytest.fixture(scope="session")
def runs(tmp_path_factory) -> dict:
    """Models by name: text of 27 characters, of byte pairs in single documents, images of 8 x 8 levels."""
    home = tmp_path_factory.mktemp("served")
    write_tokenizer(home / "tokenizer")
    pairs = [f"data.vocabulary={home / 'tokenizer'}", "data.packing=document", "model.attention=document"]
    text = write_run(home / "text")
    for found in SAVED:
        keep(text, found)
    return {
        "small": load_model(text),
        "pairs": load_model(write_run(home / "pairs", *pairs)),
        "digits": write_image_run(home / "images"),
        "slow": load_model(write_run(home / "slow")),
        "sick": load_model(write_run(home / "sick")),
    }


@pytest.fixture(scope="session")
def engines(runs) -> Iterator[dict[str, Engine]]:
    runs["slow"].model.network = Slow(runs["slow"].model.network)
    runs["sick"].model.network = Poisoned(runs["sick"].model.network)
    started = {name: Engine(loaded, EngineConfig(max_rows=8, max_waiting_rows=8)) for name, loaded in runs.items()}
    yield started
    asyncio.run(Local(started).close(drain=False))


@dataclass
class Served:
    """A server under way."""

    url: str
    host: str
    port: int


@contextmanager
def serving(models: Models, config: ServingConfig, pages: Iterable[APIRouter] = ()) -> Iterator[Served]:
    """A server of these models, and pages, in a thread of its own."""
    with socket.socket() as place:
        place.bind(("127.0.0.1", 0))
        host, port = place.getsockname()
        settings = uvicorn.Config(
            make_api(models, config, pages), log_level="warning", access_log=False, lifespan="off"
        )
        server = uvicorn.Server(settings)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [place]})
        thread.start()
        try:
            wait_until(lambda: server.started)
            yield Served(f"http://{host}:{port}", host, port)
        finally:
            server.should_exit = True
            thread.join()


def wait_until(true: Callable[[], bool], seconds: float = 10) -> None:
    end = monotonic() + seconds
    while not true():
        assert monotonic() < end, "it did not come about in time"
        sleep(0.005)


@pytest.fixture(scope="session")
def served(engines) -> Iterator[Served]:
    with serving(Local(engines), CONFIG) as server:
        yield server


@pytest.fixture
def serve(engines):
    """`serve(setting=...)`: a server of the same models with other settings, as a context manager."""
    return lambda **changes: serving(Local(engines), replace_config(**changes))


def replace_config(**changes) -> ServingConfig:
    return CONFIG.model_copy(update=changes)


@pytest.fixture(scope="session")
def client(served) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=served.url, timeout=60) as client:
        yield client


class Lines(io.StringIO):
    """What was logged, as lines of JSON."""

    def all(self) -> list[dict]:
        return [json.loads(line) for line in self.getvalue().splitlines()]

    def of(self, name: str) -> dict:
        """The line of a request, by its id; it may come a moment after the answer."""
        wait_until(lambda: any(line["id"] == name for line in self.all()))
        (found,) = [line for line in self.all() if line["id"] == name]
        return found


@pytest.fixture
def log() -> Iterator[Lines]:
    lines = Lines()
    handler = logging.StreamHandler(lines)
    handler.setFormatter(JsonFormatter())
    LOGGER.addHandler(handler)
    yield lines
    LOGGER.removeHandler(handler)
