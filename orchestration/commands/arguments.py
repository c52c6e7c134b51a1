"""What several verbs share: their arguments, and how they speak."""

import re
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from md4.errors import UserError

console = Console(highlight=False, soft_wrap=True)
wide = Console(highlight=False, width=500)  # of tables of which no row is cut or folded: the terminal wraps it

Preset = Annotated[str, typer.Argument(help="name of a preset, or a .yaml file")]
Overrides = Annotated[list[str] | None, typer.Argument(help="settings as key=value, e.g. train.steps=100")]
File = Annotated[Path | None, typer.Option("--config", help="a .yaml file laid over the preset")]
RunFolder = Annotated[str, typer.Argument(help="folder of a run, e.g. runs/demo or s3://bucket/runs/demo")]
Seed = Annotated[int | None, typer.Option(help="seed of the draws")]


_UNITS = {"": 1, "s": 1, "m": 60, "h": 3600, "d": 86400}


def say(text: str) -> None:
    """Print a line as it is, without rich's markup."""
    console.print(text, markup=False)


def group(text: str | None = None) -> typer.Typer:
    """An app for verbs; text: what stands above them in the help, of a group that has a name."""
    return typer.Typer(help=text, no_args_is_help=True, rich_markup_mode=None)


def duration(text: str | None, option: str) -> float | None:
    """Seconds of "90", "30m", "2h", "1d"; UserError for anything else."""
    if text is None:
        return None
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([smhd]?)", text.strip())
    if found is None:
        raise UserError(f"{option} {text!r} is not a time: a number of seconds, or such as 30m, 2h, 1d")
    return float(found[1]) * _UNITS[found[2]]


def pairs(texts: list[str] | None, option: str) -> dict[str, str]:
    """{KEY: VALUE} of options KEY=VALUE; UserError for anything else."""
    found = {}
    for text in texts or ():
        key, equals, value = text.partition("=")
        if not equals or not key:
            raise UserError(f"{option} {key!r} is not of the form KEY=VALUE")
        found[key] = value
    return found
