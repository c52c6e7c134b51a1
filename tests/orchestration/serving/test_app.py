"""The service as its users meet it: a real Ray Serve, a real HTTP client, run folders on disk and in S3."""

import asyncio
import json
import os
import signal
import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest
import yaml
from pydantic import TypeAdapter
from ray.serve.schema import ServeDeploySchema

from md4.errors import UserError
from md4.model import build
from md4.samplers import SamplingConfig
from orchestration.runs import Run, load_model
from orchestration.sampling import Request, sample
from orchestration.serving import Client, app
from orchestration.serving.config import EngineConfig, ServingConfig
from orchestration.serving.events import Event, played
from orchestration.serving.models import UnknownModel
from tests.orchestration.driver import wait_for
from tests.orchestration.serving.processes import replicas
from tests.orchestration.small_run import LENGTH, disturbed, make_run, write_checkpoint, write_run
from tests.s3 import BUCKET

pytestmark = [pytest.mark.ray, pytest.mark.timeout(300)]

CONFIG = ServingConfig(
    port=0, num_cpus=0.5, replicas=2, refresh_s=0.2, max_count=8, engine=EngineConfig(max_rows=8, max_waiting_rows=64)
)
LONG = {"count": 8, "length": 1500, "sampling": {"block": 16}, "seed": 1}  # a thousand network calls


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return write_run(tmp_path_factory.mktemp("runs"))


@pytest.fixture(scope="module")
def other(s3_server):
    """A run in S3."""
    s3_server.reset()
    return make_run(f"s3://{BUCKET}/runs", "sampling={sampler: first_hitting}", seed=1, step=3).address


@pytest.fixture(scope="module")
def server(ray_cluster, run, other):
    server = app.serve_run(run, CONFIG, {"other": other})
    yield server
    server.stop()


@pytest.fixture(scope="module")
def client(server) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=server.url, timeout=60) as client:
        yield client


def events_of(response: httpx.Response) -> Iterator[Any]:
    """Server-sent events as they come; the last, with the answer, as it was sent."""
    for line in response.iter_lines():
        if line.startswith("data: "):
            found = json.loads(line.removeprefix("data: "))
            if found["type"] == "done":
                yield found
            else:
                yield TypeAdapter(Event).validate_python(found)


def test_tells_which_models_it_serves(client, run, other):
    loaded, second = load_model(run), load_model(other)
    health = client.get("/healthz").json()
    assert health["hash"] == loaded.weights_hash
    assert {name: info["hash"] for name, info in health["models"].items()} == {
        "small": loaded.weights_hash,
        "other": second.weights_hash,
    }
    model = client.get("/v1/model").json()
    assert (model["hash"], model["step"], model["length"]) == (loaded.weights_hash, 7, LENGTH)
    assert model["sampling"]["steps"] == 24
    models = client.get("/v1/models", headers={"x-request-id": "mine"})
    assert [one["id"] for one in models.json()["data"]] == ["small", "other"]
    assert models.headers.get_list("x-request-id") == ["mine"]  # once, though the proxy and we know it


def test_answers_what_the_command_line_answers(client, run, other):
    own = {"steps": 9, "grid": "uniform", "top_p": 0.9}
    body = {"prompt": "the _{3} of", "count": 3, "seed": 11, "sampling": own, "order": True}
    settings = SamplingConfig.model_validate(own)
    expected = sample(load_model(run), prompts=["the ___ of"], count=3, seed=11, settings=settings)
    found = client.post("/v1/samples", json=body).json()
    assert [one["text"] for one in found["samples"]] == [one.text for one in expected.samples]
    assert found["model"] == {"hash": expected.weights_hash, "step": 7}
    expected = sample(load_model(other), seed=5, settings=load_model(other).config.sampling)
    found = client.post("/v1/samples", json={"model": "other", "seed": 5}).json()
    assert [one["text"] for one in found["samples"]] == [one.text for one in expected.samples]
    refused = client.post("/v1/samples", json={"model": "third"})
    assert (refused.status_code, "allowed: small, other" in refused.json()["detail"]) == (404, True)


def test_a_stream_leads_to_the_answer(client):
    body = {"seed": 2, "count": 2, "prompt": "the _____"}
    whole = client.post("/v1/samples", json=body).json()["samples"]
    with client.stream("POST", "/v1/samples", json={**body, "stream": True}) as response:
        assert response.headers["content-type"].startswith("text/event-stream")
        begun, *steps, done = events_of(response)
    assert ["".join(map(str, canvas)) for canvas in played(begun, steps)] == [one["text"] for one in whole]
    assert done["answer"]["samples"] == whole


def test_many_at_once_are_each_as_they_were_alone(client):
    bodies = [{"seed": seed, "count": 1 + seed % 3, "length": 9 + 7 * (seed % 4)} for seed in range(24)]
    alone = [client.post("/v1/samples", json=body).json()["samples"] for body in bodies]
    with ThreadPoolExecutor(len(bodies)) as pool:
        together = list(pool.map(lambda body: client.post("/v1/samples", json=body).json()["samples"], bodies))
    assert together == alone


def test_programs_on_the_cluster_ask_without_http(client, run):
    async def ask():
        served = Client()
        infos = await served.describe()
        answer = await served.sample("small", Request(prompt="the ____", seed=4))
        scores = await served.score(None, ["the end of"], 4, 1, None)
        events = [event async for event in served.stream(None, Request(seed=4))]
        with pytest.raises(UnknownModel, match="allowed: small, other"):
            await served.sample("third", Request())
        with pytest.raises(UserError, match="33 tokens, the canvas only 32"):
            await served.sample(None, Request(prompt="x" * 33))
        return infos, answer, scores, events

    infos, answer, scores, events = asyncio.run(ask())
    assert [info.name for info in infos] == ["small", "other"]
    body = {"prompt": "the ____", "seed": 4, "sampling": {"steps": None}}
    assert answer.samples[0].text == client.post("/v1/samples", json=body).json()["samples"][0]["text"]
    assert scores[0].tokens == 10
    assert (events[0].type, events[-1].type) == ("begun", "done")


def test_bad_input_and_what_is_too_much_are_said(client):
    assert "33 tokens, the canvas" in client.post("/v1/samples", json={"prompt": "x" * 33}).json()["detail"]
    assert client.post("/v1/samples", content=b"a" * (CONFIG.max_body_bytes + 1)).status_code == 413
    body = {"count": 8, "length": 160, "sampling": {"block": 16}}
    with ThreadPoolExecutor(40) as pool:  # 2 replicas, each with 8 rows under way and 64 waiting
        answers = list(pool.map(lambda seed: client.post("/v1/samples", json={**body, "seed": seed % 2}), range(40)))
    assert {answer.status_code for answer in answers} == {200, 503}
    assert all(int(one.headers["retry-after"]) >= 1 for one in answers if one.status_code == 503)
    whole = {answer.json()["samples"][0]["seed"]: answer.json()["samples"] for answer in answers if answer.is_success}
    assert all(one.json()["samples"] == whole[one.json()["samples"][0]["seed"]] for one in answers if one.is_success)


def figure(url: str, name: str) -> float:
    """The sum over all replicas and models."""
    lines = httpx.get(url).text.splitlines()
    return sum(float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith(f"ray_md4_serving_{name}{{"))


def test_who_leaves_is_not_worked_for_and_figures_tell(server, client):
    assert server.metrics_url is not None
    before = figure(server.metrics_url, "cancelled_total")
    with pytest.raises(httpx.ReadTimeout):
        client.post("/v1/samples", json=LONG, timeout=0.5)
    with client.stream("POST", "/v1/samples", json={**LONG, "stream": True}) as response:
        next(events_of(response))
    wait_for(lambda: figure(server.metrics_url, "cancelled_total") == before + 2, 40, "two cancelled requests")
    wait_for(lambda: figure(server.metrics_url, "requests_running") == 0, 40, "an engine at rest")
    assert figure(server.metrics_url, "answered_total") > 20
    assert figure(server.metrics_url, "call_seconds_count") > 20


def test_newer_weights_are_taken_and_nothing_is_dropped(client, run, other):
    """Last but two, as the weights are others from here on."""
    config = Run(run).config
    with client.stream("POST", "/v1/samples", json={**LONG, "stream": True}) as response:
        events = events_of(response)
        begun = next(events)
        write_checkpoint(Run(run), disturbed(build(config.model), 9), 8)
        write_checkpoint(Run(other), disturbed(build(config.model), 9), 4)
        wait_for(lambda: client.get("/healthz").json()["models"]["small"]["step"] == 8, 30, "newer weights")
        wait_for(lambda: client.get("/healthz").json()["models"]["other"]["step"] == 4, 30, "those in S3")
        (done,) = [event for event in events if isinstance(event, dict)]
    assert begun.model.step == done["answer"]["model"]["step"] == 7  # with the weights that it began with
    new = load_model(run)
    wait_for(  # the other replica, too
        lambda: {client.post("/v1/samples", json={"seed": 3}).json()["model"]["step"] for _ in range(8)} == {8},
        30,
        "newer weights in all replicas",
    )
    found = client.post("/v1/samples", json={"seed": 3}).json()
    assert found["model"]["hash"] == new.weights_hash
    assert found["samples"][0]["text"] == sample(new, seed=3, settings=config.sampling).samples[0].text


def test_a_replica_that_is_killed_costs_nobody_an_answer(client):
    """One of two: streams that it had begun end with an error event, all else is answered by the other one."""
    # The first two are short; the others are not over when they are, on a fast machine either.
    lengths = (96, 96, *[600] * 6)
    bodies = [
        {"seed": seed, "count": 4, "length": length, "sampling": {"block": 16}} for seed, length in enumerate(lengths)
    ]
    expected = [client.post("/v1/samples", json=body).json()["samples"] for body in bodies]
    before = replicas()
    assert len(before) == 2

    def watch(body: dict) -> list:
        with client.stream("POST", "/v1/samples", json={**body, "stream": True}) as response:
            return list(events_of(response)) if response.is_success else []

    with ThreadPoolExecutor(16) as pool:
        streams = [pool.submit(watch, body) for body in bodies]
        wholes = [pool.submit(lambda body=body: client.post("/v1/samples", json=body)) for body in bodies]
        wait_for(lambda: sum(one.done() for one in [*streams, *wholes]) >= 2, 60, "some answers")
        os.kill(before[0].pid, signal.SIGKILL)
    got = [one.result().json().get("samples", one.result().text) for one in wholes]
    assert got == expected, [one for one in got if isinstance(one, str)]
    ends = [one.result()[-1] for one in streams]
    errors = [end for end in ends if not isinstance(end, dict)]
    assert [end["answer"]["samples"] for end in ends if isinstance(end, dict)] == [
        samples for samples, end in zip(expected, ends, strict=True) if isinstance(end, dict)
    ]
    assert 0 < len(errors) < len(ends)
    assert {(error.type, error.status) for error in errors} == {("error", 503)}
    wait_for(lambda: len(replicas()) == 2, 60, "a new replica")


def test_a_second_service_is_refused(server, run):
    with pytest.raises(UserError, match="runs on this Ray cluster already"):
        app.serve_run(run, ServingConfig(port=0))


def test_stops_after_what_it_has_accepted(server, client):
    """Last of those that ask: nobody answers afterwards."""
    with ThreadPoolExecutor(1) as pool, client.stream("POST", "/v1/samples", json={**LONG, "stream": True}) as response:
        events = events_of(response)
        next(events)
        stopped = pool.submit(server.stop)
        last = list(events)[-1]
        stopped.result()
    assert isinstance(last, dict), last
    with pytest.raises(httpx.TransportError):
        client.get("/healthz")


def test_a_port_in_use_is_named(run):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(UserError, match=rf"127\.0\.0\.1, port {port}: Address already in use"):
            app.serve_run(run, ServingConfig(port=port))
    assert app.free_port("127.0.0.1", port) == port


@pytest.mark.parametrize(("host", "port"), [("127.0.0.1", 65536), ("127.0.0.1", -1), ("no such host", 80)])
def test_a_place_that_does_not_exist_is_named(host, port):
    with pytest.raises(UserError, match=str(port)):
        app.free_port(host, port)


def test_runs_that_cannot_be_served_are_refused(run, tmp_path):
    with pytest.raises(UserError, match="not a run's folder"):
        app.serve_run(tmp_path)
    with pytest.raises(UserError, match="two models are called 'small'"):
        app.serve_run(run, CONFIG, {"small": run})


def test_the_written_file_describes_the_same_application(run, other):
    config = CONFIG.model_copy(update={"port": 8123, "min_replicas": 0})
    tree = yaml.safe_load(app.describe_deployment({"small": run, "other": other}, config))
    schema = ServeDeploySchema.model_validate(tree)  # as `serve deploy` reads it
    assert schema.http_options.port == 8123
    (described,) = schema.applications
    assert described.import_path == "orchestration.serving.app:build"
    arguments = app.Arguments.model_validate(described.args)
    assert arguments.models == {"small": str(run), "other": str(other)}
    assert arguments.serving == config.model_copy(update={"host": "127.0.0.1", "port": 8000})
