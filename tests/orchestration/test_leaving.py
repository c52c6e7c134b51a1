"""A machine that tells Ray that it will be taken away, on a real cluster of several nodes."""

import subprocess
import sys
import textwrap
import time

import pytest

from orchestration.leaving import leave
from tests.nodes import nodes

# An actor on the node named leaves when the node is said to go, as workers do which have saved their work.
_DRIVER = textwrap.dedent("""
    import sys, time, ray
    from ray._private.state import state

    ray.init(address=sys.argv[1], logging_level="ERROR")

    @ray.remote(num_cpus=1, label_selector={"ray.io/node-id": sys.argv[2]})
    class Worker:
        def there(self):
            return True

    worker = Worker.remote()
    ray.get(worker.there.remote())
    print("there", flush=True)
    while sys.argv[2] not in (state.get_draining_nodes() or {}):
        time.sleep(0.2)
    print("told", flush=True)
    if sys.argv[3] == "goes":
        ray.kill(worker)
    sys.stdin.read()
""")


@pytest.fixture(scope="module")
def cluster():
    with nodes(2) as running:
        yield running


@pytest.fixture
def node(cluster):
    found = cluster.add()
    yield found
    cluster.kill(found)


@pytest.fixture
def drive(cluster, node):
    """`drive("goes" | "stays")`: a driver with an actor on the node."""
    started = []

    def start(what: str) -> subprocess.Popen[str]:
        command = [sys.executable, "-c", _DRIVER, cluster.address, node.node_id, what]
        driver = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        started.append(driver)
        assert driver.stdout is not None
        assert driver.stdout.readline() == "there\n"
        return driver

    yield start
    for driver in started:
        driver.communicate(timeout=30)


@pytest.mark.slow
@pytest.mark.ray
def test_it_is_told_and_waits_until_the_work_is_gone(drive, node):
    driver = drive("goes")
    began = time.monotonic()
    assert leave(60, node.node_id) is True
    assert time.monotonic() - began < 30
    assert driver.stdout.readline() == "told\n"


@pytest.mark.slow
@pytest.mark.ray
def test_it_waits_no_longer_than_it_has(drive, node):
    drive("stays")
    began = time.monotonic()
    assert leave(3, node.node_id) is False
    assert 3 <= time.monotonic() - began < 20


def test_nothing_is_there_to_tell():
    began = time.monotonic()
    assert leave(30, "0" * 56) is False
    assert time.monotonic() - began < 5
