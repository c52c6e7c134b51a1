"""A command as it is typed here -> a job that stands alone: its settings validated, the files that it names taken
along, and every path one of the cluster's.

Paths on a cluster. What a job writes must outlive the folder in which it runs, so a relative path of runs, data,
checkpoints or output is put below the *place* (`--place`, `MD4_PLACE`): s3://bucket/prefix, or an absolute folder that
all machines of the cluster have; without a place it is refused. An absolute path is taken for one of the cluster's.
A tokenizer, and a file that an option names, is taken along; other local files with `--include`.
"""

import os
import shlex
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import typer
import yaml

from md4.errors import UserError
from orchestration.jobs import secrets
from orchestration.jobs.spec import VERBS, Job, make
from pipelines.storage import Folder
from pipelines.vocabularies import TOKENIZER

CONFIG = "config.yaml"  # the resolved settings, in the job's folder
PLACE = "MD4_PLACE"
_FILE_BYTES, _ALL_BYTES = 16 << 20, 32 << 20  # of the files that go with a job
_RESULTS = ("run", "runs", "folder", "output", "out", "directory")  # arguments that name where results are
_LOCAL_ONLY = ("dry_run",)

Say = Callable[[str], None]


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
    files = _Files()
    for path in include:
        files.include(path)
    paths = _Paths(place or os.environ.get(PLACE) or None, files, say)
    command = _Command(verb, arguments)
    where = None
    if command.has_settings:
        tree = command.settings()
        named = tree["name"]
        paths.settle(tree)
        files.add(CONFIG, yaml.safe_dump(tree, sort_keys=False))
        where = str(Folder(tree["runs"]) / named) if verb == "train" else tree["data"]["directory"]
    else:
        named = Path(command.given.get("run") or verb).name
    resolved = command.rebuilt(paths)
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
        self.settled: dict[str, str] = {}
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

    def rebuilt(self, paths: "_Paths") -> tuple[str, ...]:
        """The arguments again, with the cluster's paths."""
        positional, options = [], []
        for parameter in self._command.params:
            if parameter.name not in self.given or parameter.name in ("overrides", "config"):
                continue
            value = CONFIG if parameter.name == "preset" else self.given[parameter.name]
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

    def _settle(self, name: str, value: Any, paths: "_Paths") -> Any:
        if not isinstance(value, str):
            return value
        shown = f"{name}={value}"
        if name in _RESULTS:
            self.settled[name] = paths.result(shown, value)
            return self.settled[name]
        return paths.option(shown, value)


class _Files:
    """Text files of this machine that go with a job."""

    def __init__(self) -> None:
        self.texts: dict[str, str] = {}

    def include(self, path: str) -> None:
        """A file or a folder, relative to the current one; UserError for what can't go along."""
        source = Path(path)
        if not source.exists():
            raise UserError(f"--include {path}: there is no such file or folder here")
        if source.is_absolute() or ".." in source.parts:
            raise UserError(
                f"--include {path}: a path below the current folder is needed, it is the same on the cluster"
            )
        for file in sorted(source.rglob("*")) if source.is_dir() else [source]:
            if file.is_file() and not any(part.startswith(".") or part == "__pycache__" for part in file.parts):
                self.take(file, file.as_posix())

    def take(self, file: Path, name: str) -> str:
        """A file, under a name; gives the name."""
        try:
            text = file.read_bytes().decode("utf-8")
        except UnicodeDecodeError:
            raise UserError(
                f"{file} is not a text file: put it where the cluster can read it, for instance in S3"
            ) from None
        except OSError as error:
            raise UserError(f"{file} can't be read ({error})") from None
        return self.add(name, text)

    def add(self, name: str, text: str) -> str:
        if self.texts.get(name, text) != text:
            raise UserError(f"two files of the job would be called {name!r}")
        self.texts[name] = text
        sizes = {one: len(content.encode()) for one, content in self.texts.items()}
        if sizes[name] > _FILE_BYTES or sum(sizes.values()) > _ALL_BYTES:
            raise UserError(
                f"{name}: {sizes[name]:,} bytes, {sum(sizes.values()):,} in all, are too much to go with a job "
                f"({_FILE_BYTES:,} and {_ALL_BYTES:,} at most): put it where the cluster can read it, such as in S3"
            )
        return name

    def has(self, path: str) -> bool:
        """Is it one of the files, or a folder of them?"""
        return any(name == path or name.startswith(f"{path.rstrip('/')}/") for name in self.texts)


class _Paths:
    """What becomes of a path that was given here."""

    def __init__(self, place: str | None, files: _Files, say: Say):
        if place is not None and not Folder(place).remote and not os.path.isabs(place):
            raise UserError(
                f"place {place!r} must be s3://bucket/prefix, or an absolute path of the cluster's machines"
            )
        self._place, self._files, self._say = place, files, say

    def result(self, shown: str, path: str) -> str:
        """Of what is written, or was by an earlier job."""
        if Folder(path).remote:
            return path
        if os.path.isabs(path):
            self._say(f"{shown}: a path of the cluster's machines; all that take part must share it")
            return path
        if self._place is None:
            raise UserError(
                f"{shown} would lie in the job's own folder on the cluster, and be gone with it: give --place "
                f"s3://bucket/prefix (or set {PLACE}), or an absolute path that all of its machines have"
            )
        return Folder(self._place).path(os.path.normpath(path))

    def source(self, shown: str, path: str) -> str:
        """Of what is read."""
        if "://" in path or self._files.has(path):
            return path
        if os.path.isabs(path):
            self._say(f"{shown}: a path of the cluster's machines; all that take part must have it")
        elif Path(path).exists():
            raise UserError(
                f"{shown} lies here, where the cluster can't read it: put it in S3 and give its url, or, if it is "
                f"text and small, take it along with --include {path}"
            )
        return path

    def option(self, shown: str, value: str) -> str:
        """Of an option or argument that may be a path: a file here goes along."""
        file = Path(value)
        if "://" in value or self._files.has(value) or not value or "\n" in value or len(value) > 4096:
            return value
        if file.is_file():
            return self._files.take(file, file.name)
        if os.path.isabs(value):
            self._say(f"{shown}: a path of the cluster's machines; all that take part must have it")
        elif file.is_dir() and len(file.parts) > 1:
            raise UserError(
                f"{shown} is a folder here, where the cluster can't read it: put it in S3, or take it along with "
                f"--include {value}, if it holds text alone and is small"
            )
        return value

    def settle(self, tree: dict[str, Any]) -> None:
        """Of resolved settings, in place."""
        tree["runs"] = self.result(f"runs={tree['runs']}", tree["runs"])
        if directory := tree["checkpoint"]["directory"]:
            tree["checkpoint"]["directory"] = self.result(f"checkpoint.directory={directory}", directory)
        for key, one in _sets(tree["data"]):
            if one.get("directory"):
                one["directory"] = self.result(f"{key}.directory={one['directory']}", one["directory"])
            if one.get("path"):
                one["path"] = self.source(f"{key}.path={one['path']}", one["path"])
            if one.get("vocabulary"):
                one["vocabulary"] = self._vocabulary(one["vocabulary"])

    def _vocabulary(self, name: str) -> str:
        """A tokenizer here goes along; settings name it by its absolute path."""
        path = Path(name)
        if not os.path.isabs(name) or not path.exists():
            return name
        file = path / TOKENIZER if path.is_dir() else path
        folder = path.name if path.is_dir() else path.parent.name
        return self._files.take(file, f"{folder}/{TOKENIZER}")


def _sets(data: dict[str, Any]) -> Iterable[tuple[str, dict[str, Any]]]:
    yield "data", data
    for number, one in enumerate(data.get("mixture") or ()):
        yield f"data.mixture.{number}", one
