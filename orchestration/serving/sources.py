"""Where a served model comes from.

runs/mine           a run: the newest sound checkpoint, and newer ones when they are there
exports/mine        an exported folder, which doesn't change
small@production    what the name stands for in the registry, and what is tried as it: see `following`
small@3             that version; small@latest: the newest, and newer ones of the same network when they are there
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

from md4.errors import UserError
from orchestration import checkpoints, exported
from orchestration.config import override, serving_config
from orchestration.registry import Registry, Version
from orchestration.registry.references import reference
from orchestration.registry.words import LATEST, is_name
from orchestration.runs import Loaded, Run
from orchestration.serving.config import ServingConfig
from pipelines.storage import Folder

Load = Callable[[str], Loaded]  # a model by its run's folder


class Source(Protocol):
    """Both methods ask files; `UserError` for what can't be served."""

    def look(self) -> str | None:
        """What would be loaded: the same word, the same weights. Cheap, and not yet known to be sound."""
        ...

    def load(self) -> Loaded: ...


@dataclass(frozen=True)
class RunSource:
    """A run's newest sound checkpoint."""

    folder: str
    loader: Load

    def look(self) -> str | None:
        found = checkpoints.committed_in(Run(self.folder).checkpoints)
        return found[0].url if found else None

    def load(self) -> Loaded:
        return self.loader(self.folder)


@dataclass(frozen=True)
class ExportSource:
    """An exported folder."""

    folder: str

    def look(self) -> str | None:
        return self.folder

    def load(self) -> Loaded:
        from md4 import weights

        path = Path(self.folder)
        return exported.loaded(weights.load(path), path)


@dataclass(frozen=True)
class VersionSource:
    """A version by its number, or the latest."""

    registry: Registry
    model: str
    ref: str

    def look(self) -> str | None:
        return str(self.registry.version(self.model, self.ref).number)

    def load(self) -> Loaded:
        return load_version(self.registry.version(self.model, self.ref))


def load_version(version: Version) -> Loaded:
    """A version, verified; UserError that names what is damaged or missing."""
    from md4 import weights

    path = version.fetch()
    loaded = exported.loaded(weights.load(path), path)
    config = loaded.config.model_copy(update={"name": version.model})
    return replace(loaded, config=config, model_version=version.number)


def follows(text: str) -> bool:
    """Is it a signed-off name, which may have a candidate beside its version?"""
    found = reference(text)
    return found is not None and is_name(found[1])


def moves(text: str) -> bool:
    """Does it mean whichever version has a name in the registry, or is the latest? Then it is looked at by itself."""
    found = reference(text)
    return found is not None and (is_name(found[1]) or found[1] == LATEST)


def open_source(text: str, registry: str | None, load: Load) -> Source:
    """The source that a text means, unless it `follows` a name."""
    found = reference(text)
    if found is not None:
        return VersionSource(Registry(registry), *found)
    return ExportSource(text) if exported.is_exported(Folder(text)) else RunSource(text, load)


def check(text: str, registry: str | None, say: Callable[[str], None]) -> None:
    """UserError for what can't be served; of runs and exported folders nothing is loaded yet."""
    found = reference(text)
    if found is not None:
        for problem in Registry(registry).version(*found).damage():
            raise UserError(problem)
    elif not exported.is_exported(Folder(text)) and checkpoints.newest(Run(text).checkpoints, say) is None:
        raise UserError(f"run {text} has no sound checkpoint yet")


def name_of(text: str) -> str:
    """What a model is called unless a name is given: as its run, its folder, or in the registry."""
    found = reference(text)
    if found is not None:
        return found[0]
    return Path(text).absolute().name if exported.is_exported(Folder(text)) else Run(text).config.name


def absolute(text: str) -> str:
    """The same for processes with another working directory. Nothing need be there yet."""
    return text if reference(text) is not None else Folder(text).absolute().url


def address(text: str | Path) -> str:
    """The same, resolved; UserError for a folder that can't be served."""
    if reference(str(text)) is not None:
        return str(text)
    folder = Folder(text)
    return str(Path(text).resolve()) if exported.is_exported(folder) else Run(folder).address


def settings(text: str, changes: Mapping[str, Any]) -> ServingConfig:
    """How a model is served: its run's settings, if it is a run's, and changes to them."""
    if reference(text) is not None or exported.is_exported(Folder(text)):
        return serving_config(changes)
    return override(Run(text).config, {"serving": dict(changes)}).serving
