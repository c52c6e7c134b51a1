"""One cluster with a token for all tests of jobs, and what they need to know about it."""

from pathlib import Path

import pytest

from tests.orchestration.jobs.head import Head

TOKEN = "0123456789abcdef" * 4
SECRET = "known-to-the-machines-of-the-cluster"  # as TEAM_KEY


@pytest.fixture(scope="session")
def head():
    """A real cluster with a dashboard, token authentication on (`tests.orchestration.jobs.head`)."""
    found = Head(TOKEN, TEAM_KEY=SECRET)
    yield found
    found.close()


@pytest.fixture(scope="session")
def cache(tmp_path_factory) -> Path:
    """The cache folder of all senders of this test run: what is the same is packed once."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def sender(head, cache, monkeypatch) -> Head:
    """The cluster, and this process as one that may send it jobs."""
    for name, value in {**Head.access(head.token), "MD4_CACHE": str(cache)}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", head.address)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.delenv("RAY_AUTH_TOKEN", raising=False)
    monkeypatch.delenv("MD4_PLACE", raising=False)
    return head
