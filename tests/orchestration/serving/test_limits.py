"""Who may ask, and how much: keys, rates, time."""

import asyncio
import hashlib

import httpx
import openai
import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient

from md4.errors import UserError
from orchestration.serving.http import make_api
from orchestration.serving.keys import Keys, new
from orchestration.serving.models import Local
from orchestration.serving.rates import Rates, Window
from tests.orchestration.serving.conftest import replace_config, wait_until


def test_a_key_and_its_line(tmp_path):
    key, line = new("alice")
    assert line == f"alice: {hashlib.sha256(key.encode()).hexdigest()}"
    assert new("alice")[0] != key
    file = tmp_path / "keys"
    file.write_text(f"# who may ask\n\n{line}  # hers\n")
    keys = Keys(file)
    assert keys.name_of(key) == "alice"
    assert keys.name_of(key + "x") is None
    assert keys.name_of(line.split(": ")[1]) is None, "the hash is no key"
    assert keys.name_of("\udcff") is None
    other, more = new("bob")
    file.write_text(f"{line}\n{more}\n")
    assert keys.name_of(other) == "bob"
    file.write_text("nonsense")
    assert keys.name_of(key) == "alice", "what can't be read changes nothing"
    file.write_text(more)
    assert keys.name_of(key) is None, "taken back"


@pytest.mark.parametrize("text", ["", "# nobody\n", "alice: 12\n", "alice\n", f"a: {'0' * 64}\na: {'1' * 64}\n"])
def test_files_of_keys_that_are_none(tmp_path, text):
    (tmp_path / "keys").write_text(text)
    with pytest.raises(UserError, match="file of keys"):
        Keys(tmp_path / "keys")
    with pytest.raises(UserError, match="can't be read"):
        Keys(tmp_path / "nothing")
    with pytest.raises(UserError, match="name 'a b'"):
        new("a b")


def test_keys_over_http(serve, tmp_path, log):
    key, line = new("alice")
    (tmp_path / "keys").write_text(line)
    with serve(keys=tmp_path / "keys") as server, httpx.Client(base_url=server.url) as client:
        for headers in ({}, {"authorization": "Bearer wrong"}, {"authorization": f"Basic {key}"}):
            response = client.post("/v1/samples", json={}, headers=headers)
            assert response.status_code == 401
            assert response.headers["www-authenticate"].startswith("Bearer")
            assert response.json()["detail"]
        assert client.get("/healthz").status_code == 200
        assert client.get("/docs").status_code == 200
        described = client.get("/openapi.json").json()
        assert described["components"]["securitySchemes"]["HTTPBearer"]["scheme"] == "bearer"
        assert described["paths"]["/v1/samples"]["post"]["security"] == [{"HTTPBearer": []}]
        found = client.post("/v1/samples", json={"seed": 1}, headers={"authorization": f"bearer {key}"})
        assert found.status_code == 200
        assert log.of(found.headers["x-request-id"])["key"] == "alice"
        with pytest.raises(openai.AuthenticationError, match="not known"):
            openai.OpenAI(base_url=f"{server.url}/v1", api_key="wrong", max_retries=0).models.list()
        assert openai.OpenAI(base_url=f"{server.url}/v1", api_key=key, max_retries=0).models.list().data


def test_keys_are_asked_for_wherever_the_application_is_mounted(engines, tmp_path):
    key, line = new("alice")
    (tmp_path / "keys").write_text(line)
    outer = FastAPI()
    outer.mount("/below", make_api(Local(engines), replace_config(keys=tmp_path / "keys")))
    with TestClient(outer) as client:
        assert client.post("/below/v1/samples", json={}).status_code == 401
        assert "error" in client.post("/below/v1/completions", json={}).json()
        assert client.get("/below/v1/model", headers={"authorization": f"Bearer {key}"}).status_code == 200
        assert client.get("/below/healthz").status_code == 200


@pytest.mark.parametrize(
    ("window", "most", "wait"),
    [
        (Window(0, 0, 5, 90), 5, 0),
        (Window(60, 30, 0, 0), 20, 10),  # 30 count now and one a second leaves
        (Window(60, 30, 10, 90), 20, 20),
        (Window(0, 0, 60, 90), 20, 30 + 40),  # half a minute until they begin to leave
        (Window(0, 0, 60, 90), 0, 90),
    ],
)
def test_time_until_there_is_room(window, most, wait):
    assert window.wait_s(most) == pytest.approx(wait)


def test_rates_are_each_clients_own():
    async def ask() -> None:
        rates = Rates(3, None, "async+memory://")
        for left in (2, 1, 0):
            assert (await rates.take("a", "requests", 1))["x-ratelimit-remaining-requests"] == str(left)
        with pytest.raises(Exception, match="more than 3 requests a minute") as caught:
            await rates.take("a", "requests", 1)
        assert caught.value.status == 429  # type: ignore[attr-defined]
        assert 1 <= int(caught.value.headers["retry-after"]) <= 120  # type: ignore[attr-defined]
        assert await rates.take("b", "requests", 1)
        assert await rates.take("a", "tokens", 10**9) == {}

    asyncio.run(ask())


@pytest.mark.parametrize("storage", ["nowhere://", "memory://"])
def test_storages_that_cannot_be_used(storage, engines):
    with pytest.raises(UserError, match="rate_storage"):
        make_api(Local(engines), replace_config(rate_storage=storage, requests_per_minute=1))


def test_rates_over_http(serve):
    with serve(requests_per_minute=4, tokens_per_minute=100) as server, httpx.Client(base_url=server.url) as client:
        first = client.post("/v1/samples", json={"length": 8, "count": 5})
        assert first.status_code == 200
        assert first.headers["x-ratelimit-limit-requests"] == "4"
        assert first.headers["x-ratelimit-remaining-requests"] == "3"
        assert first.headers["x-ratelimit-remaining-tokens"] == "60"
        greedy = client.post("/v1/samples", json={"length": 101})
        assert greedy.status_code == 422
        assert "101 tokens; allowed are 100 a minute" in greedy.json()["detail"]
        spent = client.post("/v1/completions", json={"prompt": "a", "max_tokens": 90})
        assert spent.status_code == 429
        assert int(spent.headers["retry-after"]) >= 1
        assert int(spent.headers["x-ratelimit-remaining-tokens"]) >= 60
        assert spent.json()["error"]["code"] == "rate_limit_exceeded"
        assert client.post("/v1/samples", json={"length": 30, "count": 2}).status_code == 200
        # Where a minute has just ended, one more is let in.
        over = next(found for _ in range(3) if (found := client.get("/v1/models")).status_code == 429)
        assert "more than 4 requests a minute" in over.json()["error"]["message"]
        assert client.get("/healthz").status_code == 200


@pytest.mark.parametrize("route", ["/v1/samples", "/v1/completions"])
def test_time_is_up(serve, engines, route):
    body = {"model": "slow", "seed": 1, **({"prompt": "", "max_tokens": 32} if "completions" in route else {})}
    with serve(timeout_s=0.4) as server, httpx.Client(base_url=server.url) as client:
        response = client.post(route, json=body)
        assert response.status_code == 504
        assert "longer than 0.4 s" in response.text
        streamed = client.post(route, json={**body, "stream": True})
        assert streamed.status_code in (200, 504)  # on a busy machine nothing may have been sent yet
        assert "longer than 0.4 s" in streamed.text.strip().split("\n\n")[-1]
    wait_until(lambda: engines["slow"].stats().requests_running == 0)
