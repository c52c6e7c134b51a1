"""`md4 render`: what a cluster needs, from a run's configuration (`infra`)."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from md4.errors import UserError
from orchestration.commands.arguments import File, Overrides, Preset, duration, group, pairs

app = group("Write what a cluster needs to run a configuration.")


@app.callback()
def _group() -> None:
    """Keeps `kuberay` a verb of its own, while it is the only one."""


@app.command()
def kuberay(
    preset: Preset,
    overrides: Overrides = None,
    config: File = None,
    kind: Annotated[str, typer.Option(help="cluster, job (training), service or cron")] = "job",
    image: Annotated[str, typer.Option(help="REGISTRY/NAME:TAG, made by infra/docker/Dockerfile")] = "",
    name: Annotated[str | None, typer.Option(help="of the object; the run's if not given")] = None,
    namespace: Annotated[str | None, typer.Option(help="of all objects")] = None,
    storage: Annotated[
        str | None, typer.Option(help="what local paths of the settings go below: pvc:NAME, or s3://bucket/prefix")
    ] = None,
    secret: Annotated[
        list[str] | None,
        typer.Option(help="a Secret whose keys become variables, or VARIABLE=k8s:SECRET/KEY; may be repeated"),
    ] = None,
    service_account: Annotated[str | None, typer.Option(help="of the pods, with access to S3 for instance")] = None,
    token_secret: Annotated[
        str | None, typer.Option(help="Secret whose key auth_token guards the cluster; KubeRay makes one if not given")
    ] = None,
    label: Annotated[list[str] | None, typer.Option(help="KEY=VALUE on all objects: owner, cost centre, ...")] = None,
    node: Annotated[list[str] | None, typer.Option(help="KEY=VALUE: label of the machines for the pods")] = None,
    spot: Annotated[
        str | None, typer.Option(help="workers on machines that may be taken away: gke, eks, karpenter or aks")
    ] = None,
    workers_per_pod: Annotated[int, typer.Option(help="training workers, each with its GPU, in a pod")] = 1,
    gpu_memory: Annotated[str | None, typer.Option(help="of one GPU, 80GB: the run must fit by the plan")] = None,
    memory: Annotated[str | None, typer.Option(help="of a pod of workers, 16GiB; by the plan if not given")] = None,
    gateway_class: Annotated[
        str | None, typer.Option(help="service: its upgrade shifts traffic step by step, by this class of Gateway")
    ] = None,
    time_limit: Annotated[str | None, typer.Option(help="job: 90, 30m, 2h, 1d; none if not given")] = None,
    keep: Annotated[int, typer.Option(min=0, help="job: seconds for which its cluster stays after its end")] = 3600,
    entry: Annotated[str | None, typer.Option(help="cron: the entry of `md4 cron` in --store")] = None,
    store: Annotated[str | None, typer.Option(help="cron: where entries lie, for pods too: s3://bucket/cron")] = None,
    model: Annotated[str | None, typer.Option(help="service: MODEL@NAME in --registry, not the run")] = None,
    registry: Annotated[str | None, typer.Option(help="service: where --model is, for pods: s3://bucket/...")] = None,
    out: Annotated[Path | None, typer.Option(help="file to write; else it is printed")] = None,
) -> None:
    """KubeRay manifests: RayCluster, RayJob, RayService, RayCronJob. Asks no cluster; next: kubectl apply -f FILE."""
    from infra.kuberay.options import Options
    from infra.render import render
    from orchestration.config import load
    from pipelines.storage import write_atomically

    settings = load(preset, overrides or (), config)
    options = Options(
        kind=kind,
        image=image,
        name=name,
        namespace=namespace,
        storage=storage,
        secrets=tuple(secret or ()),
        service_account=service_account,
        token_secret=token_secret,
        labels=pairs(label, "--label"),
        node_selector=pairs(node, "--node"),
        spot=spot,
        workers_per_pod=workers_per_pod,
        gpu_memory=gpu_memory,
        memory=memory,
        gateway_class=gateway_class,
        time_limit=duration(time_limit, "--time-limit"),
        keep=keep,
        store=store,
        model=model,
        registry=registry,
    )
    options.check()
    found = None
    if kind == "cron":
        from orchestration.cron import Store

        if entry is None:
            raise UserError("--kind cron needs --entry NAME, as `md4 cron add NAME` put it into --store")
        found = Store(store).entry(entry).entry
    text = render(settings, options, sys.argv[1:], found)
    if out is None:
        print(text, end="")
    else:
        write_atomically(out, text.encode())
        print(f"written: {out}; next: kubectl apply -f {out}", file=sys.stderr)
