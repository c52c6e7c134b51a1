"""The objects themselves: RayCluster, RayJob, RayService, RayCronJob, and what stands beside them."""

import hashlib
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from infra.kuberay import cluster, pods, sizes
from infra.kuberay.options import Options
from infra.kuberay.sizes import Size
from md4.errors import UserError
from orchestration.config import Config
from orchestration.jobs import Job, package
from orchestration.jobs.spec import SPEC
from orchestration.serving.config import ServingConfig

if TYPE_CHECKING:
    from orchestration.cron import Entry

_AGAIN = 2  # times that a job whose head was lost is started once more; it goes on from its last checkpoint
_START = 1800  # s on top of a job's time limit: machines come, images are pulled
_MOST_BYTES = 1_000_000  # of a ConfigMap's files, a little less than Kubernetes takes


@dataclass(frozen=True)
class Frame:
    """What all objects of a manifest have in common."""

    name: str
    options: Options
    labels: Mapping[str, str]
    claim: str | None = None  # the volume's
    cache: str = pods.CACHE  # folder of pods for what is fetched

    def object(self, api: str, kind: str, spec: dict[str, Any], name: str | None = None) -> dict[str, Any]:
        return {"apiVersion": api, "kind": kind, "metadata": self.metadata(name), "spec": spec}

    def metadata(self, name: str | None = None) -> dict[str, Any]:
        space = {} if self.options.namespace is None else {"namespace": self.options.namespace}
        return {"name": name or self.name, **space, "labels": dict(self.labels)}

    def disruption(self, component: str) -> dict[str, Any]:
        """At most one pod of the service is taken at a time for maintenance, and none that leads a job."""
        match = {"app.kubernetes.io/instance": self.name, "app.kubernetes.io/component": component}
        spec = {"maxUnavailable": 0 if component == "head" else 1, "selector": {"matchLabels": match}}
        return self.object("policy/v1", "PodDisruptionBudget", spec, f"{self.name}-{component}")


def files(frame: Frame, texts: Mapping[str, str]) -> dict[str, Any]:
    """A ConfigMap; its name follows from what is in it, so that pods with other files are other pods."""
    if (size := sum(len(text.encode()) for text in texts.values())) > _MOST_BYTES:
        raise UserError(
            f"the job's files are {size:,} bytes, and a ConfigMap takes {_MOST_BYTES:,}: put large ones on the volume "
            f"or into S3 ({', '.join(texts)})"
        )
    if below := [name for name in texts if "/" in name]:
        raise UserError(f"a ConfigMap has no folders: {', '.join(below)} must lie beside the configuration")
    digest = hashlib.sha256(repr(sorted(texts.items())).encode()).hexdigest()[:8]
    metadata = frame.metadata(f"{frame.name}-files-{digest}")
    return {"apiVersion": "v1", "kind": "ConfigMap", "metadata": metadata, "immutable": True, "data": dict(texts)}


def ray_cluster(frame: Frame, config: Config, worker: Size) -> list[dict[str, Any]]:
    """A cluster that stays, for `md4 submit`."""
    return [frame.object("ray.io/v1", "RayCluster", _training(frame, config, worker, None))]


def ray_job(frame: Frame, config: Config, worker: Size, job: Job) -> list[dict[str, Any]]:
    """A cluster for one job, which ends with it."""
    held = files(frame, _job_files(job))
    spec = _job_spec(frame, config, worker, job, held["metadata"]["name"])
    return [held, frame.disruption("head"), frame.object("ray.io/v1", "RayJob", spec)]


def ray_cron_job(frame: Frame, entry: "Entry", cluster_name: str, command: Sequence[str]) -> list[dict[str, Any]]:
    """KubeRay as the clock of an entry of `md4 cron`, on a cluster that stays.

    At each time a job starts there that does what is due (`command`) and ends: what is run, and whether, is decided by
    the records of `md4 cron`, which know of runs before. RayCronJob itself would start one beside another.
    """
    times = {"schedule": entry.schedule, "timeZone": entry.zone, "suspend": entry.paused}
    job = {
        "clusterSelector": {"ray.io/cluster": cluster_name},
        "entrypoint": shlex.join(command),
        "backoffLimit": _AGAIN,
        "activeDeadlineSeconds": _START,
        "submissionMode": "K8sJobMode",
        "submitterPodTemplate": _submitter(frame),
    }
    return [frame.object("ray.io/v1", "RayCronJob", times | {"jobTemplate": job})]


def ray_service(
    frame: Frame, serving: ServingConfig, worker: Size, models: Mapping[str, str], registry: str | None = None
) -> list[dict[str, Any]]:
    """The sampling service: one replica a pod. models: runs by name, at places that pods see, as those in `serving`, or
    MODEL@NAME in a registry that they see."""
    from orchestration.serving.app import describe_deployment

    if not serving.port:
        raise UserError("serving.port=0 is any free one; a service needs the same on each pod: 8000, for instance")
    serving = serving.model_copy(update={"host": "0.0.0.0"})
    shifted = frame.options.gateway_class
    ray = cluster.spec(
        frame.options, dict(frame.labels), sizes.head(drivers=False), worker, serving.fewest, serving.replicas,
        claim=frame.claim, cache=frame.cache, serve_port=serving.port, scaled=True if shifted else None,
    )  # fmt: skip
    upgrade: dict[str, Any] = {"type": "NewCluster"}  # needs twice the machines while it lasts
    if shifted:
        steps = {"gatewayClassName": shifted, "stepSizePercent": 10, "intervalSeconds": 30, "maxSurgePercent": 50}
        upgrade = {"type": "NewClusterWithIncrementalUpgrade", "clusterUpgradeOptions": steps}
    spec = {
        "serveConfigV2": describe_deployment(models, serving, registry),
        "serviceUnhealthySecondThreshold": 900,
        "deploymentUnhealthySecondThreshold": 300,
        "rayClusterDeletionDelaySeconds": int(serving.timeout_s) + 60,  # requests under way are answered first
        "upgradeStrategy": upgrade,
        "rayClusterConfig": ray,
    }
    return [frame.disruption("worker"), frame.object("ray.io/v1", "RayService", spec)]


def _job_files(job: Job) -> dict[str, str]:
    return {SPEC: job.model_dump_json(indent=1, exclude={"files"}), **job.files}


def _training(frame: Frame, config: Config, worker: Size, config_map: str | None) -> dict[str, Any]:
    pod, train = frame.options.workers_per_pod, config.train
    return cluster.spec(
        frame.options, dict(frame.labels), sizes.head(drivers=True), worker,
        train.least_workers // pod, train.most_workers // pod,
        config_map=config_map, claim=frame.claim, cache=frame.cache, metrics_port=config.tracking.prometheus_port,
    )  # fmt: skip


def _job_spec(frame: Frame, config: Config, worker: Size, job: Job, config_map: str) -> dict[str, Any]:
    limit = job.time_limit_s
    # Two shells read it on its way: no quotes, no operators.
    spec: dict[str, Any] = {"entrypoint": f"python -m orchestration.jobs.run {pods.CONFIGURATION}/{SPEC}"}
    spec["metadata"] = package.metadata(job)  # by which `md4 jobs` knows it on its cluster
    for name, amount in (("entrypointNumCpus", job.num_cpus), ("entrypointNumGpus", job.num_gpus)):
        if amount:
            spec[name] = amount
    if limit is not None:
        spec["activeDeadlineSeconds"] = int(limit) + _START  # the job itself ends cleanly before
    return spec | {
        "backoffLimit": _AGAIN,
        "shutdownAfterJobFinishes": True,
        "ttlSecondsAfterFinished": frame.options.keep,
        "submissionMode": "K8sJobMode",
        "submitterPodTemplate": _submitter(frame),
        "rayClusterSpec": _training(frame, config, worker, config_map),
    }


def _submitter(frame: Frame) -> dict[str, Any]:
    """The pod that hands the job to the cluster and follows its log; KubeRay fills in the command and the token."""
    memory = sizes.quantity(2**30)
    container = {
        "name": "ray-job-submitter",
        "image": frame.options.image,
        "env": [{"name": "HOME", "value": "/tmp"}],
        "resources": {"requests": {"cpu": "200m", "memory": memory}, "limits": {"memory": memory}},
        "securityContext": pods.SECURITY,
    }
    spec: dict[str, Any] = {"restartPolicy": "Never", "securityContext": pods.pod_security(), "containers": [container]}
    labels = dict(frame.labels) | {"app.kubernetes.io/component": "submitter"}
    return {"metadata": {"labels": labels}, "spec": spec}
