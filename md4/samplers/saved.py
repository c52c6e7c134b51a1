"""Settings that were found for a model and are kept with it, by name and number of steps.

    grids/searched-16.json     what `grid=searched steps=16` stands for, from `md4 grid`
    grids/best-16.json         what `sampler=best steps=16` stands for, from `md4 grid --frontier --save`

The folder `grids` lies in a run's folder and in an exported one. Its settings say all themselves: times, not names.
"""

import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from md4.errors import UserError
from md4.samplers.grids import GRIDS
from md4.samplers.settings import BEST, SAVED_GRID, Objective, SamplingConfig

FOLDER = "grids"
_COMMON = {"temperature", "top_p", "top_k", "guidance"}  # that every sampler has


class SavedSettings(BaseModel):
    """One file of the folder."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    format: Literal["md4 settings"] = "md4 settings"
    name: str = Field(pattern=f"^({BEST}|{SAVED_GRID})$")
    steps: int = Field(ge=1, description="by which it is asked for: of a grid its steps, of the best network calls")
    settings: SamplingConfig
    facts: dict[str, Any] = Field(default_factory=dict, description="what it was found for and is worth, for a reader")

    @model_validator(mode="after")
    def _says_all(self) -> "SavedSettings":
        times = self.settings.grid
        unnamed = self.settings.sampler in (None, BEST) or (isinstance(times, str) and times not in GRIDS)
        if self.name == BEST and unnamed:
            raise ValueError("the best settings name a sampler, and a grid by its times")
        if self.name != BEST and (not isinstance(times, tuple) or len(times) != self.steps + 1):
            raise ValueError(f"a grid of {self.steps} steps has {self.steps + 1} times")
        return self

    @property
    def file(self) -> str:
        """Name of its file."""
        return f"{self.name}-{self.steps}.json"

    def content(self) -> bytes:
        return (self.model_dump_json(indent=1, exclude_none=True) + "\n").encode()

    @classmethod
    def read(cls, file: str | Path, content: bytes) -> "SavedSettings":
        """`content` of a file, which is named in errors. UserError if it is none."""
        try:
            found = cls.model_validate(json.loads(content))
        except ValidationError as error:
            problem = error.errors()[0]
            where = ".".join(map(str, problem["loc"])) or "it"
            raise UserError(f"{file} holds no settings of a model: {where}: {problem['msg']}") from None
        except ValueError as error:
            raise UserError(f"{file} is not JSON ({error})") from None
        if found.file != str(file).rpartition("/")[2]:
            raise UserError(f"{file} holds what belongs into {found.file}")
        return found


class Saved(BaseModel):
    """All that is kept with a model."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    named: dict[str, dict[int, SamplingConfig]] = Field(default_factory=dict, description="by name and by steps")

    @classmethod
    def of(cls, found: Iterable[SavedSettings]) -> "Saved":
        named: dict[str, dict[int, SamplingConfig]] = {}
        for one in sorted(found, key=lambda one: (one.name, one.steps)):
            named.setdefault(one.name, {})[one.steps] = one.settings
        return cls(named=named)

    def fill(self, settings: SamplingConfig, objective: Objective) -> SamplingConfig:
        """`settings` with what its names stand for; temperature and the like, where set, win over the best settings'.

        Raises `UserError` for a name, or a number of steps, that is not kept.
        """
        if settings.sampler == BEST:
            if settings.steps is None:
                raise UserError(f"sampler={BEST} needs steps, the network calls of a sample; {self._there(BEST)}")
            best = self._get(BEST, settings.steps, f"sampler={BEST}")
            return best.model_copy(update=settings.model_dump(include=_COMMON & settings.model_fields_set))
        if not isinstance(settings.grid, str) or settings.grid in GRIDS:
            return settings
        steps = settings.resolve(objective).steps
        assert steps is not None  # every sampler that has a grid has steps
        times = self._get(settings.grid, steps, f"grid={settings.grid}").grid
        return settings.model_copy(update={"grid": times, "steps": None})

    def _get(self, name: str, steps: int, asked: str) -> SamplingConfig:
        try:
            return self.named[name][steps]
        except KeyError:
            raise UserError(f"{asked} with steps={steps} is not kept with this model; {self._there(name)}") from None

    def _there(self, name: str) -> str:
        kept = [f"{each} for steps={', '.join(map(str, found))}" for each, found in self.named.items()]
        how = "`md4 grid --frontier --save`" if name == BEST else "`md4 grid`"
        return f"there is {'; '.join(kept)}" if kept else f"there is none: {how} finds it"


def check_name(name: str) -> str:
    """UserError for what can't be the name of a searched grid."""
    if not re.fullmatch(SAVED_GRID, name):
        raise UserError(f"the name of a grid is {name!r}; allowed are searched, and searched-NAME of a-z, 0-9 and -")
    return name
