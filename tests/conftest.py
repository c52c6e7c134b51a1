"""What every test shares: one thread for torch, and one local Ray cluster for the whole run."""

import os

# Set before anything imports Ray or DeepSpeed; workers inherit them.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("RAY_AUTH_MODE", "disabled")

import pytest
import torch

torch.set_num_threads(1)


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
