"""The OpenAPI document is true: what it describes is accepted, refused and answered as it says."""

from typing import cast

import pytest
import schemathesis
from hypothesis import HealthCheck, settings
from schemathesis.checks import CHECKS as ALL_CHECKS
from schemathesis.checks import load_all_checks

from md4.samplers.wording import SETTINGS
from orchestration.serving.http import make_api
from orchestration.serving.models import Local, Models
from tests.orchestration.serving.conftest import CONFIG, replace_config, serving

load_all_checks()


@pytest.fixture(scope="module")
def short(engines):
    """The service with short texts, so that what is drawn at random is soon answered."""
    limits = replace_config(max_count=2, max_length=40, max_steps=12, max_draws=2, max_body_bytes=1 << 14)
    models = {name: engines[name] for name in ("small", "digits")}
    with serving(Local(models), limits) as server:
        yield server


# The same whatever is served.
schema = schemathesis.openapi.from_dict(make_api(cast(Models, None), CONFIG).openapi())

# Whether an answer is well formed. That every request which the document allows is also answered can't be asked: a
# prompt may have characters that the model doesn't know.
CHECKS = [
    ALL_CHECKS.get_one(name)
    for name in (
        "status_code_conformance",
        "content_type_conformance",
        "response_headers_conformance",
        "response_schema_conformance",
        "not_a_server_error",
    )
]
QUIET = [HealthCheck.too_slow, HealthCheck.filter_too_much, HealthCheck.data_too_large]


def check(case, server) -> None:
    response = case.call(server.url, timeout=30)
    # 503 says that too many wait.
    checks = [one for one in CHECKS if response.status_code != 503 or one.__name__ != "not_a_server_error"]
    case.validate_response(response, checks=checks)
    if "text/event-stream" not in response.headers.get("content-type", ""):
        assert response.json()


@schema.parametrize()
@settings(max_examples=25, deadline=None, suppress_health_check=QUIET, derandomize=True)
def test_answers_are_as_described(case, short):
    check(case, short)


@pytest.mark.slow
@schema.parametrize()
@settings(max_examples=1000, deadline=None, suppress_health_check=QUIET)
def test_answers_are_as_described_at_length(case, short):
    check(case, short)


def test_the_interface_is_described(client):
    document = client.get("/openapi.json").json()
    works = {"200", "401", "404", "413", "429", "500", "503", "504"}
    expected = {
        ("/v1/samples", "post"): works | {"415", "422"},
        ("/v1/score", "post"): works | {"415", "422"},
        ("/v1/completions", "post"): works | {"400"},
        ("/v1/images/generations", "post"): works | {"400"},
        ("/v1/models", "get"): {"200", "401", "413", "429", "500", "503"},
        ("/v1/models/{name}", "get"): {"200", "401", "404", "413", "429", "500", "503"},
        ("/v1/model", "get"): {"200", "401", "413", "429", "500", "503"},
        ("/healthz", "get"): {"200", "413", "500", "503"},
    }
    found = {
        (path, method): set(route["responses"])
        for path, routes in document["paths"].items()
        for method, route in routes.items()
    }
    assert found == expected
    for (path, method), statuses in expected.items():
        answers = document["paths"][path][method]["responses"]
        form = "OpenAIProblem" if path.startswith(("/v1/completions", "/v1/images", "/v1/models")) else "Problem"
        for status in statuses - {"200"}:
            reference = answers[status]["content"]["application/json"]["schema"]["$ref"]
            assert reference == f"#/components/schemas/{form}", (path, status)
        if "429" in statuses:
            assert "Retry-After" in answers["429"]["headers"]
    schemas = document["components"]["schemas"]
    assert set(schemas["SamplingConfig"]["properties"]) == set(SETTINGS)
    stream = document["paths"]["/v1/samples"]["post"]["responses"]["200"]["content"]["text/event-stream"]
    forms = {form["properties"]["event"]["const"]: form["properties"]["data"] for form in stream["itemSchema"]["anyOf"]}
    assert list(forms) == ["begun", "step", "done", "error"]
    names = [form["contentSchema"]["anyOf"][0]["$ref"].rsplit("/", 1)[-1] for form in forms.values()]
    assert names == ["Begun", "Step", "Finished", "Failed"]
    assert set(names) <= set(schemas)
