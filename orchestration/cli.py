"""`md4`: one command with verbs (`orchestration.commands`). Each verb resolves the configuration, then calls the one
function that does the work.

A user's mistake ends in one message and exit code 2, without a stack trace; what was right and failed, in exit code 1.
"""

import sys
import warnings
from pathlib import Path

import typer

from md4.errors import UserError
from orchestration.commands import (
    cron,
    data,
    evaluation,
    jobs,
    models,
    render,
    results,
    sampling,
    search,
    serving,
    tokenizer,
    training,
)

_INTERRUPTED = 130  # exit code

app = typer.Typer(
    help="Masked diffusion on discrete data: prepare, train, evaluate, sample, serve.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
for verbs in (training, search, evaluation, sampling, serving):
    app.add_typer(verbs.app)
app.add_typer(jobs.sending)
app.add_typer(jobs.app, name="jobs")
app.add_typer(cron.app, name="cron")
app.add_typer(data.app, name="data")
app.add_typer(tokenizer.app, name="tokenizer")
app.add_typer(models.app, name="models")
app.add_typer(render.app, name="render")
app.add_typer(results.app, name="results")


def main() -> None:
    """Entry point of the console command."""
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"(torch|deepspeed|ray)\b.*")
    try:
        _check_packages()
        if app(standalone_mode=False) == _INTERRUPTED:  # typer makes a return value of Ctrl-C
            raise KeyboardInterrupt
    except UserError as error:
        print(f"md4: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    except typer._click.exceptions.ClickException as error:  # type: ignore[attr-defined]
        error.show()
        sys.exit(2)
    except (KeyboardInterrupt, typer.Abort):
        print("md4: interrupted", file=sys.stderr)
        sys.exit(_INTERRUPTED)


def _check_packages() -> None:
    """`pipelines` and `orchestration` are names that others use too: a stranger found first must not be run."""
    import md4
    import orchestration
    import pipelines

    home = Path(md4.__file__).resolve().parents[1]
    for package in (pipelines, orchestration):
        found = Path(package.__file__ or "").resolve().parents[1]
        if found != home:
            raise UserError(
                f"package {package.__name__!r} comes from {found}, not from {home} beside md4: remove it from the path"
            )
