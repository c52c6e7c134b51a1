"""Clients that leave, request ids, and the log, over real sockets."""

import asyncio
import json
import re
import socket

import openai
import pytest

from tests.orchestration.serving.conftest import wait_until


@pytest.fixture
def slow(engines):
    """The engine of the slow model, with nothing to do."""
    slow = engines["slow"]
    wait_until(lambda: (slow.stats().rows_running, slow.stats().rows_waiting) == (0, 0))
    return slow


def send(server, route: str, body: dict) -> socket.socket:
    """A request on a connection of its own, without waiting for the answer."""
    content = json.dumps(body).encode()
    connection = socket.create_connection((server.host, server.port))
    head = f"POST {route} HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: {len(content)}\r\n"
    connection.sendall(f"{head}x-request-id: {body.get('seed')}-left\r\n\r\n".encode() + content)
    return connection


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("route", ["/v1/samples", "/v1/completions"])
def test_who_leaves_is_worked_for_no_longer(served, slow, log, route, stream):
    body = {"model": "slow", "seed": 1, "stream": stream, "sampling": {"sampler": "first_hitting"}}
    if "completions" in route:
        body |= {"prompt": "a", "max_tokens": 31}
    connection = send(served, route, body)
    wait_until(lambda: slow.stats().requests_running == 1)
    calls = slow.stats().calls
    if stream:
        assert b"event-stream" in connection.recv(4096)
    connection.close()
    wait_until(lambda: slow.stats().requests_running == 0, seconds=0.6)  # alone it would take a second
    assert slow.stats().calls - calls < 20
    line = log.of("1-left")
    assert line["left"] is True if stream else line["status"] == 499


def test_who_waits_and_leaves_is_forgotten(served, slow, client):
    """8 places: 8 rows are under way, 8 wait; these leave, and another request has room at once."""
    first = send(served, "/v1/samples", {"model": "slow", "count": 8, "seed": 1})
    wait_until(lambda: slow.stats().rows_running == 8)
    second = send(served, "/v1/samples", {"model": "slow", "count": 8, "seed": 2})
    wait_until(lambda: slow.stats().rows_waiting == 8)
    assert client.post("/v1/samples", json={"model": "slow"}).status_code == 503
    second.close()
    wait_until(lambda: slow.stats().rows_waiting == 0)
    assert client.post("/v1/samples", json={"model": "slow", "length": 4}).status_code == 200
    first.close()


def test_openais_client_comes_back_when_it_is_told_to(served, slow):
    held = [send(served, "/v1/samples", {"model": "slow", "count": 8, "seed": 3}) for _ in range(2)]
    wait_until(lambda: slow.stats().rows_waiting == 8)
    refused = slow.stats().refused
    with openai.OpenAI(base_url=f"{served.url}/v1", api_key="any", max_retries=5) as ai:
        assert len(ai.completions.create(model="slow", prompt="a", max_tokens=31).choices) == 1
    assert slow.stats().refused > refused
    for connection in held:
        assert b" 200 OK" in connection.recv(64)
        connection.close()


def test_openais_client_leaves_a_stream(served, slow):
    async def leave() -> None:
        async with openai.AsyncOpenAI(base_url=f"{served.url}/v1", api_key="any", max_retries=0) as ai:
            stream = await ai.completions.create(model="slow", prompt="a", max_tokens=31, stream=True)
            async for _ in stream:
                break
            await stream.close()

    before = slow.stats().cancelled
    asyncio.run(leave())
    wait_until(lambda: (slow.stats().cancelled, slow.stats().requests_running) == (before + 1, 0))


def test_every_answer_has_an_id_and_a_line(client, log):
    found = client.post("/v1/samples", json={"seed": 1, "count": 2}, headers={"x-request-id": "my-id.1"})
    assert found.headers["x-request-id"] == "my-id.1"
    line = log.of("my-id.1")
    assert (line["method"], line["route"], line["status"]) == ("POST", "/v1/samples", 200)
    assert (line["model"], line["count"], line["tokens"]) == ("small", 2, 64)
    assert line["calls"] == sum(one["calls"] for one in found.json()["samples"])
    assert 0 <= line["queue_s"] <= line["seconds"]
    assert line["client"] == "127.0.0.1"
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT.*\+00:00", line["time"])
    for given in ("", "a b", "x" * 65, "<script>"):
        made = client.get("/v1/models/none", headers={"x-request-id": given})
        assert re.fullmatch(r"[0-9a-f]{32}", made.headers["x-request-id"])
        assert log.of(made.headers["x-request-id"])["route"] == "/v1/models/{name}"
    lost = client.get("/nothing")
    assert log.of(lost.headers["x-request-id"])["status"] == 404


@pytest.mark.parametrize(
    ("route", "body"),
    [
        ("/v1/samples", {"prompt": "verysecret"}),
        ("/v1/samples", {"prompt": "verysecret ü"}),
        ("/v1/samples", {"prompt": "verysecret", "stream": True}),
        ("/v1/completions", {"prompt": "verysecret", "suffix": "verysecret"}),
        ("/v1/completions", {"prompt": "verysecret", "stream": True, "extra": "verysecret"}),
        ("/v1/score", {"texts": ["verysecret"]}),
    ],
)
def test_prompts_are_logged_for_who_wants_that_alone(client, serve, log, route, body):
    name = client.post(route, json=body).headers["x-request-id"]
    log.of(name)
    assert "verysecret" not in log.getvalue()
    if "extra" in body or "ü" in str(body):
        return
    with serve(log_prompts=True) as server:
        name = client.post(server.url + route, json=body).headers["x-request-id"]
        assert "verysecret" in str(log.of(name))


def test_an_error_that_nobody_expected_is_a_500_with_an_id(engines, log, monkeypatch, client):
    async def bug(*_):
        raise KeyError("verysecret")

    monkeypatch.setattr(engines["small"], "score", bug)
    response = client.post("/v1/score", json={"texts": ["a"]})
    assert response.status_code == 500
    assert "x-request-id" in response.json()["detail"]
    assert "verysecret" not in response.text
    lines = [line for line in log.all() if line["id"] == response.headers["x-request-id"]]
    assert "KeyError" in lines[0]["exc_info"]
    assert client.post("/v1/completions", json={"prompt": "a"}).status_code == 200
