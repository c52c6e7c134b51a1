"""`md4 tokenizer`: vocabularies learned from a corpus, and what one makes of a text."""

from pathlib import Path
from typing import Annotated

import typer

from orchestration.commands.arguments import group, say

app = group("Learn a vocabulary of byte pairs from documents; look at what one makes of a text.")


@app.command()
def train(
    preset: Annotated[str, typer.Argument(help="name of a preset, or a .yaml file: its data are learned from")],
    overrides: Annotated[
        list[str] | None, typer.Argument(help="settings as key=value, e.g. data.source=text data.path=FILE_OR_FOLDER")
    ] = None,
    size: Annotated[int, typer.Option(help="tokens, 256 bytes and the end of a text among them")] = 8192,
    out: Annotated[Path, typer.Option(help="new folder for tokenizer.json")] = Path("tokenizer"),
    megabytes: Annotated[float, typer.Option(help="of a larger corpus, how much is read")] = 1000,
    config: Annotated[Path | None, typer.Option(help="a .yaml file laid over the preset")] = None,
) -> None:
    """Learn byte pairs from the training split of a configuration's documents."""
    from orchestration.config import load
    from pipelines.vocabularies.training import train as learn

    learn(load(preset, overrides or (), config).data, size, out, megabytes, say)
    say(f"written: {out}; next: md4 train {preset} name=mine data.vocabulary={out} ...")


@app.command()
def show(
    vocabulary: Annotated[
        str, typer.Argument(help="text8, gpt2, a tokenizer.json, or a folder with one (a run's too)")
    ],
    text: Annotated[str, typer.Argument(help="what is to be encoded")],
) -> None:
    """Print the tokens of a text, one a line: number and piece."""
    import numpy as np

    from pipelines.vocabularies import vocabulary as find

    words = find(vocabulary)
    tokens = words.encode(words.normalise(text)).tolist()
    for token in tokens:
        say(f"{token:>7}  {words.decode(np.array([token]))!r}")
    say(f"{len(tokens)} of {words.size:,} tokens of {words.name}, {len(text)} characters")
