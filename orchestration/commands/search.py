"""`md4 search`: which schedule, times, learning rate, size."""

from pathlib import Path
from typing import Annotated

import typer

from orchestration.commands.arguments import File, Overrides, Preset, console, group, say

app = group()


@app.command()
def search(
    preset: Preset,
    overrides: Overrides = None,
    space: Annotated[
        Path | None,
        typer.Option(help="a .yaml file with the space and how it is searched; or the name of one that comes with md4"),
    ] = None,
    config: File = None,
    name: Annotated[str | None, typer.Option(help="of the study; else preset and space")] = None,
    studies: Annotated[str, typer.Option(help="folder of the studies, not in S3")] = "studies",
    resume: Annotated[bool, typer.Option("--resume", help="go on with a study that was interrupted")] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="check everything, print the plan with its numbers, start nothing")
    ] = False,
) -> None:
    """Search with Ray Tune: trials are ordinary runs with the same budget of tokens; a ranked report and the winner."""
    from orchestration.search.run import check, find_space, joined_packing, make_plan, run
    from orchestration.search.table import Table

    plan = make_plan(preset, find_space(space), overrides or (), config, name, studies)
    for line in plan.lines():
        say(line)
    if dry_run:
        check(plan, resume)
        if plan.packing is None:
            say(f"packing: {joined_packing(plan).describe()}")
        say("nothing was started (--dry-run)")
        return
    try:
        run(plan, resume, say, Table(console))
    except KeyboardInterrupt:
        say("stopped: the same command with --resume continues the trials from their checkpoints")
        raise
