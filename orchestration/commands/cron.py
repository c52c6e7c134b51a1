"""`md4 cron`: jobs at their times (`orchestration.cron`)."""

import json
import signal
from datetime import UTC, datetime
from typing import Annotated

import typer

from md4.errors import Failed, UserError
from orchestration.commands.arguments import console, duration, group, pairs, say, wide
from orchestration.commands.jobs import Address, Cpus, Gpus, Include, Label, Place, Secret

app = group("Jobs at their times: add, list, run, history, pause, resume, remove.")

Name = Annotated[str, typer.Argument(help="name of the entry")]
StorePlace = Annotated[
    str | None,
    typer.Option("--store", help="folder of entries and records, a path or s3://...; else MD4_CRON says it, else cron"),
]


@app.command()
def add(
    name: Annotated[str, typer.Argument(help="name of the entry: a-z 0-9 -, unique among all stores of a cluster")],
    command: Annotated[list[str], typer.Argument(help="after --: what follows `md4 submit`, e.g. evaluate s3://...")],
    at: Annotated[str, typer.Option(help="'minute hour day month weekday', as in crontab(5): '30 2 * * 1-5'")],
    zone: Annotated[str, typer.Option(help="time zone of the IANA list, e.g. Europe/Berlin")] = "UTC",
    overlap: Annotated[str, typer.Option(help="while the run before goes on: skip, or wait for its end")] = "skip",
    catch_up: Annotated[
        str, typer.Option(help="how late a missed time may still be run, e.g. 6h; of several, the last one is")
    ] = "0",
    replace: Annotated[bool, typer.Option("--replace", help="instead of the entry of that name")] = False,
    store: StorePlace = None,
    place: Place = None,
    include: Include = None,
    secret: Secret = None,
    label: Label = None,
    attempts: Annotated[int, typer.Option(min=1, help="failed ones in a row, without progress, that end a run")] = 3,
    budget: Annotated[str | None, typer.Option(help="time that a run's failed attempts may take in all")] = None,
    time_limit: Annotated[str | None, typer.Option(help="of a run: 90, 30m, 2h, 1d; none if not given")] = None,
    cpus: Cpus = 0,
    gpus: Gpus = 0,
) -> None:
    """Have `md4 submit VERB ARGUMENTS...` done at times: md4 cron add NAME --at '30 2 * * *' -- VERB ARGUMENTS...

    A time that clocks leap over is taken at the leap, one that comes twice is taken once.
    """
    from orchestration.cron import Schedule, Store
    from orchestration.cron.entry import check_name, make
    from orchestration.jobs.resolve import resolve

    check_name(name)
    Schedule(at, zone)  # before what takes longer
    verb, *arguments = command
    job = resolve(
        verb,
        arguments,
        name=None if verb == "train" else name,
        place=place,
        include=include or (),
        say=lambda note: say(f"note: {note}"),
        secrets=tuple(secret or ()),
        labels={"cron": name, **pairs(label, "--label")},
        retry={"attempts": attempts, "budget_s": duration(budget, "--budget")},
        time_limit_s=duration(time_limit, "--time-limit"),
        num_cpus=cpus,
        num_gpus=gpus,
    )
    entry = make(
        name=name, schedule=at, zone=zone, job=job, overlap=overlap, catch_up_s=duration(catch_up, "--catch-up")
    )
    now, kept = datetime.now(UTC), Store(store)
    new = kept.add(entry, now, replace=replace)
    times = entry.times()
    coming = ", ".join(f"{time.astimezone(times.zone):%Y-%m-%d %H:%M %Z}" for time in times.next(now, 3))
    say(f"{'added' if new else 'there already'}: {name} in {kept}; next: {coming}")


@app.command("list")
def show(
    store: StorePlace = None, as_json: Annotated[bool, typer.Option("--json", help="print everything as JSON")] = False
) -> None:
    """The entries: their next times, and what became of the last one."""
    from orchestration.cron import Store, listing

    kept, now = Store(store), datetime.now(UTC)
    found = [(name, stored, next(iter(kept.history(name, 1)), None)) for name, stored in kept.entries()]
    if as_json:
        print(json.dumps(listing.entries_tree(found, now), indent=1))
    elif found:
        console.print(listing.entries(found, now), soft_wrap=False)
    else:
        say(f"no entries in {kept}")


@app.command()
def history(
    name: Name,
    store: StorePlace = None,
    count: Annotated[int, typer.Option(min=1, help="records, the newest first")] = 20,
    as_json: Annotated[bool, typer.Option("--json", help="print everything as JSON")] = False,
) -> None:
    """What became of an entry's times: what ran when, for how long, how it ended; what did not, and why."""
    from orchestration.cron import Store, listing

    kept = Store(store)
    entries = dict(kept.entries())
    records = kept.history(name, count)
    if not records and name not in entries:
        kept.entry(name)  # raises, with the names that there are
    if as_json:
        print(json.dumps([listing.record_tree(one) for one in records], indent=1))
        return
    if not records:
        say(f"{name}: no time has come yet")
        return
    stored = entries.get(name)
    zone = UTC if stored is None or isinstance(stored, UserError) else stored.entry.times().zone
    wide.print(listing.history(records, zone))


@app.command()
def run(
    store: StorePlace = None,
    address: Address = None,
    once: Annotated[bool, typer.Option("--once", help="do what is due now, and end")] = False,
    every: Annotated[str, typer.Option(help="how soon changed entries are noticed")] = "30s",
) -> None:
    """Submit jobs at their times until interrupted. It may be killed, and run twice: no time runs twice."""
    from orchestration.cron import Service, Store
    from orchestration.cron.service import SystemClock
    from orchestration.jobs.client import Jobs

    clock, kept = SystemClock(), Store(store)
    service = Service(
        kept,
        Jobs(address),
        clock,
        lambda line: print(f"{clock.now():%Y-%m-%dT%H:%M:%SZ} {line}", flush=True),
        duration(every, "--every") or 1.0,
    )
    if once:
        service.look()
        if service.trouble:
            raise Failed(f"not everything that is due could be done: {service.trouble}")
        return
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: clock.stop.set())
    say(f"cron: entries of {kept}; Ctrl-C ends it, what it submitted goes on")
    service.run()


@app.command()
def pause(name: Name, store: StorePlace = None) -> None:
    """Run an entry no more until it is resumed; what is running goes on."""
    _turn(name, store, paused=True)


@app.command()
def resume(name: Name, store: StorePlace = None) -> None:
    """Run an entry again from now on."""
    _turn(name, store, paused=False)


@app.command()
def remove(name: Name, store: StorePlace = None) -> None:
    """Take an entry out. Its history stays; what is running goes on."""
    from orchestration.cron import Store

    kept = Store(store)
    kept.remove(name, datetime.now(UTC))
    say(f"removed: {name} from {kept}; its history stays: md4 cron history {name}")


def _turn(name: str, store: str | None, *, paused: bool) -> None:
    from orchestration.cron import Store

    changed = Store(store).pause(name, paused, datetime.now(UTC))
    say(f"{name} {'is' if changed else 'was already'} {'paused' if paused else 'running'}")
