"""A command as it is typed here -> a job that stands alone: its settings validated, the files that it names taken
along, and every path one of the cluster's (`orchestration.jobs.paths`)."""

import os
import shlex
from collections.abc import Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any

import typer
import yaml

from md4.errors import UserError
from orchestration import results
from orchestration.jobs import secrets
from orchestration.jobs.paths import PLACE, Files, Paths, Say
from orchestration.jobs.spec import VERBS, Job, make
from orchestration.registry import Registry
from orchestration.registry.references import reference
from pipelines.storage import Folder

CONFIG = "config.yaml"  # the resolved settings, in the job's folder
# Arguments that name where results are.
_RESULTS = ("run", "runs", "folder", "output", "out", "directory", "results", "registry")
_LOCAL_ONLY = ("dry_run",)
_YAML = (".yaml", ".yml")


def resolve(
    verb: str,
    arguments: Sequence[str],
    *,
    name: str | None = None,
    place: str | None = None,
    include: Sequence[str] = (),
    say: Say = lambda note: None,
    **facts: Any,
) -> Job:
    """The job that carries out `md4 VERB ARGUMENTS...` on a cluster; nothing is sent.

    Args:
        name: of the job; by default the run's, with the verb before it for all but `train`.
        place: where relative paths of results are put; None = MD4_PLACE, if it is set.
        include: files and folders here, relative to the current one, that go along under the same path.
        say: told of paths that this machine cannot check.
        facts: further fields of the job.

    Raises:
        UserError: a mistake in the command, its settings or files, or something in them that looks like a secret.
        typer's exceptions of usage: as the command itself raises them.
    """
    if verb not in VERBS:
        raise UserError(f"md4 {verb} is no job for a cluster: those are {', '.join(VERBS)}")
    for found in secrets.in_arguments(arguments):
        make(verb=verb, arguments=tuple(arguments), name="refused")  # raises, with what to do instead
        raise AssertionError(found)
    files = Files()
    for path in include:
        files.include(path)
    paths = Paths(place or os.environ.get(PLACE) or None, files, say)
    command = _Command(verb, arguments)
    where = None
    if verb == "search":
        tree, named = command.search(paths)
        files.add(command.preset_file, yaml.safe_dump(tree, sort_keys=False))
    elif command.has_settings:
        tree = command.settings()
        named = tree["name"]
        paths.settle(tree)
        files.add(CONFIG, yaml.safe_dump(tree, sort_keys=False))
        where = str(Folder(tree["runs"]) / named) if verb == "train" else tree["data"]["directory"]
    else:
        named = Path(command.given.get("run") or verb).name.replace("@", "-")
    resolved = command.rebuilt(paths)
    if verb == "search":
        where = str(Path(command.settled["studies"]) / named)
    if where is None:
        where = next((one for key in _RESULTS if (one := command.settled.get(key))), None)
    return make(
        verb=verb,
        arguments=resolved,
        name=name or (named if verb == "train" else f"{verb}-{named}").lower(),
        files=files.texts,
        typed=shlex.join(["md4", verb, *arguments]),
        place=where,
        **facts,
    )


def settings(verb: str, arguments: Sequence[str]) -> dict[str, Any]:
    """The resolved settings of a command that is about a preset, as a plain tree."""
    return _Command(verb, arguments).settings()


class _Command:
    """A verb of the command line and what was typed after it, checked as if it were to run here."""

    def __init__(self, verb: str, arguments: Sequence[str]):
        from orchestration.cli import app

        commands = typer.main.get_command(app).commands  # type: ignore[attr-defined]
        if verb not in commands:
            raise UserError(f"this version of md4 has no command {verb!r}")
        self.verb, self._command = verb, commands[verb]
        context = self._command.make_context(f"md4 {verb}", list(arguments))  # every mistake of usage
        self.given: dict[str, Any] = self._command.make_parser(context).parse_args(list(arguments))[0]
        if self.given.get("suite") and "results" in {one.name for one in self._command.params}:
            self.given.setdefault("results", str(results.place(None)))  # the job has another environment and folder
        if reference(self.given.get("run") or "") and "registry" in {one.name for one in self._command.params}:
            self.given.setdefault("registry", Registry().folder.url)
        if verb == "search":
            self.given.setdefault("studies", "studies")
        self.settled: dict[str, str] = {}
        self.kept: list[str] = []  # overrides that stay arguments
        for option in _LOCAL_ONLY:
            if self.given.get(option):
                raise UserError(f"--{option.replace('_', '-')} stands before the verb: md4 submit --dry-run {verb} ...")

    @property
    def has_settings(self) -> bool:
        """Is it about a preset and its settings?"""
        return "preset" in self.given

    def settings(self) -> dict[str, Any]:
        """The resolved settings as a plain tree; UserError as of `orchestration.config.load`."""
        from orchestration.config import load

        config = load(self.given["preset"], self.given.get("overrides") or (), self.given.get("config"))
        return config.model_dump(mode="json")

    @property
    def preset_file(self) -> str:
        """The file with the settings, in the job's folder. A study is named after its preset, and tells of it."""
        return f"{Path(self.given['preset']).stem}.yaml" if self.verb == "search" else CONFIG

    def search(self, paths: Paths) -> tuple[dict[str, Any], str]:
        """The settings of all trials as they were given, with the cluster's paths, and the name of the study.

        What follows from the settings may differ between trials, so it is not in them.
        """
        from orchestration.search.run import default_name, find_space, make_plan
        from orchestration.search.space import PREFIX

        given, overrides = self.given, self.given.get("overrides") or ()
        space = find_space(Path(given["space"]) if given.get("space") else None)
        given.setdefault("name", default_name(given["preset"], space))
        studies = paths.shared(f"studies={given['studies']}", given["studies"])
        file = given.get("config")
        plan = make_plan(given["preset"], space, overrides, file and Path(file), given["name"], studies, elsewhere=True)
        self.kept = [one for one in overrides if one.startswith(PREFIX)]
        tree: dict[str, Any] = deepcopy(plan.base)
        before = plan.configs[0].data.model_dump(mode="json")
        after = deepcopy(before)
        paths.settle_data(after)
        _lay_changes(tree.setdefault("data", {}), before, after)
        return tree, given["name"]

    def rebuilt(self, paths: Paths) -> tuple[str, ...]:
        """The arguments again, with the cluster's paths."""
        positional, options = [], []
        for parameter in self._command.params:
            if parameter.name not in self.given or parameter.name in ("overrides", "config"):
                positional += self.kept if parameter.name == "overrides" else ()
                continue
            value = self.preset_file if parameter.name == "preset" else self.given[parameter.name]
            if value is None:  # an argument that may be left out, and was
                continue
            values = list(value) if isinstance(value, list | tuple) else [value]
            if parameter.name != "preset":
                values = [self._settle(parameter.name, one, paths) for one in values]
            if parameter.param_type_name == "argument":
                positional += values
                continue
            for one in values:
                if isinstance(one, bool):
                    options.append(parameter.opts[0] if one else parameter.secondary_opts[0])
                else:
                    options += [parameter.opts[0], one]
        return (*options, *(["--"] if any(one.startswith("-") for one in positional) else []), *positional)

    def _settle(self, name: str, value: Any, paths: Paths) -> Any:
        if not isinstance(value, str):
            return value
        shown = f"{name}={value}"
        if name == "run" and reference(value):
            return value  # what it means is known when the job runs
        if name == "suite":
            return paths.suite(value)
        if self.verb == "search" and (name == "name" or (name == "space" and Path(value).suffix not in _YAML)):
            return value
        if name == "studies":
            self.settled[name] = paths.shared(shown, value)
            return self.settled[name]
        if name in _RESULTS:
            self.settled[name] = paths.result(shown, value)
            return self.settled[name]
        return paths.option(shown, value)


def _lay_changes(tree: dict[str, Any], before: dict[str, Any], after: dict[str, Any]) -> None:
    """Lay what differs between two resolved trees onto the one that they were resolved from, in place."""
    for key, value in after.items():
        if value == before[key]:
            continue
        if isinstance(value, list) and isinstance(tree.get(key), list):
            for own, *pair in zip(tree[key], before[key], value, strict=True):
                _lay_changes(own, *pair)
        else:
            tree[key] = value
