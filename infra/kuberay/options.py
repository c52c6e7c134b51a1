"""What a manifest needs to know beside the run's configuration, and whether it makes sense."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from md4.errors import UserError

KINDS = ("cluster", "job", "service", "cron")
RAY = "2.60.0"  # of the image; KubeRay decides by it what Ray understands

_AKS = "kubernetes.azure.com/scalesetpriority"
# How clouds mark machines that may be taken away, and keep other pods from them.
SPOT: dict[str, tuple[dict[str, str], list[dict[str, str]]]] = {
    "gke": (
        {"cloud.google.com/gke-spot": "true"},
        [{"key": "cloud.google.com/gke-spot", "operator": "Equal", "value": "true", "effect": "NoSchedule"}],
    ),
    "eks": ({"eks.amazonaws.com/capacityType": "SPOT"}, []),
    "karpenter": ({"karpenter.sh/capacity-type": "spot"}, []),
    "aks": (
        {_AKS: "spot"},
        [{"key": _AKS, "operator": "Equal", "value": "spot", "effect": "NoSchedule"}],
    ),
}  # fmt: skip

# Characters that a name has at most: KubeRay appends to them, and services are made of them.
_LONGEST = {"cluster": 53, "job": 47, "service": 47, "cron": 41}
_LABEL_NAME = r"[a-z]([-a-z0-9]*[a-z0-9])?"  # of DNS (RFC 1035), as KubeRay demands of names
_SUBDOMAIN = r"[a-z0-9]([-a-z0-9.]*[a-z0-9])?"
_PREFIX = r"([a-z0-9]([-a-z0-9.]*[a-z0-9])?/)?"
_LABEL_KEY = r"[A-Za-z0-9]([-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?"
_LABEL_VALUE = r"([A-Za-z0-9]([-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?)?"
_VARIABLE = r"[A-Za-z_][A-Za-z0-9_]*"
_IMAGE = r"[a-z0-9]+([._:/-][a-zA-Z0-9._-]+)*?(:[\w][\w.-]{0,127}|@sha256:[0-9a-f]{64})"


@dataclass(frozen=True)
class Options:
    """How a run becomes a manifest. `check` says whether the values are possible."""

    kind: str
    image: str
    name: str | None = None  # of the object; None = the run's
    namespace: str | None = None
    storage: str | None = None  # pvc:NAME or s3://bucket/prefix: what local paths of the configuration stand for
    secrets: Sequence[str] = ()  # NAME of a Secret, or VARIABLE=k8s:SECRET/KEY
    service_account: str | None = None
    token_secret: str | None = None  # Secret whose key auth_token is the cluster's token; None = KubeRay makes one
    labels: Mapping[str, str] = field(default_factory=dict)
    node_selector: Mapping[str, str] = field(default_factory=dict)
    spot: str | None = None  # a key of SPOT
    workers_per_pod: int = 1
    gpu_memory: str | None = None  # of one GPU, to compare the plan with
    memory: str | None = None  # of a pod of workers; None = by the plan
    gateway_class: str | None = None  # of the Gateway API, by which a service's upgrade shifts traffic step by step
    time_limit: float | None = None  # s that a job may take
    keep: int = 3600  # s for which an ended job's cluster stays, to be looked at
    store: str | None = None  # of `md4 cron`, as the cluster's pods see it
    model: str | None = None  # MODEL@NAME that a service serves instead of the run
    registry: str | None = None  # where it is, as pods see it

    def check(self) -> None:
        """UserError naming the first option that is impossible, its value, and what is allowed."""
        if self.kind not in KINDS:
            raise UserError(f"--kind {self.kind!r} must be one of {', '.join(KINDS)}")
        if not re.fullmatch(_IMAGE, self.image) or self.image.endswith(":latest"):
            raise UserError(
                f"--image {self.image!r} must name one version: REGISTRY/NAME:TAG with a tag other than latest, or "
                "REGISTRY/NAME@sha256:DIGEST"
            )
        for option, value in (
            ("--namespace", self.namespace),
            ("--service-account", self.service_account),
            ("--token-secret", self.token_secret),
            ("--gateway-class", self.gateway_class),
        ):
            if value is not None:
                named(option, value)
        for option, allowed, pairs in (
            ("--label", _LABEL_KEY, self.labels),
            ("--node", _PREFIX + _LABEL_KEY, self.node_selector),
        ):
            for key, value in pairs.items():
                if not re.fullmatch(allowed, key) or not re.fullmatch(_LABEL_VALUE, value):
                    raise UserError(
                        f"{option} {key}={value}: allowed are letters, digits, '-', '_' and '.', 63 at most, of a "
                        "machine's label also a prefix with '/'"
                    )
        if self.spot is not None and self.spot not in SPOT:
            raise UserError(f"--spot {self.spot!r} must be one of {', '.join(SPOT)}")
        if self.workers_per_pod < 1:
            raise UserError(f"--workers-per-pod {self.workers_per_pod} must be 1 or more")
        if self.time_limit is not None and self.time_limit <= 0:
            raise UserError(f"--time-limit {self.time_limit:g} must be above 0 seconds")
        if self.gateway_class is not None and self.kind != "service":
            raise UserError(f"--gateway-class is about the upgrade of a service; --kind {self.kind} has none")
        if (self.kind == "cron") != (self.store is not None):
            raise UserError("--kind cron needs --store s3://bucket/prefix, where `md4 cron` has entries; others none")
        if self.store is not None and not self.store.startswith("s3://"):
            raise UserError(f"--store {self.store} must be s3://bucket/prefix: this machine and pods both read it")
        if (self.model is not None or self.registry is not None) and self.kind != "service":
            raise UserError(f"--model and --registry are about a service; --kind {self.kind} serves nothing")
        if (self.model is None) != (self.registry is None):
            raise UserError("--model MODEL@NAME and --registry s3://bucket/prefix, where it is, go together")
        if self.model is not None and "@" not in self.model:
            raise UserError(f"--model {self.model!r} must be MODEL@NAME, such as small@production")
        self.environment()

    def environment(self) -> list[dict[str, Any]]:
        """Single variables from secrets, as a container's `env`. UserError for a secret that is no reference."""
        variables = []
        for one in self.secrets:
            variable, equals, reference = one.partition("=")
            if not equals:
                named("--secret", one)
                continue
            found = re.fullmatch(rf"k8s:({_SUBDOMAIN})/([-._a-zA-Z0-9]+)", reference)
            if not re.fullmatch(_VARIABLE, variable) or found is None:
                # The value may be the secret itself: it is not repeated.
                raise UserError(
                    f"--secret {variable}=...: pods get secrets by reference only: VARIABLE=k8s:SECRET/KEY, or the "
                    "NAME of a Secret whose keys are variables"
                )
            key = {"name": found[1], "key": found[3]}
            variables.append({"name": variable, "valueFrom": {"secretKeyRef": key}})
        return variables

    def environment_from(self) -> list[dict[str, Any]]:
        """Secrets all of whose keys become variables, as a container's `envFrom`."""
        return [{"secretRef": {"name": one}} for one in self.secrets if "=" not in one]

    def variables(self) -> set[str]:
        """Names of the single variables that come from secrets."""
        return {one.partition("=")[0] for one in self.secrets if "=" in one}


def named(option: str, value: str) -> None:
    """UserError unless `value` can be the name of an object of Kubernetes."""
    if len(value) > 253 or not re.fullmatch(_SUBDOMAIN, value):
        raise UserError(f"{option} {value!r}: a name in Kubernetes is made of a-z, 0-9, '-' and '.'")


def object_name(kind: str, name: str) -> str:
    """The name of the object that a run of this name becomes; UserError where it can't be one."""
    found = re.sub(r"[._]+", "-", name.lower()).strip("-")
    if not re.fullmatch(_LABEL_NAME, found) or len(found) > _LONGEST[kind]:
        raise UserError(
            f"name={name}: KubeRay's names begin with a letter, hold a-z, 0-9 and '-', and of a {kind} "
            f"{_LONGEST[kind]} characters at most: say --name"
        )
    return found
