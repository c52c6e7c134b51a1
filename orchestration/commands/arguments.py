"""What several verbs share: their arguments, and how they speak."""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

console = Console(highlight=False, soft_wrap=True)

Preset = Annotated[str, typer.Argument(help="name of a preset, or a .yaml file")]
Overrides = Annotated[list[str] | None, typer.Argument(help="settings as key=value, e.g. train.steps=100")]
File = Annotated[Path | None, typer.Option("--config", help="a .yaml file laid over the preset")]
RunFolder = Annotated[str, typer.Argument(help="folder of a run, e.g. runs/demo or s3://bucket/runs/demo")]
Seed = Annotated[int | None, typer.Option(help="seed of the draws")]


def say(text: str) -> None:
    """Print a line as it is, without rich's markup."""
    console.print(text, markup=False)


def group(text: str | None = None) -> typer.Typer:
    """An app for verbs; text: what stands above them in the help, of a group that has a name."""
    return typer.Typer(help=text, no_args_is_help=True, rich_markup_mode=None)
