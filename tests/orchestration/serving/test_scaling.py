"""Replicas follow the load: none, two, none; and hold as many models as they may."""

import threading
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest

from orchestration.runs import load_model
from orchestration.sampling import sample
from orchestration.serving import app
from orchestration.serving.config import EngineConfig, ServingConfig
from tests.orchestration.driver import wait_for
from tests.orchestration.serving.processes import replicas
from tests.orchestration.small_run import write_run

CONFIG = ServingConfig(
    port=0,
    num_cpus=0.5,
    replicas=2,
    min_replicas=0,
    requests_per_replica=2,
    grow_s=0.5,
    shrink_s=2,
    models_per_replica=1,
    engine=EngineConfig(max_rows=4),
)


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.timeout(300)
def test_from_none_to_two_to_none(ray_cluster, tmp_path):
    run, other = write_run(tmp_path / "one"), write_run(tmp_path / "two", seed=1)
    expected = [sample(load_model(one), seed=1).samples[0].text for one in (run, other)]
    server = app.serve_run(run, CONFIG, {"other": other})
    try:
        with httpx.Client(base_url=server.url, timeout=120) as client:
            wait_for(lambda: not replicas(), 60, "no replica without requests")
            assert client.get("/healthz").is_success  # who only looks wakes nobody
            assert not replicas()
            enough = threading.Event()

            def ask() -> list[httpx.Response]:
                body, answers = {"seed": 1, "length": 300, "sampling": {"block": 16}}, []
                while not enough.is_set():
                    answers.append(client.post("/v1/samples", json=body))
                return answers

            with ThreadPoolExecutor(8) as pool:
                asking = [pool.submit(ask) for _ in range(8)]
                wait_for(lambda: len(replicas()) == 2, 90, "two replicas")
                enough.set()
            assert all(answer.is_success for one in asking for answer in one.result())
            # Each replica has room for one model: the other takes its place, and gives it back.
            asked = [
                client.post("/v1/samples", json={"seed": 1, "model": name}) for name in ("small", "other", "small")
            ]
            texts = [answer.json()["samples"][0]["text"] for answer in asked]
            assert texts == [expected[0], expected[1], expected[0]]
            wait_for(lambda: not replicas(), 60, "none again")
    finally:
        server.stop()
