"""Replicas follow the load: none, two, none."""

from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest

from orchestration.runs import load_model
from orchestration.sampling import sample
from orchestration.serving import app
from orchestration.serving.config import EngineConfig, ServingConfig
from tests.orchestration.driver import wait_for
from tests.orchestration.serving.test_app import replicas
from tests.orchestration.small_run import write_run

CONFIG = ServingConfig(
    port=0,
    num_cpus=0.5,
    replicas=2,
    min_replicas=0,
    requests_per_replica=2,
    grow_s=0.5,
    shrink_s=2,
    engine=EngineConfig(max_rows=4),
)


@pytest.mark.ray
@pytest.mark.timeout(300)
def test_from_none_to_two_to_none(ray_cluster, tmp_path):
    run = write_run(tmp_path)
    expected = sample(load_model(run), seed=1).samples[0].text
    server = app.serve_run(run, CONFIG)
    try:
        with httpx.Client(base_url=server.url, timeout=120) as client:
            wait_for(lambda: not replicas(), 60, "no replica without requests")
            assert client.get("/healthz").is_success  # who only looks wakes nobody
            assert not replicas()
            body = {"count": 4, "seed": 1, "length": 1000, "sampling": {"block": 16}}
            with ThreadPoolExecutor(12) as pool:
                answers = [pool.submit(client.post, "/v1/samples", json=body) for _ in range(12)]
                wait_for(lambda: len(replicas()) == 2, 60, "two replicas")
            assert all(answer.result().is_success for answer in answers)
            found = client.post("/v1/samples", json={"seed": 1}).json()
            assert found["samples"][0]["text"] == expected
            wait_for(lambda: not replicas(), 60, "none again")
    finally:
        server.stop()
