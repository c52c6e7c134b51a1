"""What every test shares: one thread for torch, and one local Ray cluster for the whole run."""

import os

# Set before anything imports Ray or DeepSpeed; workers inherit them.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("RAY_AUTH_MODE", "disabled")

import pytest
import torch

from pipelines import storage
from tests.s3 import S3, reserve

torch.set_num_threads(1)
_S3_SOCKET = reserve()  # S3 is there, and only there, for this process and those that it starts


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Cheapest first: what needs Ray comes last, so that it runs in one stretch on one cluster."""
    items.sort(key=lambda item: item.get_closest_marker("ray") is not None)


@pytest.fixture(scope="session")
def ray_cluster():
    """A local Ray with 4 logical CPUs, shared by all tests marked `ray`; ended with the test run."""
    import ray

    from orchestration.cluster import start_local

    start_local(num_cpus=4)
    yield
    ray.shutdown()


@pytest.fixture(scope="session")
def s3_server():
    """A real S3 server behind a proxy that can fail (`tests.s3`); AWS_ENDPOINT_URL points there from the beginning."""
    server = S3(_S3_SOCKET)
    yield server
    server.close()


@pytest.fixture
def s3(s3_server, monkeypatch):
    """The same with an empty bucket, no failures, and no long waits between attempts."""
    monkeypatch.setattr(storage, "RETRIES", storage.Retries(first=0.01, longest=0.2, timeout=10))
    s3_server.reset()
    yield s3_server
    s3_server.fails(0)
