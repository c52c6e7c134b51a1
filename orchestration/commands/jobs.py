"""`md4 submit` and `md4 jobs`: commands carried out by a Ray cluster (`orchestration.jobs`)."""

import json
import sys
from typing import Annotated, Any

import typer

from orchestration.commands.arguments import duration, group, pairs, say, wide

sending = group()
app = group("The jobs of a cluster: list, logs, stop, resubmit.")

Address = Annotated[
    str | None,
    typer.Option(help="the cluster's dashboard, http(s)://HOST:PORT; else RAY_API_SERVER_ADDRESS says it"),
]
Place = Annotated[
    str | None,
    typer.Option(help="s3://bucket/prefix or a folder of the cluster, for relative paths; else MD4_PLACE says it"),
]
Include = Annotated[list[str] | None, typer.Option(help="a text file or folder here that goes along; may be repeated")]
Secret = Annotated[
    list[str] | None,
    typer.Option(help="NAME=env:VARIABLE, NAME=file:PATH or NAME=k8s:SECRET/KEY, there; may be repeated"),
]
Label = Annotated[list[str] | None, typer.Option(help="KEY=VALUE, e.g. owner=anna; may be repeated")]
Cpus = Annotated[float, typer.Option(min=0, help="of the driver; 0 = on the head node")]
Gpus = Annotated[float, typer.Option(min=0, help="of the driver")]
Which = Annotated[str, typer.Argument(help="a job's name, or the id of one of its attempts")]


@sending.command(
    context_settings={"allow_interspersed_args": False, "ignore_unknown_options": False},
    options_metavar="[OPTIONS]",
)
def submit(
    verb: Annotated[str, typer.Argument(help="train, prepare, search, evaluate, quality, grid, sample or export")],
    arguments: Annotated[list[str] | None, typer.Argument(help="what follows md4 VERB, as it is typed here")] = None,
    address: Address = None,
    name: Annotated[
        str | None, typer.Option(help="of the job; of train the run's name, else VERB and that if not given")
    ] = None,
    place: Place = None,
    include: Include = None,
    secret: Secret = None,
    label: Label = None,
    attempts: Annotated[int, typer.Option(min=1, help="failed ones in a row, without progress, that end the job")] = 3,
    wait: Annotated[str, typer.Option(help="before the second attempt; doubled for each after it")] = "10s",
    longest_wait: Annotated[str, typer.Option(help="before any attempt")] = "5m",
    budget: Annotated[
        str | None, typer.Option(help="time that failed attempts and waits may take in all; no limit if not given")
    ] = None,
    time_limit: Annotated[str | None, typer.Option(help="of the whole job: 90, 30m, 2h, 1d; none if not given")] = None,
    cpus: Cpus = 0,
    gpus: Gpus = 0,
    install: Annotated[
        bool, typer.Option("--install", help="install our requirements there, at the versions that are here")
    ] = False,
    again: Annotated[bool, typer.Option("--again", help="also if the same has succeeded already")] = False,
    detach: Annotated[bool, typer.Option("--detach", help="don't follow the log")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="print all that would be sent, and send nothing")] = False,
) -> None:
    """Have a Ray cluster carry out `md4 VERB ARGUMENTS...`, and follow its log.

    The exit code is the command's own there: 0 done, 2 a mistake of the user's, 1 failed, 124 over its time limit, 143
    stopped. Ctrl-C leaves the job running.
    """
    from orchestration.jobs.resolve import resolve

    job = resolve(
        verb,
        arguments or (),
        name=name,
        place=place,
        include=include or (),
        say=lambda note: say(f"note: {note}"),
        secrets=tuple(secret or ()),
        labels=pairs(label, "--label"),
        retry={
            "attempts": attempts,
            "first_s": duration(wait, "--wait"),
            "longest_s": duration(longest_wait, "--longest-wait"),
            "budget_s": duration(budget, "--budget"),
        },
        time_limit_s=duration(time_limit, "--time-limit"),
        num_cpus=cpus,
        num_gpus=gpus,
    )
    if dry_run:
        from orchestration.jobs.connection import dashboard
        from orchestration.jobs.package import pack

        package = pack(job, f"{job.name}-1", install=install)
        say(package.describe(dashboard(address) or "http://HOST:8265"))
        say("\nnothing was sent (--dry-run)")
        return
    from orchestration.jobs.client import Jobs
    from orchestration.jobs.submission import submit as send

    jobs = Jobs(address)
    found = send(jobs, job, say, again=again, install=install)
    if found.state is not None and found.state.over:
        return
    if detach:
        say(f"follow it with: md4 jobs logs {found.id}")
        return
    _follow(jobs, found.id)


@app.command("list")
def show(
    address: Address = None,
    name: Annotated[str | None, typer.Option(help="only jobs of this name")] = None,
    label: Annotated[list[str] | None, typer.Option(help="only those with this label, KEY=VALUE")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="print everything as JSON")] = False,
) -> None:
    """The cluster's jobs that were sent by md4: name, attempt, state, times, labels, where results go."""
    from orchestration.jobs.client import Jobs
    from orchestration.jobs.listing import table

    wanted = pairs(label, "--label").items()
    jobs = Jobs(address)
    found = [one for one in jobs.known(name) if wanted <= one.labels.items()]
    if as_json:
        print(json.dumps([one.as_tree() for one in found], indent=1))
    elif not found:
        say(f"no such jobs at {jobs.address}" if name or label else f"no jobs of md4 at {jobs.address}")
    else:
        wide.print(table(found))


@app.command()
def logs(
    which: Which,
    address: Address = None,
    follow: Annotated[bool, typer.Option(help="until the job's end")] = True,
) -> None:
    """Print a job's log, of a name the newest attempt's, and follow it; the exit code is the job's."""
    from orchestration.jobs.client import Jobs

    jobs = Jobs(address)
    found = jobs.find(which)
    if not follow:
        print(jobs.log(found.id), end="")
        return
    _follow(jobs, found.id)


@app.command()
def stop(which: Which, address: Address = None) -> None:
    """Stop a job; training goes on from its last checkpoint when it is submitted again."""
    from orchestration.jobs.client import Jobs
    from orchestration.jobs.spec import State

    jobs = Jobs(address)
    found = jobs.find(which)
    if found.state.over:
        say(f"{found.id} is over already: {found.state}")
        return
    jobs.stop(found.id)
    if found.state == State.PENDING:
        say(f"{found.id} has not begun, and ends when its turn comes")
    else:
        say(f"{found.id} was asked to end; submitted again, it goes on")


@app.command()
def resubmit(
    which: Which,
    address: Address = None,
    detach: Annotated[bool, typer.Option("--detach", help="don't follow the log")] = False,
) -> None:
    """Submit a job that is over once more, with the code and files that it had."""
    from orchestration.jobs.client import Jobs
    from orchestration.jobs.submission import resubmit as send

    jobs = Jobs(address)
    found = send(jobs, which, say)
    if detach:
        say(f"follow it with: md4 jobs logs {found}")
        return
    _follow(jobs, found)


def _follow(jobs: Any, submission_id: str) -> None:
    """Follow a job to its end, and end with its exit code."""
    try:
        state = jobs.follow(submission_id, lambda line: print(line, flush=True))
    except KeyboardInterrupt:
        print(f"\nmd4: {submission_id} goes on; follow it with: md4 jobs logs {submission_id}", file=sys.stderr)
        raise
    code = jobs.exit_code(submission_id, state)
    if code:
        print(f"md4: job {submission_id} ended: {state.lower()}, exit code {code}", file=sys.stderr)
        sys.exit(code)
    say(f"job {submission_id} succeeded")
