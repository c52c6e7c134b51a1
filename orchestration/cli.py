"""`md4`: one command with verbs. Each verb resolves the configuration, then calls the one function that does the work.

A user's mistake ends in one message and exit code 2, without a stack trace. Heavy imports (torch, Ray, DeepSpeed)
happen inside the verbs, so that help and mistakes answer at once.
"""

import json
import os
import sys
import warnings
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from md4.errors import UserError

app = typer.Typer(
    help="Masked diffusion on discrete data: prepare, train, evaluate, sample, serve.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
_console = Console(highlight=False, soft_wrap=True)

Preset = Annotated[str, typer.Argument(help="name of a preset, or a .yaml file")]
Overrides = Annotated[list[str] | None, typer.Argument(help="settings as key=value, e.g. train.steps=100")]
File = Annotated[Path | None, typer.Option("--config", help="a .yaml file laid over the preset")]
RunFolder = Annotated[Path, typer.Argument(help="folder of a run, e.g. runs/demo")]
Seed = Annotated[int | None, typer.Option(help="seed of the draws")]


def say(text: str) -> None:
    _console.print(text, markup=False)


@app.command()
def prepare(preset: Preset, overrides: Overrides = None, config: File = None) -> None:
    """Turn documents into shards of tokens, resumably."""
    from orchestration.cluster import cluster
    from orchestration.config import load
    from pipelines.prepare import prepare as run

    settings = load(preset, overrides or (), config)
    with cluster(num_cpus=os.cpu_count() or 1):
        path = run(settings.data, say)
    say(f"prepared: {path}")


@app.command()
def train(
    preset: Preset,
    overrides: Overrides = None,
    config: File = None,
    resume: Annotated[bool, typer.Option("--resume", help="continue the run from its newest sound checkpoint")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="check everything, print the settings, start nothing")] = False,
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
    outcome = run(settings, resume=resume, report=say)
    say(f"done: step {outcome.step} after {outcome.seconds:.0f} s; {outcome.run.path}")


@app.command()
def config(preset: Preset, overrides: Overrides = None, config: File = None) -> None:
    """Print the resolved settings and the size of the network."""
    from md4.model import count_parameters
    from orchestration.config import load

    settings = load(preset, overrides or (), config)
    say(settings.to_yaml() + f"# parameters: {count_parameters(settings.model):,}")


def main() -> None:
    """Entry point of the console command."""
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"(torch|deepspeed|ray)\b.*")
    try:
        _check_packages()
        app(standalone_mode=False)
    except UserError as error:
        print(f"md4: {error}", file=sys.stderr)
        sys.exit(2)
    except typer._click.exceptions.ClickException as error:  # type: ignore[attr-defined]
        error.show()
        sys.exit(2)
    except (KeyboardInterrupt, typer.Abort):
        print("md4: interrupted; `md4 train ... --resume` continues a run from its last checkpoint", file=sys.stderr)
        sys.exit(130)


def _check_packages() -> None:
    """`pipelines` and `orchestration` are names that others use too: a stranger found first must not be run."""
    import md4
    import orchestration
    import pipelines

    home = Path(md4.__file__).resolve().parents[1]
    for package in (pipelines, orchestration):
        found = Path(package.__file__ or "").resolve().parents[1]
        if found != home:
            raise UserError(f"package {package.__name__!r} comes from {found}, not from {home} beside md4: remove it from the path")
