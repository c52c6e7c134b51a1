"""A version: an immutable folder that `md4.load` reads, its manifest, and a verified copy of it on this machine."""

import hashlib
import os
import shutil
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from functools import cached_property
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from md4.errors import UserError
from orchestration.registry import documents
from orchestration.registry.lineage import Lineage
from pipelines.fetch import cache_folder
from pipelines.storage import Folder

MANIFEST, LINEAGE, EVALUATION = "manifest.json", "lineage.json", "evaluation"
RESULTS = "results.json"  # in the folder of evaluation: figures of the table of results


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class File(_Part):
    """A file of a version."""

    bytes: int
    sha256: str


class Manifest(_Part):
    """What `manifest.json` says of a version."""

    format: Literal[1] = 1
    model: str
    number: int
    content: str = Field(
        description="sha256 of weights, configuration and saved grids: the same content is one version"
    )
    created: datetime
    by: str
    note: str = ""
    run: str | None = Field(default=None, description="name of the run")
    step: int | None = None
    parameters: int = Field(description="of the network")
    weights: tuple[str, ...] = Field(description="the hashes that reports and results may call these weights by")
    files: dict[str, File]

    @property
    def bytes(self) -> int:
        """Size of all files."""
        return sum(file.bytes for file in self.files.values())


@dataclass(frozen=True)
class Version:
    """One version of a model."""

    model: str
    number: int
    folder: Folder
    manifest_sha256: str

    def __str__(self) -> str:
        return f"{self.model} version {self.number}"

    @cached_property
    def manifest(self) -> Manifest:
        """Read once; UserError if it is missing or damaged."""
        try:
            data = self.folder.read(MANIFEST)
        except FileNotFoundError:
            raise UserError(f"{self}: {self.folder.path(MANIFEST)} is missing") from None
        if hashlib.sha256(data).hexdigest() != self.manifest_sha256:
            raise UserError(f"{self}: {self.folder.path(MANIFEST)} is damaged (its sha256 is not the one listed)")
        return documents.parse(Manifest, data, self.folder.path(MANIFEST))

    @property
    def lineage(self) -> Lineage:
        """Where it comes from."""
        return documents.parse(Lineage, self.read(LINEAGE), self.folder.path(LINEAGE))

    def read(self, file: str) -> bytes:
        """A file of the version; UserError if it is missing or damaged."""
        try:
            data = self.folder.read(file)
        except FileNotFoundError:
            raise UserError(f"{self}: {self.folder.path(file)} is missing") from None
        if (problem := _compared(self.manifest.files[file], len(data), hashlib.sha256(data).hexdigest())) is not None:
            raise UserError(f"{self}: {self.folder.path(file)} {problem}")
        return data

    def damage(self) -> Iterator[str]:
        """Everything that is wrong with its files, each told in a line that names the file."""
        try:
            files = self.manifest.files
        except UserError as error:
            yield str(error)
            return
        for name in files:
            try:
                self.read(name) if self.folder.remote else _check_local(self, name, Path(self.folder.path(name)))
            except UserError as error:
                yield str(error)

    def strangers(self) -> list[str]:
        """Files in the folder that are none of the version's, such as reports of a later evaluation."""
        return [name for name in self.folder.list() if name not in self.manifest.files and name != MANIFEST]

    def fetch(self) -> Path:
        """A folder on this machine with the verified files, for `md4.load` and all that takes an exported folder.

        A registry on this machine gives the version's own folder. One in S3 gives a copy in the cache (`MD4_CACHE`),
        which is made once, appears complete, and is verified whenever it is asked for; what is damaged is fetched anew.
        Raises UserError that names what is missing or damaged.
        """
        if not self.folder.remote:
            for problem in self.damage():
                raise UserError(problem)
            return Path(self.folder.url).absolute()
        # By content: registries may be deleted and made again under the same url. Called as in the registry: an
        # evaluation takes the model's name and version from there.
        place = cache_folder() / "models" / self.manifest_sha256[:16] / self.model / "versions" / f"{self.number:05d}"
        if place.is_dir():
            try:
                for name in self.manifest.files:
                    _check_local(self, name, place / name)
                return place
            except UserError:
                shutil.rmtree(place, ignore_errors=True)
        aside = place.with_name(f".{place.name}-{uuid.uuid4().hex[:6]}")
        try:
            for name in (*self.manifest.files, MANIFEST):
                file = aside / name
                file.parent.mkdir(parents=True, exist_ok=True)
                file.write_bytes(self.folder.read(name) if name == MANIFEST else self.read(name))
            try:
                os.rename(aside, place)
            except OSError:  # somebody else was faster
                if not place.is_dir():
                    raise
        finally:
            shutil.rmtree(aside, ignore_errors=True)
        return place


def describe(path: Path) -> File:
    """What a manifest says of a file on this machine."""
    with path.open("rb") as opened:
        return File(bytes=path.stat().st_size, sha256=hashlib.file_digest(opened, "sha256").hexdigest())


def _check_local(version: Version, name: str, path: Path) -> None:
    try:
        found = describe(path)
    except FileNotFoundError:
        raise UserError(f"{version}: {path} is missing") from None
    if (problem := _compared(version.manifest.files[name], found.bytes, found.sha256)) is not None:
        raise UserError(f"{version}: {path} {problem}")


def _compared(noted: File, size: int, sha256: str) -> str | None:
    if size != noted.bytes:
        return f"has {size:,} bytes, not {noted.bytes:,}"
    return None if sha256 == noted.sha256 else "is damaged (its sha256 differs from the manifest's)"
