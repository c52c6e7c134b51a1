"""The pods of a cluster: not root, with memory for /dev/shm, secrets by reference, figures for Prometheus."""

from typing import Any

from infra.kuberay.options import SPOT, Options
from infra.kuberay.places import MOUNT
from infra.kuberay.sizes import Size, quantity
from orchestration.cluster import ENVIRONMENT
from orchestration.jobs.package import STOPPING

CONFIGURATION = "/etc/md4"  # folder of the ConfigMap's files
METRICS = 8080  # where Ray's agents have their figures; KubeRay's own default
DASHBOARD = 8265
_USER = 1000  # of the image
# Ray keeps its session and spills objects here, the cache of fetched data beside it.
_SCRATCH = "/tmp"
CACHE = f"{_SCRATCH}/md4"
_OF_PODS = ("RAY_SERVE_", "RAY_USAGE_", "TORCH_")
_GRACE = 60  # s between the notice that a pod must go and its end; clouds may give less
_END = 10  # of these, for Ray's processes to end
SECURITY = {
    "allowPrivilegeEscalation": False,
    "capabilities": {"drop": ["ALL"]},
    "runAsNonRoot": True,
    "seccompProfile": {"type": "RuntimeDefault"},
}


def template(
    options: Options,
    labels: dict[str, str],
    size: Size,
    *,
    head: bool,
    config_map: str | None = None,
    claim: str | None = None,
    cache: str = CACHE,
    ports: dict[str, int],
) -> dict[str, Any]:
    """A pod template. labels: of its own; config_map: whose files lie at CONFIGURATION; claim: the volume of MOUNT;
    cache: a folder for what is fetched."""
    volumes: list[dict[str, Any]] = [
        {"name": "shared-memory", "emptyDir": {"medium": "Memory", "sizeLimit": quantity(size.shared)}},
        {"name": "scratch", "emptyDir": {}},
    ]
    mounts: list[dict[str, Any]] = [
        {"name": "shared-memory", "mountPath": "/dev/shm"},
        {"name": "scratch", "mountPath": _SCRATCH},
    ]
    if config_map is not None:
        volumes.append({"name": "configuration", "configMap": {"name": config_map}})
        mounts.append({"name": "configuration", "mountPath": CONFIGURATION, "readOnly": True})
    if claim is not None:
        volumes.append({"name": "storage", "persistentVolumeClaim": {"claimName": claim}})
        mounts.append({"name": "storage", "mountPath": MOUNT})
    container: dict[str, Any] = {
        "name": "ray-head" if head else "ray-worker",
        "image": options.image,
        "env": [*_environment(size, head, cache), *options.environment()],
        "resources": size.resources(),
        "ports": [{"name": name, "containerPort": port} for name, port in ports.items()],
        "securityContext": SECURITY,
        "volumeMounts": mounts,
    }
    if froms := options.environment_from():
        container["envFrom"] = froms
    spec: dict[str, Any] = {"containers": [container], "volumes": volumes, "securityContext": pod_security()}
    # What KubeRay's second autoscaler demands: it replaces pods, nobody restarts containers in them.
    spec["restartPolicy"] = "Never"
    spec["terminationGracePeriodSeconds"] = _GRACE
    if options.service_account is not None:
        spec["serviceAccountName"] = options.service_account
    if not head:
        leaving = ["python", "-m", "orchestration.leaving", str(_GRACE - _END)]
        container["lifecycle"] = {"preStop": {"exec": {"command": leaving}}}
        spec["automountServiceAccountToken"] = options.service_account is not None
    selector, tolerations = dict(options.node_selector), []
    if options.spot is not None and not head:  # the head, where the driver is, stays on machines that stay
        marks, tolerations = SPOT[options.spot]
        selector |= marks
    if size.gpus:
        tolerations = [*tolerations, {"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"}]
    if selector:
        spec["nodeSelector"] = selector
    if tolerations:
        spec["tolerations"] = tolerations
    annotations = {"prometheus.io/scrape": "true", "prometheus.io/port": str(METRICS), "prometheus.io/path": "/metrics"}
    if head:
        annotations["cluster-autoscaler.kubernetes.io/safe-to-evict"] = "false"
    role = {"app.kubernetes.io/component": "head" if head else "worker"}
    return {"metadata": {"labels": labels | role, "annotations": annotations}, "spec": spec}


def pod_security() -> dict[str, Any]:
    """Of a whole pod: its user, who owns the volumes, too."""
    return {
        "runAsNonRoot": True,
        "runAsUser": _USER,
        "runAsGroup": _USER,
        "fsGroup": _USER,
        "fsGroupChangePolicy": "OnRootMismatch",
        "seccompProfile": {"type": "RuntimeDefault"},
    }


def _environment(size: Size, head: bool, cache: str) -> list[dict[str, Any]]:
    """What processes read that start with the pod; what the driver sets for its workers comes with them.

    How soon a silent node is given up stays Ray's: networks differ from one machine.
    """
    settings = {name: value for name, value in ENVIRONMENT.items() if value and name.startswith(_OF_PODS)}
    settings |= {
        "DS_ACCELERATOR": "cuda" if size.gpus else "cpu",
        "MD4_CACHE": cache,
        "HOME": _SCRATCH,  # libraries that compile or download put it there
    }
    if head:  # commands that run there submit to the cluster they run on
        settings["RAY_API_SERVER_ADDRESS"] = f"http://127.0.0.1:{DASHBOARD}"
        settings |= STOPPING
    return [{"name": name, "value": value} for name, value in settings.items()]
