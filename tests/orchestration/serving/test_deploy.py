"""The file that `md4 serve --write` makes, in the hands of `serve deploy`, on a cluster of its own."""

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import httpx
import pytest
import yaml

from md4.model import build
from orchestration.runs import Run, load_model
from orchestration.sampling import sample
from tests.orchestration.driver import wait_for
from tests.orchestration.small_run import disturbed, write_checkpoint, write_run

ROOT = Path(__file__).resolve().parents[3]
BIN = Path(sys.executable).parent


def free_port() -> int:
    with socket.socket() as place:
        place.bind(("127.0.0.1", 0))
        return place.getsockname()[1]


@pytest.fixture
def dashboard(tmp_path) -> Iterator[int]:
    """The port of the dashboard of a cluster of one node."""
    port = free_port()
    command = f"{BIN}/ray start --head --block --disable-usage-stats --num-cpus 4 --port {free_port()}"
    command += f" --dashboard-port {port} --object-store-memory 200000000"
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    with (tmp_path / "ray.log").open("w") as log:
        head = subprocess.Popen(command.split(), stdout=log, stderr=log, env=environment, start_new_session=True)
    try:
        wait_for(lambda: answers(f"http://127.0.0.1:{port}/api/version"), 90, "the dashboard")
        yield port
    finally:
        head.send_signal(signal.SIGTERM)
        head.wait(60)


def answers(url: str) -> bool:
    with suppress(httpx.TransportError):
        return httpx.get(url).is_success
    return False


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.timeout(600)
def test_deployed_asked_refreshed_and_ended(dashboard, tmp_path):
    run, port, file = write_run(tmp_path), free_port(), tmp_path / "serve.yaml"
    environment = os.environ | {"RAY_DASHBOARD_ADDRESS": f"http://127.0.0.1:{dashboard}", "PYTHONPATH": str(ROOT)}

    def command(*words: str) -> str:
        done = subprocess.run(words, capture_output=True, text=True, env=environment, timeout=180, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    said = command(f"{BIN}/md4", "serve", str(run), "num_cpus=0.5", "--port", str(port), "--write", str(file))
    assert f"serve deploy {file}" in said
    command(f"{BIN}/serve", "deploy", str(file))
    url = f"http://127.0.0.1:{port}"
    wait_for(lambda: answers(f"{url}/healthz"), 180, "the service")
    found = httpx.post(f"{url}/v1/samples", json={"seed": 3}, timeout=60).json()
    assert found["samples"][0]["text"] == sample(load_model(run), seed=3).samples[0].text

    # Newer weights, and another user_config: a light update, no process is started anew.
    write_checkpoint(Run(run), disturbed(build(Run(run).config.model), 5), 9)
    tree = yaml.safe_load(file.read_text())
    tree["applications"][0]["deployments"][0]["user_config"]["refresh"] = 1
    file.write_text(yaml.safe_dump(tree))
    command(f"{BIN}/serve", "deploy", str(file))
    wait_for(lambda: httpx.get(f"{url}/healthz").json()["models"]["small"]["step"] == 9, 60, "newer weights")
    found = httpx.post(f"{url}/v1/samples", json={"seed": 3}, timeout=60).json()
    assert found["model"]["hash"] == load_model(run).weights_hash
    command(f"{BIN}/serve", "shutdown", "-y")
    wait_for(lambda: not answers(f"{url}/healthz"), 60, "the end")
