"""What is searched, and how: the space file.

space:
  model.schedule: [linear, cosine, poly2]              # a list is a choice
  model.times.a: {uniform: [0.4, 1], step: 0.2}        # 0.4, 0.6, 0.8 or 1
  optimizer.learning_rate: {loguniform: [1e-3, 1e-2]}
  model.network.layers: {int: [2, 6], step: 2}
search:
  scheduler: asha
  budget: 2000000                                      # tokens of each trial

A value is a pure function of (search.seed, number of the trial, key); where a trial before it has the same values, all
of them are drawn again.
"""

import difflib
import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from itertools import chain, islice, product
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from md4 import noise
from md4.errors import UserError
from orchestration.config import keys, read_yaml
from orchestration.forks import CHANGEABLE

_PART = ConfigDict(extra="forbid", frozen=True, populate_by_name=True, allow_inf_nan=False)
# Settings that make another model or another training of it, measured alike.
_SEARCHED = re.compile(
    r"(model|optimizer)(\..+)?|seed|data\.(length|order)|train\.(batch_size|slices|micro_batch|precision|zero_stage)"
)
PREFIX = "search."  # of overrides that are for the search, not for its trials
MOST_POINTS = 10_000  # of a grid, and of a range with a step
_MOST_WHOLE = 2**62  # so that their count is one of Python's sizes
_DRAWS = 100  # of a trial, for values that none before it has


class Range(BaseModel):
    """The values of one key."""

    model_config = _PART

    choice: tuple[Any, ...] | None = Field(None, description="any of these")
    uniform: tuple[float, float] | None = Field(None, description="between two numbers")
    loguniform: tuple[float, float] | None = Field(None, description="the same, even in the logarithm")
    integer: tuple[int, int] | None = Field(None, alias="int", description="whole numbers, both ends included")
    step: float | None = Field(None, gt=0, description="of uniform and int: multiples of it above the first alone")

    @model_validator(mode="before")
    @classmethod
    def _list_is_a_choice(cls, given: Any) -> Any:
        if isinstance(given, list | tuple):
            return {"choice": given}
        if not isinstance(given, Mapping):
            raise ValueError("must be a list, or one of choice, uniform, loguniform, int; a fixed value is an override")
        return given

    @model_validator(mode="after")
    def _makes_sense(self) -> "Range":
        kinds = [name for name in ("choice", "uniform", "loguniform", "integer") if getattr(self, name) is not None]
        if len(kinds) != 1:
            raise ValueError(f"needs one of choice, uniform, loguniform, int; found {len(kinds)} of them")
        if self.choice is not None:
            if not self.choice:
                raise ValueError("choice is empty: there is nothing to choose from")
            if any(isinstance(one, float) and not math.isfinite(one) for one in self.choice):
                raise ValueError(f"choice has a number that is not finite: {list(self.choice)}")
            if any(one in self.choice[:place] for place, one in enumerate(self.choice)):
                raise ValueError(f"choice has a value twice: {list(self.choice)}")
        low, high = self.ends
        if low >= high and self.choice is None:
            raise ValueError(
                f"{kinds[0].replace('integer', 'int')}=[{low}, {high}]: the first must be below the second"
            )
        if self.loguniform is not None and low <= 0:
            raise ValueError(f"loguniform=[{low}, {high}]: both must be above 0")
        if self.step is not None:
            if kinds[0] not in ("uniform", "integer"):
                raise ValueError(f"step is for uniform and int, not for {kinds[0]}")
            if self.integer is not None and self.step != int(self.step):
                raise ValueError(f"step={self.step:g} of int must be a whole number")
            if self.uniform is not None and (high - low) / self.step >= MOST_POINTS:
                raise ValueError(
                    f"step={self.step:g} makes more than {MOST_POINTS:,} values of uniform=[{low}, {high}]: take a "
                    "larger one, or none"
                )
        if self.integer is not None and max(map(abs, self.integer)) >= _MOST_WHOLE:
            raise ValueError(f"int=[{low}, {high}]: both must be between -2^62 and 2^62")
        return self

    @property
    def ends(self) -> tuple[float, float]:
        """Lowest and highest number; of a choice 0 and 0."""
        return self.uniform or self.loguniform or self.integer or (0, 0)

    @property
    def values(self) -> Sequence[Any] | None:
        """All of them in order, or None if there is a continuum."""
        if self.choice is not None:
            return self.choice
        if self.integer is not None:
            return range(self.integer[0], self.integer[1] + 1, int(self.step or 1))
        if self.uniform is not None and self.step is not None:
            low, high = self.uniform
            count = int((high - low) / self.step + 1e-9) + 1
            return tuple(float(f"{low + n * self.step:.12g}") for n in range(count))
        return None

    def at(self, u: float) -> Any:
        """The value at a share u in [0, 1) of the range."""
        if (values := self.values) is not None:
            return values[min(int(u * len(values)), len(values) - 1)]
        low, high = self.ends
        value = low * (high / low) ** u if self.loguniform else low + (high - low) * u
        return float(f"{value:.6g}")

    def clipped(self, value: Any) -> Any:
        """The nearest value in the range; of a choice the value itself."""
        if self.choice is not None:
            return value
        if isinstance(values := self.values, range):
            nearest = math.ceil((value - values.start) / values.step - 0.5)
            return values[min(max(nearest, 0), len(values) - 1)]
        if values is not None:
            return min(values, key=lambda one: abs(one - value))
        low, high = self.ends
        return float(f"{min(max(value, low), high):.6g}")

    def place(self, value: Any) -> float:
        """Where a value stands, from 0 to 1: for pictures."""
        if (values := self.values) is not None:
            return values.index(value) / max(1, len(values) - 1) if value in values else math.nan
        low, high = self.ends
        if self.loguniform:
            return math.log(value / low) / math.log(high / low)
        return (value - low) / (high - low)


class Settings(BaseModel):
    """How the space is searched. The figure is the validation bound in bits per token; GenMD4's own for GenMD4."""

    model_config = _PART

    algorithm: Literal["random", "grid", "optuna"] = Field("random", description="what proposes the trials")
    scheduler: Literal["asha", "pbt", "none"] = Field("asha", description="what ends or changes them on the way")
    trials: int | None = Field(None, ge=1, description="how many; of a grid all of its points; else 8")
    budget: int = Field(ge=1, description="tokens that each trial trains on, whatever its batch and length")
    rounds: int = Field(9, ge=1, description="evaluations of a trial, evenly over its budget, after which it is judged")
    first_rung: int = Field(1, ge=1, description="asha: rounds before a trial may be ended")
    reduction: float = Field(3, gt=1, description="asha: of so many trials one goes on at a rung; rungs are its powers")
    perturb_every: int = Field(1, ge=1, description="pbt: rounds between two exchanges")
    quantile: float = Field(0.25, gt=0, le=0.5, description="pbt: share that gives up, for copies of the best share")
    resample: float = Field(0.25, ge=0, le=1, description="pbt: probability of a new value instead of a near one")
    concurrent: int | None = Field(None, ge=1, description="trials at a time, if they fit; null = as many as do")
    seed: int = Field(0, ge=0, lt=2**63, description="of the values, and of what schedulers and Optuna draw")

    @model_validator(mode="after")
    def _fit_together(self) -> "Settings":
        problems = []
        if self.algorithm == "grid" and self.trials is not None:
            problems.append(f"trials={self.trials}: a grid has as many as it has points")
        if self.scheduler == "asha" and self.first_rung >= self.rounds:
            problems.append(
                f"first_rung={self.first_rung}: asha needs a rung before the last of rounds={self.rounds}; "
                "or scheduler=none"
            )
        if self.scheduler == "pbt":
            if self.algorithm != "random":
                problems.append(f"algorithm={self.algorithm}: pbt starts from random values and changes them itself")
            if self.trials is not None and self.trials < 2:
                problems.append(f"trials={self.trials}: a population has at least 2")
            if self.perturb_every >= self.rounds:
                problems.append(f"perturb_every={self.perturb_every} must be below rounds={self.rounds}")
        if problems:
            raise ValueError("; ".join(problems))
        return self

    @property
    def rungs(self) -> list[int]:
        """asha: rounds at which trials are ended."""
        found, rung = [], float(self.first_rung)
        while rung < self.rounds:
            found.append(math.ceil(rung))
            rung *= self.reduction
        return found


class Space(BaseModel):
    """A space file."""

    model_config = _PART

    space: dict[str, Range] = Field(min_length=1, description="values by dotted key of the configuration")
    search: Settings

    @model_validator(mode="after")
    def _keys_can_be_searched(self) -> "Space":
        problems = [problem for key in self.space if (problem := _why_not(key))]
        if self.search.scheduler == "pbt":
            problems += [
                f"space.{key}: pbt changes values while a trial runs, which only optimizer.*, model.network.dropout, "
                "model.label_dropout, model.schedule and model.times.* allow"
                for key in self.space
                if not problems and not key.startswith(CHANGEABLE)
            ]
        if self.search.algorithm == "grid":
            endless = [key for key, one in self.space.items() if one.values is None]
            problems += [f"space.{key}: a grid needs a choice, an int, or a uniform with a step" for key in endless]
            if not endless and (count := math.prod(len(one.values or ()) for one in self.space.values())) > MOST_POINTS:
                problems.append(f"the grid has {count:,} points, more than {MOST_POINTS:,}")
        if self.search.scheduler == "pbt" or self.search.algorithm == "optuna":
            by = "optuna" if self.search.algorithm == "optuna" else "pbt"
            problems += [
                f"space.{key}: {by} takes choices of numbers, texts, true and false alone"
                for key, one in self.space.items()
                if any(not isinstance(value, bool | int | float | str) for value in one.choice or ())
            ]
        problems += [
            f"space.{key}: needs a choice, so that each prepared set is known before the start"
            for key, one in self.space.items()
            if key.startswith("data.") and (one.values is None or (one.choice is None and self._suggested))
        ]
        if self.search.algorithm == "random" and (count := self._different) < (asked := self.search.trials or 0):
            problems.append(
                f"search.trials={asked}: the space has {count} different points, and the same trial twice tells "
                f"nothing: take {count} or fewer, search.algorithm=grid, or `seed` as a key of the space, too"
            )
        if self.search.scheduler == "pbt" and self._different < 2:
            problems.append("space: has one point alone, and a population has at least 2 trials")
        if problems:
            raise ValueError("\n".join(problems))
        return self

    @property
    def trials(self) -> int:
        """How many there are."""
        if self.search.algorithm == "grid":
            return int(self._different)
        return self.search.trials or (8 if self._suggested else int(min(8, self._different)))

    @property
    def _suggested(self) -> bool:
        return self.search.algorithm == "optuna"

    @property
    def _different(self) -> float:
        """How many points there are; inf of a continuum."""
        counts = [len(one.values) for one in self.space.values() if one.values is not None]
        return math.prod(counts) if len(counts) == len(self.space) else math.inf

    def _table(self) -> Iterator[dict[str, Any]]:
        """All points, if there is no continuum."""
        for values in product(*(one.values or () for one in self.space.values())):
            yield dict(zip(self.space, values, strict=True))

    def point(self, number: int) -> dict[str, Any]:
        """The values of a trial of a random search, or of a grid, by key."""
        if self.search.algorithm == "grid":
            return next(islice(self._table(), number, None))
        return self._drawn[number]

    @cached_property
    def _drawn(self) -> list[dict[str, Any]]:
        """Different points of a random search; UserError if rounding leaves too few of a continuum."""
        found: dict[str, dict[str, Any]] = {}
        for number in range(self.trials):
            drawn = (self._draw(number, again) for again in range(_DRAWS))
            rest = () if self._different == math.inf else self._table()  # when nearly all of them are taken
            point = next((one for one in chain(drawn, rest) if _told(one) not in found), None)
            if point is None:
                raise UserError(
                    f"search.trials={self.trials}: no more than {number} different points were found in the space: "
                    "take fewer trials, or wider ranges"
                )
            found[_told(point)] = point
        return list(found.values())

    def _draw(self, number: int, again: int) -> dict[str, Any]:
        return {key: one.at(self._share(number, key, again)) for key, one in self.space.items()}

    def points(self) -> list[dict[str, Any]] | None:
        """The values of all trials; None if they depend on what is found."""
        return None if self._suggested else [self.point(number) for number in range(self.trials)]

    def extremes(self) -> Iterator[dict[str, Any]]:
        """Points that have every value of every choice, and both ends of every range: what is checked of a space whose
        trials are not known before."""
        listed = {key: one.choice or _both_ends(one) for key, one in self.space.items()}
        for turn in range(max(len(values) for values in listed.values())):
            yield {key: values[turn % len(values)] for key, values in listed.items()}

    def _share(self, number: int, key: str, again: int) -> float:
        import torch

        stream = noise.key(self.search.seed, "search", number, key, *([again] if again else []))
        return noise.uniform(stream, torch.zeros((), dtype=torch.int64)).item()


def _both_ends(one: Range) -> tuple[Any, ...]:
    values = one.values or one.ends
    return values[0], values[-1]


def _told(point: Mapping[str, Any]) -> str:
    return json.dumps(point, sort_keys=True, default=str)


def _why_not(key: str) -> str | None:
    """Why a key can't be searched over; None if it can."""
    known = list(keys())
    if key not in known and not any(one.startswith(f"{key}.") for one in known):
        near = difflib.get_close_matches(key, known, 1) or [
            full for full in known if full.rsplit(".", 1)[-1] == key.rsplit(".", 1)[-1]
        ]
        hint = f"did you mean {near[0]!r}?" if near else "see `md4 config PRESET` for all keys"
        return f"space.{key}: unknown key; {hint}"
    if key == "train.steps":
        return "space.train.steps: follows from search.budget, which is the same for all trials"
    if not _SEARCHED.fullmatch(key):
        return (
            f"space.{key}: trials that differ in it are not compared; what can be searched: model.*, optimizer.*, "
            "seed, data.length, data.order, train.batch_size, .slices, .micro_batch, .precision and .zero_stage"
        )
    return None


def read(file: Path, changes: Mapping[str, Any] | None = None) -> Space:
    """The space of a file, with `changes` to its `search` part; UserError names each wrong key and value."""
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"can't read the space {file}: {error}") from None
    tree = read_yaml(text, str(file))
    if not isinstance(tree, dict):
        raise UserError(f"{file}: a space is a mapping with the keys space and search, found {type(tree).__name__}")
    if changes and isinstance(tree.get("search", {}), dict):
        tree = {**tree, "search": {**tree.get("search", {}), **changes}}
    return validate(tree, str(file))


def validate(tree: Any, origin: str) -> Space:
    """A Space from a plain tree; UserError with one line for each mistake."""
    try:
        return Space.model_validate(tree)
    except ValidationError as error:
        lines = [f"{origin}: {_describe(one)}" for one in error.errors()]
        raise UserError("\n".join(lines)) from None


def _describe(problem: Any) -> str:
    where, value = [str(part) for part in problem["loc"]], problem["input"]
    key, message = ".".join(where), problem["msg"].removeprefix("Value error, ")
    if problem["type"] == "extra_forbidden":
        part = {"search": Settings, "space": Range}.get(where[0] if len(where) > 1 else "", Space)
        known = [field.alias or name for name, field in part.model_fields.items()]
        near = difflib.get_close_matches(where[-1], known, 1)
        return f"unknown key {key!r}; " + (f"did you mean {near[0]!r}?" if near else f"known: {', '.join(known)}")
    if problem["type"] == "missing":
        return f"key {key!r} is missing and has no default"
    if problem["type"] == "value_error":
        return message if not key else f"{key}: {message}"
    return f"{key}={value!r}: {message[0].lower()}{message[1:]}"
