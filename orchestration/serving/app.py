"""The service on Ray Serve: replicas of models, gateways in front of them, started here or by `serve deploy`.

    md4 serve runs/mine                                   on this machine, until interrupted
    md4 serve small@production --registry s3://b/models   what a name in the registry stands for
    md4 serve runs/mine --write serve.yaml                a file for a cluster, then
    serve deploy serve.yaml

What is in it stands in `deployments`; what it answers over HTTP in `http`.
"""

import logging
import socket
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
import yaml
from pydantic import BaseModel, ConfigDict, Field
from ray import serve
from ray.serve.exceptions import RayServeException

from md4.errors import UserError
from orchestration.runs import load_model
from orchestration.serving import sources
from orchestration.serving.client import APPLICATION, ENGINE, GATEWAY
from orchestration.serving.config import ServingConfig
from orchestration.serving.deployments import EngineReplica, Gateway
from orchestration.serving.sources import Load
from pipelines.storage import Folder

_CONNECTIONS = 10_000  # of a gateway; each is little more than a task that waits
_LOGGING = {"enable_access_log": False, "log_level": "WARNING"}  # gateways write a log of requests of their own


class Arguments(BaseModel):
    """What `build` needs to know, as it stands in a file for `serve deploy`."""

    model_config = ConfigDict(extra="forbid")

    models: dict[str, str] = Field(
        min_length=1, description="where models come from (`sources`) by name; the first is the default"
    )
    registry: str | None = Field(default=None, description="where MODEL@NAME is; null = MD4_REGISTRY, or registry/")
    serving: ServingConfig = ServingConfig.model_validate({})


def build(arguments: Arguments) -> serve.Application:
    """The application, for the `import_path` of a file that `serve deploy` reads."""
    return application(arguments.models, arguments.serving, registry=arguments.registry)


def application(
    models: Mapping[str, str], config: ServingConfig, load: Load = load_model, registry: str | None = None
) -> serve.Application:
    """The application. models: where they come from, by name; load: how a run becomes a model."""
    scaling: dict[str, Any] = {"num_replicas": config.replicas}
    if config.fewest < config.replicas:
        scaling = {
            "autoscaling_config": {
                "min_replicas": config.fewest,
                "initial_replicas": max(1, config.fewest),  # a model that can't be loaded is noticed at once
                "max_replicas": config.replicas,
                "target_ongoing_requests": config.requests_per_replica,
                "upscale_delay_s": config.grow_s,
                "downscale_delay_s": config.shrink_s,
                "look_back_period_s": max(2.0, config.grow_s),
            }
        }
    engines = serve.deployment(
        EngineReplica,
        name=ENGINE,
        max_ongoing_requests=config.max_ongoing,
        max_queued_requests=config.max_queued,
        # A model that can't be loaded won't be loadable a moment later.
        max_constructor_retry_count=1,
        graceful_shutdown_timeout_s=config.timeout_s,
        graceful_shutdown_wait_loop_s=0.5,
        health_check_period_s=5,
        user_config={},
        ray_actor_options={"num_cpus": config.num_cpus, "num_gpus": config.num_gpus},
        logging_config=_LOGGING,
        **scaling,
    )
    gateways = serve.deployment(
        Gateway,
        name=GATEWAY,
        num_replicas=config.gateways,
        max_ongoing_requests=_CONNECTIONS,
        max_constructor_retry_count=1,
        graceful_shutdown_timeout_s=config.timeout_s,
        graceful_shutdown_wait_loop_s=0.5,
        ray_actor_options={"num_cpus": 0},
        logging_config=_LOGGING,
    )
    moves = any(map(sources.moves, models.values()))
    return gateways.bind(engines.bind(dict(models), config, load, registry), config, moves)


def describe_deployment(models: Mapping[str, str | Path], config: ServingConfig, registry: str | None = None) -> str:
    """The file, YAML, from which `serve deploy` starts the same application on a cluster."""
    places: dict[str, Any] = {"models": {name: sources.absolute(str(run)) for name, run in models.items()}}
    if registry is not None:
        places["registry"] = Folder(registry).absolute().url
    own = config.placed().model_dump(mode="json", exclude_defaults=True, exclude={"host", "port"})
    tree = {
        "proxy_location": "EveryNode",
        "http_options": {"host": config.host, "port": config.port},
        "applications": [
            {
                "name": APPLICATION,
                "route_prefix": "/",
                "import_path": f"{__name__}:build",
                "args": {**places, "serving": own},
                # Changed, whatever to, and deployed again: the replicas look for newer weights.
                "deployments": [{"name": ENGINE, "user_config": {"refresh": 0}}],
            }
        ],
    }
    return yaml.safe_dump(tree, sort_keys=False, allow_unicode=True)


@dataclass(frozen=True)
class Server:
    """A running service."""

    url: str

    @property
    def metrics_url(self) -> str | None:
        """Where this node's figures are, for Prometheus."""
        own = ray.get_runtime_context().get_node_id()
        nodes = [node for node in ray.nodes() if node["NodeID"] == own and node["MetricsExportPort"]]
        return f"http://{nodes[0]['NodeManagerAddress']}:{nodes[0]['MetricsExportPort']}/metrics" if nodes else None

    def stop(self, cluster_ends: bool = False) -> None:
        """End the service and Ray Serve with it; requests under way are answered first.

        cluster_ends: the Ray cluster itself is ended next and takes Serve's own actors with it; ending them one by one
        before makes Ray complain of an actor that ends itself.
        """
        with suppress(RayServeException):  # it may have been ended already
            serve.delete(APPLICATION)
        if not cluster_ends:
            serve.shutdown()


def serve_run(
    run: str | Path,
    config: ServingConfig | None = None,
    models: Mapping[str, str | Path] | None = None,
    *,
    load: Load = load_model,
    registry: str | None = None,
) -> Server:
    """Serve a model on the Ray that is initialised; returns when the service answers.

    run: where it comes from (`sources`): a run's folder, of which each replica loads the newest sound checkpoint, an
    exported folder, or MODEL@NAME; it is served under its own name and is the default. config: the run's own if None.
    models: further ones by the names under which they are served. load: replaces the way a replica loads a run.
    registry: where MODEL@NAME is; None: as `Registry` finds it.

    Raises `UserError` if the port is taken, Serve runs already, or a model can't be loaded.
    """
    places = named(run, models or {})
    registry = None if registry is None else Folder(registry).absolute().url
    for place in places.values():
        sources.check(place, registry, print)
    config = (sources.settings(str(run), {}) if config is None else config).placed()
    port = free_port(config.host, config.port)
    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    if serve.status().proxies:
        raise UserError("Ray Serve runs on this Ray cluster already; stop it first (serve.shutdown)")
    serve.start(proxy_location="HeadOnly", http_options={"host": config.host, "port": port})
    try:
        serve.run(application(places, config, load, registry), name=APPLICATION, route_prefix="/")
    except RuntimeError as error:
        cause = _cause()
        serve.shutdown()
        raise UserError(f"the service did not start: {cause}") from error
    host = "127.0.0.1" if config.host in ("0.0.0.0", "::") else config.host
    return Server(f"http://{host}:{port}")


def named(run: str | Path, models: Mapping[str, str | Path]) -> dict[str, str]:
    """Where models come from by the names under which they are served: the first one's own, and those given.

    Raises `UserError`.
    """
    found = {sources.name_of(str(run)): sources.address(run)}
    for name, place in models.items():
        if name in found:
            raise UserError(f"two models are called {name!r}: each needs a name of its own")
        found[name] = sources.address(place)
    return found


def free_port(host: str, port: int) -> int:
    """`port`, or any free one for 0, after a trial that it can be bound. Raises `UserError` naming it if it can't."""
    if not 0 <= port <= 65535:
        raise UserError(f"port {port} does not exist; allowed are 1 to 65535, and 0 for any free one")
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as trial:
        # As servers do: a port whose last connections are still fading away is not in use.
        trial.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            trial.bind((host, port))
        except OSError as error:
            reason = error.strerror or str(error)
            raise UserError(f"can't listen at {host}, port {port}: {reason}; choose another port") from None
        return trial.getsockname()[1]


def _cause() -> str:
    """What Serve knows of why the application failed: the line of the replica's traceback that says it."""
    application = serve.status().applications[APPLICATION]
    messages = [deployment.message for deployment in application.deployments.values()] + [application.message]
    lines = [line.strip() for message in messages for line in message.splitlines() if line.strip()]
    errors = [line for line in lines if "Error: " in line and not line.endswith("Traceback (most recent call last):")]
    return errors[-1] if errors else lines[0] if lines else "no reason given"
