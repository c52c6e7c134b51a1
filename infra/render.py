"""`md4 render kuberay`: the manifests with which a Kubernetes cluster runs what a configuration says.

    md4 render kuberay pydocs-tiny train.device=cpu --kind job --image registry.example/md4:0.1.0 --storage pvc:md4 \
        | kubectl apply -f -

The same configuration gives the same text. Nothing is asked of any cluster.
"""

import hashlib
import re
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import replace
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

import yaml

from infra.kuberay import kinds, pods, sizes
from infra.kuberay.kinds import Frame
from infra.kuberay.options import RAY, Options, object_name
from infra.kuberay.places import MOUNT, Places
from md4.errors import UserError
from orchestration.config import Config
from orchestration.jobs import Job, secrets
from orchestration.jobs.spec import make
from orchestration.registry.words import split
from orchestration.serving.config import ServingConfig
from pipelines import named

if TYPE_CHECKING:
    from orchestration.cron import Entry

_CONFIG = "config.yaml"
_LATE_S = 600  # within which a pod has started, image and machine included


def render(config: Config, options: Options, command: Sequence[str], entry: "Entry | None" = None) -> str:
    """The manifest, YAML. command: what was typed, for its first lines; entry: of `md4 cron`, for kind "cron".

    Raises:
        UserError: what cannot be, by its key or option, its value and what is allowed.
    """
    options.check()
    name = object_name(options.kind, options.name or (entry.name if entry else config.name))
    frame = Frame(name, options, _labels(name, options))
    if options.kind == "cron":
        assert entry is not None
        assert options.store is not None
        objects, notes = _clock(frame, entry, object_name("cluster", config.name), options.store)
        return _first_lines(config, options, command, notes) + _yaml(objects)
    places = Places(options.storage)
    tree = places.tree(config, serving=options.kind == "service")
    _check(config, options, tree)
    shared = places.claim is not None and not tree["runs"].startswith("s3://")  # copies of runs are each machine's own
    frame = replace(frame, claim=places.claim, cache=f"{MOUNT}/cache" if shared else pods.CACHE)
    if options.kind == "service":
        size = sizes.of_serving(config, options.memory)
        models, registry = _served(config, options, places, tree)
        serving = ServingConfig.model_validate(tree["serving"])
        objects = kinds.ray_service(frame, serving, size, models, registry)
    else:
        size = sizes.of_training(config, options.workers_per_pod, options.gpu_memory, options.memory)
        if options.kind == "cluster":
            objects = kinds.ray_cluster(frame, config, size)
        else:
            objects = kinds.ray_job(frame, config, size, _job(config, options, tree))
    notes = [f"memory of a pod of workers: {size.reason}"]
    if places.claim is not None:
        notes.append(f"the claim {places.claim} must be ReadWriteMany: all pods mount it at {MOUNT}")
    elif options.kind in ("job", "cluster"):
        notes += _fetched(config, tree)
    if places.needed:
        notes.append(f"must be there: {', '.join(places.needed)}")
    return _first_lines(config, options, command, notes) + _yaml(objects)


def _clock(frame: Frame, entry: "Entry", cluster: str, store: str) -> tuple[list[dict[str, Any]], list[str]]:
    """KubeRay as the clock of an entry of `md4 cron`; UserError where pods would always come too late."""
    if entry.catch_up_s < _LATE_S:
        raise UserError(
            f"entry {entry.name}: catch_up_s={entry.catch_up_s:g}, but a pod may take {_LATE_S} s to start, and then "
            f"the time is no longer run: md4 cron add {entry.name} ... --catch-up with {_LATE_S} s or more"
        )
    command = ["md4", "cron", "run", "--once", "--store", store]
    note = (
        f"only a clock: at each time a job on the RayCluster {cluster} (--kind cluster) does what is due in {store}; "
        "no time runs twice and overlap is decided there, also with `md4 cron run` beside it"
    )
    return kinds.ray_cron_job(frame, entry, cluster, command), [note]


def _served(
    config: Config, options: Options, places: Places, tree: dict[str, Any]
) -> tuple[dict[str, str], str | None]:
    """What a service serves, by name, and the registry that it comes from: the run, or what a name stands for."""
    if options.model is None or options.registry is None:
        run = f"{tree['runs']}/{config.name}"
        places.needed.append(run)
        return {config.name: run}, None
    model, _ = split(options.model)
    return {model: options.model}, places.put("registry", options.registry)


def _fetched(config: Config, tree: dict[str, Any]) -> Iterator[str]:
    """Sets that one machine fetches into its cache, where others don't find them."""
    for _, one in config.data.sets():
        if (one.path is None and one.source in named.SETS) or named.is_url(one.path):
            yield (
                f"{one.source} is fetched into one machine's cache, which other pods don't see; so prepare it before: "
                f"md4 prepare ... data.directory={tree['data']['directory']}"
            )


def _labels(name: str, options: Options) -> dict[str, str]:
    own = {"name": "md4", "instance": name, "managed-by": "md4-render"}
    return dict(options.labels) | {f"app.kubernetes.io/{key}": value for key, value in own.items()}


def _job(config: Config, options: Options, tree: dict[str, Any]) -> Job:
    """Training, as `md4 submit train` would send it; the configuration lies beside it."""
    text = yaml.safe_dump(tree, sort_keys=False, allow_unicode=True)
    return make(
        verb="train",
        arguments=(_CONFIG,),
        name=re.sub(r"[^a-z0-9._-]", "-", config.name.lower()),
        labels=dict(options.labels),
        secrets=tuple(one for one in options.secrets if "=" in one),
        time_limit_s=options.time_limit,
        files={_CONFIG: text},
        place=f"{tree['runs']}/{config.name}",
    )


def _check(config: Config, options: Options, tree: dict[str, Any]) -> None:
    """What the configuration and the options say of each other."""
    train = config.train
    if found := list(secrets.in_tree(tree)):
        raise UserError(f"{'; '.join(found)}: a manifest is no place for it; pods get secrets by --secret")
    if (
        options.spot
        and options.kind != "service"
        and train.most_workers > 1
        and train.least_workers == train.most_workers
    ):
        raise UserError(
            f"--spot {options.spot} with train.workers={train.workers}: one machine that is taken away stops all; "
            f"say train.workers=1..{train.most_workers}, and the run goes on with those that are left"
        )
    if _uses_s3([tree, options.registry]) and not options.secrets and options.service_account is None:
        raise UserError(
            "the run reads or writes S3: say --secret NAME, a Secret with AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY "
            "and, where it isn't Amazon's, AWS_ENDPOINT_URL; or --service-account NAME of one that has access"
        )
    if config.tracking.wandb == "online" and not options.secrets:
        raise UserError("tracking.wandb=online needs WANDB_API_KEY: --secret NAME, or WANDB_API_KEY=k8s:SECRET/KEY")


def _uses_s3(tree: Any) -> bool:
    if isinstance(tree, dict):
        return any(_uses_s3(one) for one in tree.values())
    if isinstance(tree, list):
        return any(_uses_s3(one) for one in tree)
    return isinstance(tree, str) and tree.startswith("s3://")


def _first_lines(config: Config, options: Options, command: Sequence[str], notes: Sequence[str]) -> str:
    """Comments: how the manifest was made, of what, and what it counts on."""
    digest = hashlib.sha256(config.to_yaml().encode()).hexdigest()[:12]
    lines = [
        f"md4 {shlex.join(command)}",
        f"md4 {version('md4')}, configuration {digest}, KubeRay 1.7, Ray {RAY}",
        *notes,
    ]
    if options.kind == "cron":
        lines.append("RayCronJob is alpha: the operator needs featureGates RayCronJob=true")
    if options.gateway_class:
        lines.append("the upgrade step by step is alpha: the operator needs RayServiceIncrementalUpgrade=true")
    return "".join(f"# {line}\n" for line in lines)


class _Dumper(yaml.SafeDumper):
    """Long texts as blocks, the same list or mapping written out wherever it stands."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style="|" if "\n" in text else None)


_Dumper.add_representer(str, _text)


def _yaml(objects: list[dict[str, Any]]) -> str:
    return yaml.dump_all(objects, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120, explicit_start=True)
