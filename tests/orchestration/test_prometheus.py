"""A real HTTP server, asked as Prometheus asks."""

import socket
import time

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from orchestration.prometheus import Prometheus
from orchestration.runs import Run
from orchestration.tracking import Trackers


@pytest.fixture
def port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def scrape(port: int, patience: float = 20) -> dict[str, float]:
    """Samples by name and time, as soon as somebody answers."""
    end = time.monotonic() + patience
    while True:
        try:
            text = httpx.get(f"http://127.0.0.1:{port}/metrics", timeout=5).text
            break
        except httpx.TransportError:
            if time.monotonic() > end:
                raise
            time.sleep(0.05)
    samples = [sample for family in text_string_to_metric_families(text) for sample in family.samples]
    assert all(sample.labels["run"] == "tiny" for sample in samples)
    return {sample.name + sample.labels.get("t", ""): sample.value for sample in samples}


def test_rows_are_told_when_asked(tiny, port):
    config = tiny("train.steps=30", f"tracking.prometheus_port={port}")
    trackers = Trackers(config, Run.create(config).path, 0)
    assert scrape(port) == {"md4_step": 0, "md4_steps": 30}
    trackers.log(
        {
            "kind": "train",
            "step": 10,
            "bits_per_token": 4.5,
            "bits_by_time": [1.0, None, 3.0, 4.0, 5.0],
            "mfu": None,
            "restarts": 2,
            "goodput": 0.75,
        }
    )
    trackers.log({"kind": "checkpoint", "step": 12, "time": 5.0, "seconds": 0.5, "blocked": 0.1})
    told = scrape(port)
    assert told["md4_step"] == 12
    assert told["md4_loss_bits_per_token"] == 4.5
    assert "md4_mfu" not in told
    assert told["md4_restarts_total"] == 2
    assert told["md4_goodput_ratio"] == 0.75
    assert told["md4_checkpoint_blocked_seconds"] == 0.1
    assert {key: told[f"md4_loss_by_time_bits_per_token{key}"] for key in ("0", "0.4", "0.8")} == {
        "0": 1.0, "0.4": 3.0, "0.8": 5.0
    }  # fmt: skip
    trackers.close()
    with pytest.raises(httpx.TransportError):
        httpx.get(f"http://127.0.0.1:{port}/metrics", timeout=5)


def test_a_port_that_is_taken_is_waited_for(tiny, port):
    config = tiny("train.steps=30")
    with socket.socket() as other:
        other.bind(("0.0.0.0", port))
        other.listen()
        mine = Prometheus(config, port)
        time.sleep(0.2)
    assert scrape(port)["md4_steps"] == 30
    mine.close()
