"""The service as its users meet it: a real Ray Serve, a real HTTP client, a run folder on disk."""

import socket
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import httpx
import pytest
import torch

from md4.errors import UserError
from md4.samplers import SamplingConfig
from md4.samplers.wording import SETTINGS
from orchestration.runs import Loaded, load_model
from orchestration.sampling import sample
from orchestration.serving import app
from orchestration.serving.config import ServingConfig
from tests.orchestration.small_run import LENGTH, write_run

pytestmark = pytest.mark.ray

CONFIG = ServingConfig(port=0, num_cpus=0.5, max_batch_size=4, batch_wait_ms=100, max_rows=8, max_count=8, max_queued=8)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return write_run(tmp_path_factory.mktemp("runs"))


class Poisoned(torch.nn.Module):
    """A network that answers NaN for rows that begin with "qqqq"."""

    def __init__(self, network: torch.nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, z, t, labels=None):
        sick = (z[:, :4] == "abcdefghijklmnopq".index("q")).all(dim=1)
        return torch.where(sick[:, None, None], torch.nan, self.network(z, t, labels))


def load_poisoned(run: Path) -> Loaded:
    loaded = load_model(run)
    loaded.model.network = Poisoned(loaded.model.network)
    return loaded


@pytest.fixture(scope="module")
def server(ray_cluster, run):
    server = app.serve_run(run, CONFIG, load=partial(load_poisoned, run.resolve()))
    yield server
    server.stop()


@pytest.fixture(scope="module")
def client(server):
    with httpx.Client(base_url=server.url, timeout=60) as client:
        yield client


def test_tells_which_model_it_serves(client, run):
    loaded = load_model(run)
    assert client.get("/healthz").json() == {"status": "ok", "hash": loaded.weights_hash}
    model = client.get("/v1/model").json()
    assert (model["hash"], model["step"], model["length"]) == (loaded.weights_hash, 7, LENGTH)
    assert model["sampling"]["steps"] == 24


def test_answers_what_the_command_line_answers(client, run):
    own = {"steps": 9, "grid": "uniform", "top_p": 0.9}
    body = {"prompt": "the _{3} of", "count": 3, "seed": 11, "sampling": own, "order": True}
    found = client.post("/v1/samples", json=body).json()
    settings = SamplingConfig.model_validate(own)
    expected = sample(load_model(run), prompts=["the ___ of"], count=3, seed=11, settings=settings)
    assert [s["text"] for s in found["samples"]] == [s.text for s in expected.samples]
    assert [s["seed"] for s in found["samples"]] == [11, 12, 13]
    for one in found["samples"]:
        assert one["text"].startswith("the ")
        assert one["text"][7:10] == " of"
        assert "_" not in one["text"]
        assert one["order"][:4] == [-1] * 4
        assert -1 not in one["order"][4:7]
    assert found["model"] == {"hash": expected.weights_hash, "step": 7}
    assert (found["draws_mode"], found["calls"], found["draws"]) == ("exact", expected.network_calls, expected.draws)
    assert found["settings"] == settings.resolve("md4").model_dump(mode="json")
    assert found["draws"] == sum(s["draws"] for s in found["samples"]) == 3 * (LENGTH - 7)
    assert found["counted"] == {}
    assert 0 <= found["timings"]["queue_ms"] <= found["timings"]["total_ms"]
    assert found["timings"]["sample_ms"] <= found["timings"]["total_ms"]


BODIES = [
    {"seed": 1},
    {"seed": 2, "sampling": {"steps": 3, "temperature": 0.5, "top_k": 5}},
    {"seed": 3, "length": 9, "count": 2},
    {"seed": 4, "prompt": "_____ and", "sampling": {"grid": [1, 0.6, 0.1, 0]}, "count": 5},
    {"seed": 5, "sampling": {"top_p": 0.5, "sampler": "first_hitting", "steps": 7, "extrapolate": True}},
    {"seed": 6, "length": 70, "prompt": "a_b", "sampling": {"block": 9}},
    {"seed": 7, "count": 8, "sampling": {"sampler": "first_hitting"}, "stop": "e"},
]


def test_company_changes_nothing_but_the_batch(client):
    """Seven requests at once, of mixed length and settings: each as it was alone, and most of them in one batch."""
    alone = [client.post("/v1/samples", json=body).json() for body in BODIES]
    assert {one["batch_requests"] for one in alone} == {1}
    with ThreadPoolExecutor(len(BODIES)) as pool:
        together = list(pool.map(lambda body: client.post("/v1/samples", json=body).json(), BODIES))
    assert [one["samples"] for one in together] == [one["samples"] for one in alone]
    assert max(one["batch_requests"] for one in together) > 1


def test_a_stop_token_and_null_settings(client):
    body = {"seed": 1, "count": 8, "stop": "e", "sampling": {"steps": None}}
    found = client.post("/v1/samples", json=body).json()
    assert {one["stopped"] for one in found["samples"]} == {one["text"].endswith("e") for one in found["samples"]}
    assert all("e" not in one["text"][:-1] for one in found["samples"])
    assert found["settings"]["steps"] == 256  # the sampler's default, not the run's 24


def test_nan_is_a_500_for_its_request_alone(client):
    """Sent together: the request whose rows the network can't predict, and sound ones."""
    bodies = [{"seed": 1}, {"seed": 2, "prompt": "qqqq"}, {"seed": 3, "count": 2}]
    alone = [client.post("/v1/samples", json=body) for body in bodies]
    with ThreadPoolExecutor(3) as pool:
        together = list(pool.map(lambda body: client.post("/v1/samples", json=body), bodies))
    for answers in (alone, together):
        assert [answer.status_code for answer in answers] == [200, 500, 200]
        assert "NaN" in answers[1].json()["detail"]
    assert [together[i].json()["samples"] for i in (0, 2)] == [alone[i].json()["samples"] for i in (0, 2)]


def test_without_a_seed_answers_differ_and_can_be_repeated(client):
    first, second = (client.post("/v1/samples", json={}).json()["samples"][0] for _ in range(2))
    assert first["text"] != second["text"]
    again = client.post("/v1/samples", json={"seed": first["seed"]}).json()["samples"][0]
    assert again == first


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({"count": 0}, "count=0: input should be greater than or equal to 1"),
        ({"count": 9}, "at most 8 samples"),
        ({"sampling": {"steps": 0}}, "sampling.steps=0: input should be greater than or equal to 1"),
        ({"sampling": {"steps": 1.5}}, "sampling.steps=1.5"),
        ({"sampling": {"grid": "sine"}}, "sampling.grid='sine': allowed are 'uniform', 'cosine', or times"),
        ({"sampling": {"grid": [1, 0.5]}}, "the times of a grid fall strictly from 1 to 0"),
        ({"sampling": {"temperature": 0}}, "sampling.temperature=0"),
        ({"sampling": {"temperature": "hot"}}, "sampling.temperature='hot'"),
        ({"sampling": {"top_p": 1.01}}, "sampling.top_p=1.01"),
        ({"sampling": {"min_reveals": 4, "max_reveals": 2}}, "min_reveals=4 is above max_reveals=2"),
        ({"sampling": {"guidance": 2}}, "guidance=2.0 is towards a class: this model has no classes"),
        ({"sampling": {"sampler": "thinning"}}, "sampler=thinning is not for models of objective md4"),
        ({"sampling": {"extrapolate": True}}, "extrapolate=True is no setting of the sampler ancestral"),
        ({"sampling": {"stepz": 3}}, "unknown setting 'sampling.stepz'; did you mean 'steps'? allowed: sampler"),
        ({"sampling": 3}, "sampling=3"),
        ({"steps": 3}, "steps is a setting of the sampler: it belongs into the object 'sampling'"),
        ({"stop": "ab"}, "stop: 'ab' is 2 tokens of the vocabulary 'text8', not one"),
        ({"stop": 3}, "stop=3"),
        ({"length": 4097}, "length=4097: at most 4,096 tokens"),
        ({"seed": -1}, "seed=-1"),
        ({"seed": 2**53}, "seed="),
        ({"seed": 2**53 - 1, "count": 2}, "seed is"),
        ({"length": 33}, "need block=N with N of at most 32"),
        ({"label": 0}, "no classes"),
        ({"prompt": ""}, "empty"),
        ({"prompt": "x" * 33}, "33 tokens, the canvas only 32"),
        ({"prompt": "Zürich"}, "'ü' at position 1"),
        ({"prompt": 5}, "prompt=5"),
        ({"promt": "a"}, "unknown setting 'promt'; did you mean 'prompt'? allowed: count, prompt, length"),
        ([], "dictionary"),
    ],
)
def test_bad_requests_are_named(client, body, message):
    response = client.post("/v1/samples", json=body)
    assert response.status_code == 422
    assert message in response.json()["detail"]


@pytest.mark.parametrize(
    "content",
    [
        b'{"count": 1',
        b"",
        b"\xff\xfe",
        b"null",
        b'{"temperature": NaN}',
        b'{"prompt": "\\ud800"}',
        b'{"seed": ' + b"9" * 5000 + b"}",
        b"[" * 100_000,
    ],
)
def test_bodies_that_are_not_proper_json(client, content):
    response = client.post("/v1/samples", content=content, headers={"content-type": "application/json"})
    assert response.status_code in (400, 422)
    assert response.json()["detail"]


def test_long_bodies_are_refused_with_and_without_a_length(client):
    content = b'{"prompt": "' + b"a" * app.MAX_BODY_BYTES + b'"}'
    for body in (content, iter([content[: 1 << 17], content[1 << 17 :]])):
        response = client.post("/v1/samples", content=body, headers={"content-type": "application/json"})
        assert response.status_code == 413
        assert "longer than" in response.json()["detail"]


def test_more_than_it_can_hold_is_refused_and_the_rest_answered(client):
    """4 in a batch, 4 gathering, 8 waiting: of 30 requests some are told to come back, none is lost."""
    body = {"count": 8, "sampling": {"steps": 10_000}, "seed": 1}

    def ask(_: int) -> httpx.Response:
        return httpx.post(f"{client.base_url}/v1/samples", json=body, timeout=60)

    with ThreadPoolExecutor(30) as pool:
        answers = list(pool.map(ask, range(30)))
    refused = [answer for answer in answers if answer.status_code == 503]
    answered = [answer.json()["samples"] for answer in answers if answer.status_code == 200]
    assert len(refused) + len(answered) == 30
    assert refused
    assert len(answered) >= 8
    assert all(answer.headers["retry-after"] == "1" for answer in refused)
    assert all(samples == answered[0] for samples in answered)


def test_the_interface_is_described(client):
    document = client.get("/openapi.json").json()
    post = document["paths"]["/v1/samples"]["post"]
    assert {"200", "413", "422", "500", "503"} <= post["responses"].keys()
    for status in ("413", "422", "500"):
        assert post["responses"][status]["content"]["application/json"]["schema"]["$ref"].endswith("/Problem")
    request = document["components"]["schemas"]["SampleRequest"]
    assert request["additionalProperties"] is False
    settings = document["components"]["schemas"]["SamplingConfig"]
    assert settings["additionalProperties"] is False
    assert set(settings["properties"]) == set(SETTINGS)
    for field in settings["properties"].values():
        assert any("description" in part for part in [field, *field.get("anyOf", [])])
    assert set(document["paths"]) == {"/healthz", "/v1/model", "/v1/samples"}


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


def test_a_second_service_is_refused(server, run):
    with pytest.raises(UserError, match="runs on this Ray cluster already"):
        app.serve_run(run, ServingConfig(port=0))


def test_a_folder_that_is_no_run_is_refused(tmp_path):
    with pytest.raises(UserError, match="not a run's folder"):
        app.serve_run(tmp_path)


def test_stops(server, client):
    """Last of this file: nobody answers afterwards."""
    server.stop()
    with pytest.raises(httpx.TransportError):
        client.get("/healthz")
