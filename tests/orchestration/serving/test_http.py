"""The service's own routes over real HTTP: samples, streams, images, scores, and what is refused."""

import base64
import io
import json
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from PIL import Image

from md4.samplers import SamplingConfig
from orchestration.sampling import sample
from orchestration.serving.events import Begun, Step, played
from orchestration.serving.messages import SampleRequest, ScoreRequest
from orchestration.serving.openai_messages import CompletionRequest, ImageRequest
from tests.orchestration.serving.conftest import CONFIG, wait_until
from tests.orchestration.small_run import LENGTH

JSON = {"content-type": "application/json"}


def events_of(response) -> list[tuple[str, dict]]:
    """Server-sent events as (type, data)."""
    found = []
    for block in response.text.strip().split("\n\n"):
        kind, data = block.split("\n")
        found.append((kind.removeprefix("event: "), json.loads(data.removeprefix("data: "))))
    return found


def replayed(events: list[tuple[str, dict]]) -> list[list]:
    assert [kind for kind, _ in events[:1] + events[-1:]] == ["begun", "done"]
    steps = [Step.model_validate(data) for kind, data in events if kind == "step"]
    assert len(steps) == len(events) - 2
    return played(Begun.model_validate(events[0][1]), steps)


def test_tells_what_it_serves(client, runs):
    health = client.get("/healthz").json()
    assert (health["status"], health["hash"]) == ("ok", runs["small"].weights_hash)
    assert health["models"]["digits"] == {"hash": runs["digits"].weights_hash, "step": runs["digits"].step}
    model = client.get("/v1/model").json()
    assert (model["name"], model["length"], model["shape"]) == ("small", LENGTH, None)
    assert model["sampling"]["steps"] == 24


def test_answers_what_the_library_answers(client, runs):
    own = {"steps": 9, "grid": "uniform", "top_p": 0.9}
    body = {"prompt": "the _{3} of", "count": 3, "seed": 11, "sampling": own, "order": True}
    found = client.post("/v1/samples", json=body).json()
    chosen = SamplingConfig.model_validate(own)
    expected = sample(runs["small"], prompts=["the ___ of"], count=3, seed=11, settings=chosen)
    assert [s["text"] for s in found["samples"]] == [s.text for s in expected.samples]
    assert found["samples"][0]["order"][:4] == [-1] * 4
    assert found["settings"] == chosen.resolve("md4").model_dump(mode="json")
    assert found["model"] == {"hash": expected.weights_hash, "step": 7}
    assert (found["draws"], found["draws_mode"]) == (expected.draws, "exact")
    for one in found["samples"]:
        assert (one["prompt_tokens"], one["completion_tokens"], one["completion"]) == (7, LENGTH - 7, None)
    times = found["timings"]
    assert 0 <= times["queue_ms"] + times["sample_ms"] <= times["total_ms"]
    assert 0 < times["first_token_ms"] <= times["total_ms"]


def test_settings_kept_with_the_model_are_used_by_name(client):
    """As given themselves; a model tells what it has, and a request for what there isn't is told, too."""
    for named, plain in (
        ({"grid": "searched", "steps": 4}, {"grid": [1, 0.9, 0.5, 0.3, 0]}),
        ({"sampler": "best", "steps": 8}, {"sampler": "remdm", "steps": 7, "grid": "cosine", "eta": 0.3}),
    ):
        found, expected = (
            client.post("/v1/samples", json={"seed": 4, "sampling": sampling}).json() for sampling in (named, plain)
        )
        assert found["settings"] == expected["settings"]
        assert [one["text"] for one in found["samples"]] == [one["text"] for one in expected["samples"]]
    model = client.get("/v1/model").json()
    assert model["samplers"]["best"] == ["steps"]
    assert model["saved"]["named"]["searched"]["4"]["grid"] == [1, 0.9, 0.5, 0.3, 0]
    assert "best" not in client.get("/v1/models/digits").json()["info"]["samplers"]
    absent = client.post("/v1/samples", json={"sampling": {"grid": "searched", "steps": 5}})
    assert absent.status_code == 422
    assert "grid=searched with steps=5 is not kept with this model; there is best for steps=8" in absent.text
    # A stream of growing text has to know that this one may take back what it revealed.
    body = {"prompt": "the ", "max_tokens": 4, "seed": 1, "sampling": {"sampler": "best", "steps": 8}}
    whole = client.post("/v1/completions", json=body).json()["choices"][0]["text"]
    streamed = client.post("/v1/completions", json={**body, "stream": True}).text
    chunks = [line.removeprefix("data: ") for line in streamed.splitlines() if line.startswith("data: {")]
    assert "".join(choice["text"] for chunk in chunks for choice in json.loads(chunk)["choices"]) == whole


@pytest.mark.parametrize("sampler", ["ancestral", "remdm", "p2"])
def test_a_stream_played_back_is_the_answer(client, sampler):
    body = {"prompt": "the _{3} of", "count": 2, "seed": 5, "sampling": {"sampler": sampler, "steps": 12}}
    whole = client.post("/v1/samples", json=body).json()
    response = client.post("/v1/samples", json={**body, "stream": True})
    assert response.headers["content-type"].startswith("text/event-stream")
    events = events_of(response)
    answer = events[-1][1]["answer"]
    assert answer["samples"] == whole["samples"]
    assert answer.keys() == whole.keys()
    assert ["".join(pieces) for pieces in replayed(events)] == [one["text"] for one in whole["samples"]]
    assert [one["seed"] for one in events[0][1]["samples"]] == [5, 6]
    assert "".join(piece or "_" for piece in events[0][1]["samples"][0]["canvas"]).startswith("the ___ of_")


def png(array: np.ndarray) -> str:
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, "PNG")
    return base64.b64encode(buffer.getvalue()).decode()


def levels_of(one: dict) -> np.ndarray:
    return np.array(one["text"].split(), int).reshape(8, 8)


def test_images_are_filled_where_they_are_hidden(client):
    given_levels = np.arange(64).reshape(8, 8) % 17
    hidden = np.zeros((8, 8), bool)
    hidden[2:5, 3:8] = True
    flat = [None if hole else int(level) for level, hole in zip(given_levels.flat, hidden.flat, strict=True)]
    lines = [flat[start : start + 8] for start in range(0, 64, 8)]
    nested = [[[level] for level in line] for line in lines]
    words = " ".join("_" if level is None else str(level) for level in flat)
    shown = np.rint(given_levels * 255 / 16).astype(np.uint8)
    ways = [
        {"pixels": flat},
        {"pixels": lines},
        {"pixels": nested},
        {"prompt": words},
        {"image": png(shown), "mask": png(hidden.astype(np.uint8) * 255)},
    ]
    answers = []
    for way in ways:
        body = {"model": "digits", "seed": 3, "png": True, **way}
        answers.append(client.post("/v1/samples", json=body).json()["samples"][0])
    assert all(one == answers[0] for one in answers)
    levels = levels_of(answers[0])
    assert (levels[~hidden] == given_levels[~hidden]).all()
    assert (levels[hidden] != given_levels[hidden]).any()
    picture = np.asarray(Image.open(io.BytesIO(base64.b64decode(answers[0]["png"]))))
    assert (picture == np.rint(levels * 255 / 16)).all()
    # The picture of an answer is an image for the next request.
    again = {"model": "digits", "image": answers[0]["png"], "mask": png(hidden.astype(np.uint8) * 255), "seed": 3}
    assert (levels_of(client.post("/v1/samples", json=again).json()["samples"][0]) == levels).all()
    events = events_of(client.post("/v1/samples", json={"model": "digits", "pixels": flat, "seed": 3, "stream": True}))
    assert events[0][1]["shape"] == [8, 8, 1]
    assert replayed(events) == [levels.flatten().tolist()]


def test_scores(client, runs):
    texts = ["the cat sat on the mat", "zq xj kk vv"]
    found = client.post("/v1/score", json={"texts": texts, "draws": 4, "seed": 1}).json()["scores"]
    assert [one["characters"] for one in found] == [22, 11]
    alone = client.post("/v1/score", json={"texts": texts[1:], "draws": 4, "seed": 1}).json()["scores"]
    assert alone[0]["nats"] == pytest.approx(found[1]["nats"], rel=1e-5)
    for one, text in zip(found, texts, strict=True):
        assert one["bits_per_character"] == pytest.approx(one["nats"] / np.log(2) / len(text), rel=1e-6)
        assert one["model"]["hash"] == runs["small"].weights_hash


REFUSED = [
    ({"count": 0}, "count=0: input should be greater than or equal to 1"),
    ({"count": 9}, "count=9: at most 8 samples a request"),
    ({"sampling": {"steps": 1001}}, "sampling.steps=1001: at most 1,000"),
    ({"sampling": {"grid": "sine"}}, "sampling.grid='sine': allowed are 'uniform', 'cosine', or times"),
    ({"sampling": {"stepz": 3}}, "unknown setting 'sampling.stepz'; did you mean 'steps'?"),
    ({"steps": 3}, "steps is a setting of the sampler: it belongs into the object 'sampling'"),
    ({"promt": "a"}, "unknown setting 'promt'; did you mean 'prompt'?"),
    ({"length": 201}, "length=201: at most 200 tokens"),
    ({"prompt": "x" * 33}, "33 tokens, the canvas only 32"),
    ({"prompt": "Zürich"}, "'ü' at position 1"),
    ({"prompt": "a", "pixels": [1]}, "prompt and pixels: only one of them"),
    ({"pixels": [1]}, "model 'small' writes text"),
    ({"png": True}, "model 'small' writes text"),
    ({"image": "aa"}, "image and mask go together"),
    ({"model": "digits", "pixels": [1]}, "1 levels; an image of 8 lines, 8 columns and 1 channels has 64"),
    ({"model": "digits", "pixels": [17] * 64}, "17 at line 0, column 0 is no level; allowed are whole numbers from 0"),
    ({"model": "digits", "pixels": [[0] * 8] * 7}, "8 lists of 8 lists of 1 levels"),
    ({"model": "digits", "image": "aa", "mask": "aa"}, "image: a PNG in base64 is wanted"),
    (
        {"model": "digits", "image": png(np.zeros((9, 8), np.uint8)), "mask": png(np.zeros((8, 8), np.uint8))},
        "image: it is 8 wide and 9 high; the model's images are 8 and 8",
    ),
    (
        {"model": "digits", "image": png(np.zeros((8, 8), np.uint8)), "mask": png(np.zeros((8, 8), np.uint8))},
        "it has no white pixel",
    ),
]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(("body", "message"), REFUSED, ids=range(len(REFUSED)))
def test_what_is_wrong_is_named_before_anything_is_streamed(client, body, message, stream):
    response = client.post("/v1/samples", json={**body, "stream": stream})
    assert (response.status_code, response.headers["content-type"]) == (422, "application/json")
    assert message in response.json()["detail"]


def test_a_model_that_is_not_served(client):
    response = client.post("/v1/samples", json={"model": "large"})
    assert response.status_code == 404
    assert response.json()["detail"] == "model 'large' is not served; allowed: small, pairs, digits, slow, sick"


@pytest.mark.parametrize("stream", [False, True])
def test_a_sick_model_is_a_500(client, stream):
    response = client.post("/v1/samples", json={"model": "sick", "stream": stream})
    if stream and response.status_code == 200:
        kind, data = events_of(response)[-1]
        assert (kind, data["status"]) == ("error", 500)
        assert "NaN" in data["detail"]
    else:
        assert response.status_code == 500
        assert "NaN" in response.json()["detail"]


@pytest.mark.parametrize(
    ("method", "path", "status", "detail"),
    [
        ("GET", "/v1/samples", 405, "GET is no method of /v1/samples; allowed: POST"),
        ("OPTIONS", "/v1/samples", 405, "OPTIONS is no method"),
        ("GET", "/v1/nothing", 404, "there is nothing at /v1/nothing"),
    ],
)
def test_routes_that_do_not_exist(client, method, path, status, detail):
    response = client.request(method, path)
    assert response.status_code == status
    assert detail in response.json()["detail"]
    assert client.head("/v1/samples").status_code == 405


@pytest.mark.parametrize(
    ("content", "headers", "status"),
    [
        (b'{"count": 1}', {"content-type": "text/plain"}, 415),
        (b'{"count": 1}', {}, 415),
        (b"count=1", {"content-type": "application/x-www-form-urlencoded"}, 415),
        (b"", JSON, 422),
        (b"", {}, 422),
        (b'{"count": 1', JSON, 422),
        (b'{"seed": ' + b"9" * 5000 + b"}", JSON, 422),
        (b"[" * 100_000, JSON, 422),
        (b'{"prompt": "\\ud800"}', JSON, 422),
        (b'{"sampling": {"temperature": NaN}}', JSON, 422),
        (b'{"sampling": {"temperature": Infinity}}', JSON, 422),
        (b'{"sampling": {"temperature": 1e400}}', JSON, 422),
        (b'{"count": 1e0}', JSON, 422),
        (b'{"pixels": [NaN]}', JSON, 422),
        (b"\xff\xfe", JSON, 422),
        (b'{"count": ' + b"[" * 900 + b"]" * 900 + b"}", JSON, 422),
        (b'{"pixels": ' + b"[" * 900 + b"]" * 900 + b', "n": 1}', JSON, 422),
        (b'{"\\udcff": 1}', JSON, 422),
        (b'{"model": "\\udcff", "n": "\\udcff"}', JSON, 422),
        (b'{"logit_bias": {"\\udcff": "\\udcff"}}', JSON, 422),
        (b'{"label": 1' + b"0" * 4000 + b', "n": ""}', JSON, 422),
    ],
)
def test_bodies_that_are_not_what_they_should_be(client, content, headers, status):
    for route in ("/v1/samples", "/v1/score"):
        response = client.post(route, content=content, headers=headers)
        assert response.status_code == status
        assert response.json()["detail"]
    response = client.post("/v1/completions", content=content, headers=headers)
    assert response.status_code == 400
    assert response.json()["error"]["message"]


def test_long_bodies_are_refused_with_and_without_a_length(client):
    content = b'{"prompt": "' + b"a" * CONFIG.max_body_bytes + b'"}'
    for body in (content, iter([content[: 1 << 19], content[1 << 19 :]])):
        response = client.post("/v1/samples", content=body, headers=JSON)
        assert response.status_code == 413
        assert "longer than 1,048,576 bytes" in response.json()["detail"]
    sound = b'{"seed": 1, "prompt": "ab"}'
    chunked = client.post("/v1/samples", content=iter([sound[:9], sound[9:]]), headers=JSON)
    assert chunked.json()["samples"] == client.post("/v1/samples", content=sound, headers=JSON).json()["samples"]


def test_a_full_queue_says_when_to_come_back(client):
    """8 places and 8 waiting rows: of 12 requests of 8 slow rows most are refused, and no other client notices."""
    body = {"model": "slow", "count": 8, "seed": 1}

    def ask(_: int):
        return client.post("/v1/samples", json=body)

    with ThreadPoolExecutor(12) as pool:
        answers = list(pool.map(ask, range(12)))
    refused = [answer for answer in answers if answer.status_code == 503]
    sound = [answer.json()["samples"] for answer in answers if answer.status_code == 200]
    assert len(refused) + len(sound) == 12
    assert len(sound) >= 2
    assert all(int(answer.headers["retry-after"]) >= 1 for answer in refused)
    assert "try again in" in refused[0].json()["detail"]
    assert all(samples == sound[0] for samples in sound)


ANY_TEXT = st.text(st.characters(exclude_categories=()), max_size=20)  # halves of characters among them
LEAF = st.none() | st.booleans() | st.integers() | st.floats() | ANY_TEXT
TREE = LEAF | st.lists(LEAF, max_size=4) | st.dictionaries(ANY_TEXT, LEAF, max_size=3)
BODY = TREE | st.lists(TREE, max_size=3)
REQUESTS = (SampleRequest, ScoreRequest, CompletionRequest, ImageRequest)
FIELDS = st.sampled_from(sorted({name for request in REQUESTS for name in request.model_fields}))
ROUTES = ("/v1/samples", "/v1/score", "/v1/completions", "/v1/images/generations")


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(route=st.sampled_from(ROUTES), body=st.dictionaries(FIELDS, BODY, max_size=4) | BODY)
@example(route="/v1/samples", body={"pixels": [[[[]]]], "model": "digits"})
@example(route="/v1/samples", body={"pixels": {"a": 1}, "model": "digits"})
@example(route="/v1/completions", body={"prompt": [[], [1]]})
@example(route="/v1/completions", body={"prompt": ["a", [1]]})
@example(route="/v1/completions", body={"prompt": [True, 1]})
def test_no_body_breaks_it(client, route, body):
    response = client.post(route, content=json.dumps(body).encode(), headers=JSON)
    assert response.status_code in (200, 400, 404, 422, 503), response.text


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(route=st.sampled_from(ROUTES), content=st.binary(max_size=60), kind=st.sampled_from([*JSON.values(), "", "x/y"]))
def test_no_bytes_break_it(client, route, content, kind):
    response = client.post(route, content=content, headers={"content-type": kind})
    assert 400 <= response.status_code < 500
    assert response.json()


def test_engines_are_idle_afterwards(client, engines):
    wait_until(lambda: all(engine.stats().requests_running == 0 for engine in engines.values()))
