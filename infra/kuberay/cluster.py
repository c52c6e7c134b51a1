"""The spec of a RayCluster: a head that leads and computes nothing, and one group of workers."""

from typing import Any

from infra.kuberay import pods
from infra.kuberay.options import RAY, Options
from infra.kuberay.sizes import Size

_IDLE = 300  # s after which a pod without work is given back


def spec(
    options: Options,
    labels: dict[str, str],
    head: Size,
    worker: Size,
    least: int,
    most: int,
    *,
    config_map: str | None = None,
    claim: str | None = None,
    cache: str = pods.CACHE,
    serve_port: int | None = None,
    metrics_port: int = 0,
    scaled: bool | None = None,
) -> dict[str, Any]:
    """`least` to `most` pods of workers. Pods come and go by load if these differ, or `scaled` says so.

    serve_port: of Ray Serve; metrics_port: of a training run's own figures, 0 = none.
    """
    served = {} if serve_port is None else {"serve": serve_port}
    own = {"md4-metrics": metrics_port} if metrics_port else {}
    common: dict[str, Any] = {"config_map": config_map, "claim": claim, "cache": cache}
    authentication = {"mode": "token"}
    if options.token_secret is not None:
        authentication["secretName"] = options.token_secret
    found: dict[str, Any] = {"rayVersion": RAY, "authOptions": authentication}
    if scaled if scaled is not None else least < most:
        found["enableInTreeAutoscaling"] = True
        found["autoscalerOptions"] = {
            "version": "v2",
            "idleTimeoutSeconds": _IDLE,
            "securityContext": pods.SECURITY,
            "resources": {"requests": {"cpu": "200m", "memory": "512Mi"}, "limits": {"memory": "512Mi"}},
        }
    leading = {"gcs-server": 6379, "dashboard": pods.DASHBOARD, "client": 10001, "metrics": pods.METRICS}
    found["headGroupSpec"] = {
        "serviceType": "ClusterIP",
        "rayStartParams": {"dashboard-host": "0.0.0.0", "num-cpus": "0", **_start(head)},
        "template": pods.template(options, labels, head, head=True, ports=leading | served, **common),
    }
    working = {"metrics": pods.METRICS}
    group = {
        "groupName": "workers",
        "replicas": max(least, 1) if serve_port is not None else least,
        "minReplicas": least,
        "maxReplicas": most,
        "rayStartParams": {"num-cpus": str(worker.slots), **_start(worker)},
        "template": pods.template(options, labels, worker, head=False, ports=working | served | own, **common),
    }
    found["workerGroupSpecs"] = [group]
    return found


def _start(size: Size) -> dict[str, str]:
    return {"object-store-memory": str(size.object_store), "metrics-export-port": str(pods.METRICS)}
