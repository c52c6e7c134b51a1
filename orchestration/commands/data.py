"""`md4 data`: sets looked at, verified and merged (`pipelines.inspect`); runs audited (`orchestration.audit`)."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from md4.errors import UserError
from orchestration.commands.arguments import RunFolder, group, say

if TYPE_CHECKING:
    import numpy as np

    from pipelines.shards import ShardSet
    from pipelines.storage import Folder

app = group("Look at prepared sets, check them, join them; audit what runs consumed of them.")

Where = Annotated[str, typer.Argument(help="a prepared set (a path or s3://...), or the folder of a run that has one")]
SplitName = Annotated[str, typer.Option("--split", help="train, validation or test")]
Out = Annotated[Path | None, typer.Option("--out", help="where the picture of images is written")]


def find(where: str) -> "Folder":
    """The folder of a prepared set, or of the one that a run was trained on; UserError for a run's that is unknown."""
    from pipelines.config import prepared_path
    from pipelines.storage import Folder

    if Folder(where).exists("config.yaml"):
        from orchestration.runs import Run

        sets = [str(prepared_path(one)) for _, one in Run(where).config.data.sets()]
        if len(sets) > 1:
            raise UserError(f"run {where} has {len(sets)} sets: name one of {', '.join(sets)}")
        return Folder(sets[0])
    return Folder(where)


@app.command()
def verify(where: Where) -> None:
    """Read all of a set again, and compare every shard with its sha256."""
    from pipelines.manifest import Manifest
    from pipelines.shards import verify as check

    root = find(where)
    manifest = Manifest.load(root)
    every = [shard for split in manifest.splits.values() for shard in split.shards]
    with _progress("verifying", sum(shard.bytes for shard in every)) as advance:
        check(root, advance)
    size = sum(shard.bytes for shard in every)
    say(f"{root} is sound: {len(every)} shards, {size:,} bytes, fingerprint {manifest.fingerprint}")


@app.command()
def describe(where: Where) -> None:
    """Print what the manifest says: counts, sizes, splits, source, fingerprint, entropies."""
    from pipelines.inspect import describe as about

    say(about(find(where)))


@app.command()
def show(
    where: Where,
    row: Annotated[int, typer.Argument(help="id of the row, from 0")],
    split: SplitName = "train",
    out: Out = None,
) -> None:
    """Print a row as text, or write it as a picture."""
    import numpy as np

    from pipelines.shards import ShardSet

    _show(ShardSet(find(where), split), np.array([row]), out or Path(f"{split}-row-{row}.png"))


@app.command()
def sample(
    where: Where,
    count: Annotated[int, typer.Argument(help="how many rows")],
    split: SplitName = "train",
    seed: Annotated[int, typer.Option(help="of the draw")] = 0,
    out: Out = None,
) -> None:
    """Print rows drawn at random, or write them as one picture."""
    from pipelines.inspect import some_rows
    from pipelines.shards import ShardSet

    shards = ShardSet(find(where), split)
    ids = some_rows(shards, count, seed)
    _show(shards, ids, out or Path(f"{split}-sample-{count}-seed-{seed}.png"))


@app.command()
def merge(
    first: Where,
    second: Where,
    target: Annotated[str, typer.Argument(help="folder of the new set: a path or s3://...")],
) -> None:
    """Join two sets of the same vocabulary and row length to a new one."""
    from pipelines.inspect import merge as join
    from pipelines.manifest import Manifest
    from pipelines.storage import Folder

    places = find(first), find(second)
    splits = [split for place in places for split in Manifest.load(place).splits.values()]
    with _progress("merging", sum(shard.bytes for split in splits for shard in split.shards)) as advance:
        manifest = join(*places, Folder(target), say, advance)
    rows = ", ".join(f"{name} {split.rows:,} rows" for name, split in manifest.splits.items())
    say(f"merged: {rows} in {target}, fingerprint {manifest.fingerprint}")


def _show(shards: "ShardSet", ids: "np.ndarray", out: Path) -> None:
    from pipelines.inspect import rows

    found = rows(shards, ids)
    if isinstance(found, list):
        for number, text in zip(ids.tolist(), found, strict=True):
            say(f"[{number}] {text}")
        return
    found.save(out, "PNG")
    say(f"written: {out} (rows {', '.join(map(str, ids.tolist()))})")


@contextmanager
def _progress(what: str, total: int) -> Iterator[Callable[[int], None]]:
    """A progress bar with rate and ETA on a terminal, nothing elsewhere; gives the function that advances it."""
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    console = Console(stderr=True)
    columns = (TextColumn(what), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal, transient=True) as bar:
        task = bar.add_task(what, total=total)
        yield lambda amount: bar.advance(task, amount)


@app.command()
def audit(
    run: RunFolder,
    other: Annotated[str | None, typer.Argument(help="folder of another run, to compare with")] = None,
) -> None:
    """Check which rows a run consumed, step by step: against its configuration and data, or another run."""
    from orchestration import audit as audits

    say(audits.audit(run) if other is None else audits.compare(run, other))
