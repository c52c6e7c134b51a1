"""Files and paths of a command that a cluster carries out: what goes along, and what becomes of a path given here.

Paths on a cluster. What a job writes must outlive the folder in which it runs, so a relative path of runs, data,
checkpoints or output is put below the *place* (`--place`, `MD4_PLACE`): s3://bucket/prefix, or an absolute folder that
all machines of the cluster have; without a place it is refused. An absolute path is taken for one of the cluster's.
A tokenizer, and a file that an option names, is taken along; other local files with `--include`.
"""

import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from md4.errors import UserError
from orchestration import results
from orchestration.suites import settings as suites
from pipelines.storage import Folder
from pipelines.vocabularies import TOKENIZER

PLACE = "MD4_PLACE"
_FILE_BYTES, _ALL_BYTES = 16 << 20, 32 << 20  # of the files that go with a job

Say = Callable[[str], None]


class Files:
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


class Paths:
    """What becomes of a path that was given here."""

    def __init__(self, place: str | None, files: Files, say: Say):
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

    def shared(self, shown: str, path: str) -> str:
        """Of a folder of results that can't lie in S3."""
        below = self._place if not os.path.isabs(path) and not Folder(path).remote else path
        if below is not None and not Folder(below).remote:
            return self.result(shown, path)
        raise UserError(
            f"{shown} must be a folder that all machines of the cluster share, and can't lie in S3 or in the job's own "
            f"folder: give its absolute path, or one with --place (or {PLACE})"
        )

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

    def suite(self, name: str) -> str:
        """A suite goes along, if what it names can be read on the cluster."""
        if name in suites.suite_names():
            return name
        for key, path in suites.load(name).places():
            self.source(f"{name}: {key}={path}", path)
        return self.option(f"suite={name}", name)

    def settle(self, tree: dict[str, Any]) -> None:
        """Of resolved settings, in place."""
        evaluation = tree["evaluation"]
        if name := evaluation["suite"]:
            evaluation["suite"] = self.suite(name)
            table = str(results.place(evaluation["suite_results"]))
            evaluation["suite_results"] = self.result(f"evaluation.suite_results={table}", table)
        tree["runs"] = self.result(f"runs={tree['runs']}", tree["runs"])
        if directory := tree["checkpoint"]["directory"]:
            tree["checkpoint"]["directory"] = self.result(f"checkpoint.directory={directory}", directory)
        self.settle_data(tree["data"])

    def settle_data(self, data: dict[str, Any]) -> None:
        """The same of their part `data` alone."""
        for key, one in _sets(data):
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
