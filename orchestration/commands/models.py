"""`md4 models`: versions kept, compared and signed off (`orchestration.registry`)."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from md4.errors import UserError
from orchestration.commands.arguments import console, group, say

if TYPE_CHECKING:
    from rich.table import Table

    from orchestration.registry import Registry

app = group("Keep versions of models: add them, compare them, sign them off by rules, go back.")

Place = Annotated[
    str | None,
    typer.Option("--registry", help="folder of the registry, here or s3://...; else MD4_REGISTRY, else registry/"),
]
Results = Annotated[str | None, typer.Option(help="table of results; else MD4_RESULTS, else results/")]
Model = Annotated[str, typer.Argument(help="name of the model")]
Ref = Annotated[str, typer.Argument(help="MODEL[@REF]: a version's number, a name such as production, or latest")]
SignedName = Annotated[str, typer.Argument(metavar="NAME", help="a signed-off name, such as staging or production")]
By = Annotated[str | None, typer.Option(help="who signs; else $USER")]
Why = Annotated[str, typer.Option(help="the reason, for the history")]


@app.command()
def add(
    model: Model,
    source: Annotated[str, typer.Argument(metavar="RUN|FOLDER", help="folder of a run, or of an exported model")],
    note: Annotated[str, typer.Option(help="what is to be known of it")] = "",
    results: Results = None,
    ema: Annotated[bool, typer.Option(help="averaged weights, of a run that has them")] = True,
    by: By = None,
    registry: Place = None,
) -> None:
    """Make a run's newest sound checkpoint, or an exported model, the next version; it never changes again."""
    from orchestration.results import place

    there = _registry(registry)
    before = {version.number for version in there.versions(model)}
    version = there.add(model, source, note=note, by=by, ema=ema, results=place(results), say=say)
    if version.number not in before:
        say(f"added: {version}, {version.folder}; next: md4 models promote {model} {version.number} staging")


@app.command("list")
def list_(
    model: Annotated[str | None, typer.Argument(help="only this model")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="print everything as JSON")] = False,
    registry: Place = None,
) -> None:
    """All versions, and the names that they have."""
    from orchestration.registry import tables

    there = _registry(registry)
    models = there.models() if model is None else [there.version(model).model]
    if as_json:
        print(json.dumps({model: tables.tree(there, model) for model in models}, indent=1))
        return
    if not models:
        say(f"{there} has no models; next: md4 models add MODEL RUN")
        return
    _print(tables.versions(there, models))


@app.command()
def show(ref: Ref, results: Results = None, registry: Place = None) -> None:
    """A version: where it comes from and what was measured; without @REF the model, with the history of its names."""
    from orchestration.registry import tables
    from orchestration.results import place

    there = _registry(registry)
    version = there.find(ref)
    names = [there.name(version.model, name) for name in there.names(version.model)]
    if "@" in ref:
        _print(*tables.of_version(version, tables.titles(names, version.number), place(results)))
        return
    _print(tables.versions(there, [version.model]))
    for name in names:
        now = "nothing" if name.version is None else f"version {name.version}"
        say(f"\n{name.name}: {now}")
        _print(tables.history(name))
        if name.candidate is not None:
            from orchestration.serving import trial_record

            trial = name.candidate
            say(
                f"\nversion {trial.version} is tried as {name.name} with {trial.share:.0%} of the requests since "
                f"{trial.since:%Y-%m-%d %H:%M}"
            )
            record = trial_record.read(there, name)
            if record is None:
                say("nothing is known of it yet: no service has looked (md4 serve, every serving.refresh_s)")
            else:
                _print(tables.trial(record))


@app.command()
def compare(first: Ref, second: Ref, results: Results = None, registry: Place = None) -> None:
    """Two versions: configuration, size, origin, and results with difference, standard error and z."""
    from orchestration.registry import comparison, tables
    from orchestration.results import place

    there = _registry(registry)
    one, other = there.find(first), there.find(second)
    if (one.model, one.number) == (other.model, other.number):
        raise UserError(f"{first} and {second} are both {one}")
    _print(tables.differences(one, other))
    lines = comparison.results(one, other, place(results))
    if lines:
        say("")
        _print(tables.compared(lines, one, other))
    else:
        say("\nnothing was measured of either: md4 evaluate RUN --suite FILE")


@app.command()
def promote(
    model: Model,
    version: Annotated[str, typer.Argument(help="its number, a name such as staging, or latest")],
    name: SignedName,
    rules: Annotated[Path | None, typer.Option(help="more rules (YAML) than those of the registry")] = None,
    share: Annotated[
        float | None, typer.Option(help="try it with this part of the traffic first, such as 0.1; not all at once")
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="judge, requirement by requirement; change nothing")
    ] = False,
    force: Annotated[bool, typer.Option("--force", help="whatever the rules say; needs --why")] = False,
    why: Why = "",
    by: By = None,
    results: Results = None,
    registry: Place = None,
) -> None:
    """Give a name to a version, if the rules allow it (rules.yaml of the registry and of the model, --rules)."""
    from orchestration.registry import promotion, tables
    from orchestration.results import place

    there = _registry(registry)
    found = there.version(model, version)
    wanted = promotion.Wanted(found, name, share, rules, why, by, force)
    decision = promotion.promote(there, wanted, place(results), dry_run=dry_run, say=say)
    for verdict in decision.verdicts:
        say(f"{name}, by {verdict.origin}:")
        _print(tables.verdict(verdict, found))
    unmet = f"{len(decision.unmet)} of {sum(len(verdict.findings) for verdict in decision.verdicts)} requirements"
    if not decision.allowed:
        raise UserError(f"{found} is not promoted to {name}: {unmet} are not met")
    if decision.already:
        tried = decision.seen.version != found.number
        say(f"{found} is {'tried as ' if tried else ''}{name} already; nothing was changed")
        return
    said = f"forced, though {unmet} are not met" if decision.unmet else "the rules are met"
    said = said if decision.verdicts else "there are no rules for it"
    if dry_run:
        say(f"{found} would become {name} ({said}); nothing was changed (--dry-run)")
    elif share is None:
        before = "none" if decision.seen.version is None else f"version {decision.seen.version}"
        say(f"{found} is {name} now ({said}); before: {before}")
    else:
        say(f"{found} is tried as {name} with {share:.0%} of the traffic ({said})")
        say(
            f"next: a service of {model}@{name} confirms it or rolls it back (md4 models show {model} tells); by hand "
            f"md4 models confirm {model} {name}, or md4 models rollback {model} {name}"
        )


@app.command()
def confirm(model: Model, name: SignedName, why: Why = "", by: By = None, registry: Place = None) -> None:
    """Sign off the version that is being tried: it gets all of the traffic."""
    from orchestration.registry import promotion

    now = promotion.confirm(_registry(registry), model, name, why=why, by=by)
    say(f"{model} version {now.version} is {name} now")


@app.command()
def rollback(
    model: Model,
    name: SignedName,
    why: Why = "",
    version: Annotated[
        int | None, typer.Option(help="the one that is to lose the name; nothing happens if it has lost it already")
    ] = None,
    by: By = None,
    registry: Place = None,
) -> None:
    """Drop the version that is being tried or, if there is none, go back to the one before."""
    from orchestration.registry import promotion

    before, after = promotion.rollback(_registry(registry), model, name, why, version=version, by=by, say=say)
    if after == before:
        say(f"{model}: {name} is version {after.version} already; nothing was changed")
        return
    last = after.history[-1]
    what = "dropped as a candidate" if last.action == "drop" else "taken back"
    say(f"{model} version {last.version} was {what}; {name} is version {after.version}")


@app.command()
def verify(
    ref: Annotated[str | None, typer.Argument(help="MODEL or MODEL@REF; everything if not given")] = None,
    registry: Place = None,
) -> None:
    """Read all files again and compare them with their sha256; every damaged one is named."""
    from orchestration.registry.audit import check

    there = _registry(registry)
    found = check(there, ref, say)
    if found.damage:
        raise UserError(f"{there} is damaged: {len(found.damage)} of what it says is not so, see above")
    say(f"{there} is sound: {found.versions} versions, {found.files} files, {found.bytes:,} bytes")


@app.command()
def fetch(ref: Ref, registry: Place = None) -> None:
    """Print a folder on this machine that has a version's verified files, for `md4.load` and other verbs."""
    print(_registry(registry).find(ref).fetch())


def _registry(place: str | None) -> "Registry":
    from orchestration.registry import Registry

    return Registry(place)


def _print(*tables: "Table") -> None:
    """Tables in full: columns stay whole where a terminal is narrow, and their last one wraps at 160 characters."""
    wide = Console(highlight=False, width=max(console.width, 160))
    for table in tables:
        with wide.capture() as text:
            wide.print(table)
        say("\n".join(line.rstrip() for line in text.get().rstrip("\n").split("\n")))
