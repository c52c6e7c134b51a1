"""`md4 serve | key | export`: models for others."""

import math
import os
import signal
import threading
from pathlib import Path
from typing import Annotated

import typer

from md4.errors import UserError
from orchestration.commands.arguments import RunFolder, group, say

app = group()

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


@app.command()
def serve(
    run: Annotated[str, typer.Argument(help="folder of a run or of an exported model, or MODEL@NAME in the registry")],
    settings: Annotated[
        list[str] | None, typer.Argument(help="serving settings as key=value, e.g. replicas=2 min_replicas=0")
    ] = None,
    host: Annotated[str | None, typer.Option(help="address to listen on")] = None,
    port: Annotated[int | None, typer.Option(help="HTTP port")] = None,
    model: Annotated[list[str] | None, typer.Option(help="a further one, NAME=RUN; may be repeated")] = None,
    registry: Annotated[
        str | None, typer.Option(help="folder of the registry, here or s3://...; else MD4_REGISTRY, else registry/")
    ] = None,
    write: Annotated[
        Path | None, typer.Option(help="write the file with which `serve deploy` does it on a cluster, and end")
    ] = None,
) -> None:
    """Answer sampling requests over HTTP until interrupted."""
    from orchestration.config import read_assignments
    from orchestration.registry import Registry
    from orchestration.registry.references import reference
    from orchestration.serving import sources

    given = {name: value for name, value in {"host": host, "port": port}.items() if value is not None}
    tree = read_assignments([f"serving.{setting}" for setting in settings or ()]).get("serving", {})
    config = sources.settings(run, tree | given)
    models = {}
    for one in model or ():
        name, equals, place = one.partition("=")
        if not (name and equals and place):
            raise UserError(f"--model {one!r} is not of the form NAME=RUN")
        models[name] = sources.address(place)
    if any(reference(place) for place in (run, *models.values())):
        registry = Registry(registry).folder.absolute().url

    from orchestration.cluster import cluster  # after the settings: importing Ray Serve takes seconds
    from orchestration.serving.app import describe_deployment, free_port, named, serve_run

    if write is not None:
        write.write_text(describe_deployment(named(run, models), config, registry), encoding="utf-8")
        say(f"written: {write}; next: serve deploy {write}")
        return
    free_port(config.host, config.port)  # said at once, not after half a minute
    # As many logical CPUs as the replicas ask for; Serve's own actors and gateways ask for none.
    with cluster(num_cpus=max(os.cpu_count() or 1, math.ceil(config.replicas * config.num_cpus))) as own:
        stop = _stop_when_asked()
        server = serve_run(run, config, models, registry=registry)
        say(
            f"serving {', '.join([str(run), *models])} at {server.url} (a page; POST /v1/samples, described at "
            f"{server.url}/docs; metrics at {server.metrics_url}); Ctrl-C ends it"
        )
        for number in _SIGNALS:
            signal.signal(number, lambda *_: stop.set())
        stop.wait()
        say("stopping")
        server.stop(cluster_ends=own)


def _stop_when_asked() -> threading.Event:
    """Set by a signal, also by one that comes when the service answers already but its start is not over.

    A second one ends a start that doesn't come to its end."""
    stop = threading.Event()

    def ask(number: int, frame: object) -> None:
        stop.set()
        signal.signal(number, signal.default_int_handler)
        say("stopping as soon as it has started; once more ends it at once")

    for number in _SIGNALS:
        signal.signal(number, ask)
    return stop


@app.command("key")
def make_key(
    name: Annotated[str, typer.Argument(help="whose key it is")],
    file: Annotated[Path, typer.Option(help="file of keys, to which the line of the new one is added")] = Path("keys"),
) -> None:
    """Make an API key for the service; it is shown once, the file keeps its hash."""
    from orchestration.serving.keys import Keys, new

    key, line = new(name)
    if file.exists():
        Keys(file).make_sure_is_new(name)
    with file.open("a", encoding="utf-8") as lines:
        lines.write(f"{line}\n")
    file.chmod(0o600)
    say(f"{key}\nnoted: {file}; next: md4 serve RUN keys={file}")


@app.command()
def export(
    run: RunFolder,
    folder: Annotated[Path, typer.Argument(help="new folder for the model")],
    ema: Annotated[bool, typer.Option(help="averaged weights")] = True,
) -> None:
    """Write a run's model to a folder of safetensors and JSON that `md4.load` reads."""
    from orchestration.runs import export as write

    path = write(run, folder, ema=ema, report=say)
    say(f"written: {path}; in Python: md4.load({str(path)!r}).sample(3)")
