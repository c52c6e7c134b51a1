"""`md4 prepare | train | status | watch | config | plan`."""

import os
from typing import Annotated

import typer

from md4.errors import UserError
from orchestration.commands.arguments import File, Overrides, Preset, RunFolder, console, group, say

app = group()


@app.command()
def prepare(preset: Preset, overrides: Overrides = None, config: File = None) -> None:
    """Turn documents into shards of tokens, resumably."""
    from orchestration.cluster import cluster
    from orchestration.config import load
    from pipelines.config import check
    from pipelines.prepare import prepare as run

    settings = load(preset, overrides or (), config)
    check(settings.data)
    with cluster(num_cpus=os.cpu_count() or 1):
        for path in [run(one, say) for _, one in settings.data.sets()]:
            say(f"prepared: {path}")


@app.command()
def train(
    preset: Preset,
    overrides: Overrides = None,
    config: File = None,
    resume: Annotated[bool, typer.Option("--resume", help="continue the run from its newest sound checkpoint")] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="check everything, print the settings, start nothing")
    ] = False,
) -> None:
    """Train on Ray: N workers, DeepSpeed ZeRO, checkpoints, evaluation on the way."""
    from orchestration.config import load
    from orchestration.train import check
    from orchestration.train import train as run

    settings = load(preset, overrides or (), config)
    if dry_run:
        check(settings, resume, say)
        say(settings.to_yaml())
        say("nothing was started (--dry-run)")
        return
    try:
        outcome = run(settings, resume=resume, report=say)
    except KeyboardInterrupt:
        say("stopped: the same command with --resume continues from the last checkpoint")
        raise
    say(f"done: step {outcome.step} after {outcome.seconds:.0f} s; {outcome.run.place}")


@app.command()
def status(
    run: RunFolder,
    as_json: Annotated[bool, typer.Option("--json", help="print everything as JSON")] = False,
) -> None:
    """How a run is doing: step, loss, speed, goodput, restarts, the last checkpoint, the last events."""
    from orchestration.status import status as read
    from orchestration.status import table

    found = read(run)
    print(found.to_json()) if as_json else console.print(table(found), soft_wrap=False)


@app.command()
def watch(
    run: RunFolder,
    every: Annotated[float, typer.Option(min=0.1, help="seconds between two looks")] = 1.0,
) -> None:
    """The same, live, with the curve of the loss, until the run is over; it may run anywhere, and be restarted."""
    from orchestration.watch import watch as show

    show(run, every, console)


@app.command()
def config(preset: Preset, overrides: Overrides = None, config: File = None) -> None:
    """Print the resolved settings and the size of the network."""
    from md4.model import count_parameters
    from orchestration.config import load

    settings = load(preset, overrides or (), config)
    say(settings.to_yaml() + f"# parameters: {count_parameters(settings.model):,}")


@app.command()
def plan(
    preset: Preset,
    overrides: Overrides = None,
    config: File = None,
    memory: Annotated[str | None, typer.Option(help="of one device: 80GB, 141GiB; else what is found here")] = None,
    price: Annotated[float | None, typer.Option(min=0, help="of one device for an hour; needs --throughput")] = None,
    throughput: Annotated[float | None, typer.Option(min=1e-9, help="tokens/s of one device, measured")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="print the plan as JSON, and nothing else")] = False,
) -> None:
    """State the memory that training needs of each device, for every ZeRO stage; settings may include gpus=1,2,4."""
    from orchestration.plan_report import run

    if price is not None and throughput is None:
        raise UserError("--price needs --throughput: without it the duration is not known")
    counts = [text.removeprefix("gpus=") for text in overrides or () if text.startswith("gpus=")]
    settings = [text for text in overrides or () if not text.startswith("gpus=")]
    run(preset, settings, config, counts[-1] if counts else None, memory, price, throughput, as_json)
