"""Kubernetes' and KubeRay's schemas as judges of manifests: unknown fields are refused, as `kubectl apply` does."""

from functools import cache
from typing import Any

import jsonschema
import kubernetes_validate
import yaml

from tests.shared import shared

KUBERNETES = "1.37"  # schemas of the core types


def check(document: dict[str, Any]) -> None:
    """AssertionError saying what is wrong with an object, and where. Skips the test where the schemas are absent."""
    if document["apiVersion"] == "ray.io/v1":
        problems = sorted(
            _validator(document["kind"]).iter_errors(document), key=lambda error: list(error.absolute_path)
        )
        assert not problems, "; ".join(f"{problem.json_path}: {problem.message}" for problem in problems)
        for template in pod_templates(document):
            _check_core({"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "any"}, "spec": template["spec"]})
    else:
        _check_core(document)


def _check_core(document: dict[str, Any]) -> None:
    try:
        kubernetes_validate.validate(document, KUBERNETES, strict=True)
    except kubernetes_validate.ValidationError as error:
        raise AssertionError(f"{document['kind']}: {'.'.join(map(str, error.path))}: {error.message}") from None


def pod_templates(tree: Any) -> list[dict[str, Any]]:
    """Every pod template in an object."""
    if isinstance(tree, list):
        return [one for item in tree for one in pod_templates(item)]
    if not isinstance(tree, dict):
        return []
    own = [tree[key] for key in ("template", "submitterPodTemplate") if key in tree]
    return own + [one for key, item in tree.items() if key not in ("template",) for one in pod_templates(item)]


@cache
def _validator(kind: str) -> jsonschema.Draft7Validator:
    file = shared("schemas", "kuberay", f"ray.io_{kind.lower()}s.yaml")
    loader: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    definition = yaml.load(file.read_text(), loader)
    version = next(one for one in definition["spec"]["versions"] if one["name"] == "v1")
    return jsonschema.Draft7Validator(strict(version["schema"]["openAPIV3Schema"]))


def strict(schema: Any) -> Any:
    """JSON schema of a schema of Kubernetes' OpenAPI: what is not named there is refused."""
    if isinstance(schema, list):
        return [strict(one) for one in schema]
    if not isinstance(schema, dict):
        return schema
    found = {key: _named(value) if key == "properties" else strict(value) for key, value in schema.items()}
    if schema.get("x-kubernetes-int-or-string"):
        found.pop("anyOf", None)
        found["type"] = ["integer", "string"]
    closed = "properties" in schema and "additionalProperties" not in schema
    if closed and not schema.get("x-kubernetes-preserve-unknown-fields"):
        found["additionalProperties"] = False
    if "default" in schema and not isinstance(schema["default"], dict):
        found.pop("default")
    return found


def _named(properties: dict[str, Any]) -> dict[str, Any]:
    return {name: strict(schema) for name, schema in properties.items()}
