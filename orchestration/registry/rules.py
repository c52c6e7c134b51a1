"""What a promotion has to show, as YAML. In the registry (`rules.yaml`, of all models or of one) it always applies.

    name: production           # what is promoted to
    from: staging              # the version must have been signed off there, and not taken back
    require:
      - metric: likelihood/pydocs/validation
        better_by: 2           # standard errors of the difference to the version that has the name now
      - metric: likelihood/*   # each of them
        not_worse_by: 1        # likewise
      - metric: quality/entropy
        within: [4.0, 6.0]     # or within: 5 %, of what the present version has
    max_age_days: 30           # older results of the new version count as none

A file may hold a list of these. How what is missing or can't be compared is decided stands in `registry.judgement`.
"""

import difflib
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, FiniteFloat, ValidationError, model_validator

from md4.errors import UserError
from orchestration.registry.words import check_name
from pipelines.storage import Folder

FILE = "rules.yaml"
_WANTED = {  # in YAML's words
    "tuple_type": "a list is allowed, of requirements such as - {metric: likelihood/*, not_worse_by: 1}",
    "model_type": "a mapping is allowed, such as {metric: likelihood/*, not_worse_by: 1}",
}
_PERCENT = re.compile(r"\s*(\d+(?:\.\d+)?)\s*%\s*")


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, populate_by_name=True)


def _read_within(value: Any) -> Any:
    if isinstance(value, str):
        found = _PERCENT.fullmatch(value)
        if found is None:
            raise ValueError("two numbers such as [4.0, 6.0] are allowed, or a percentage such as 5 %")
        return {"percent": float(found[1])}
    if isinstance(value, list) and len(value) == 2:
        return {"least": value[0], "most": value[1]}
    if isinstance(value, dict):
        return value
    raise ValueError("two numbers such as [4.0, 6.0] are allowed, or a percentage such as 5 %")


class Within(_Part):
    """A range of values: fixed, or around what the present version has."""

    least: FiniteFloat | None = None
    most: FiniteFloat | None = None
    percent: FiniteFloat | None = Field(default=None, gt=0)

    @model_validator(mode="after")
    def _is_a_range(self) -> "Within":
        if self.percent is None and not (self.least is not None and self.most is not None and self.least <= self.most):
            raise ValueError("its first number must not be above the second")
        return self

    def outside(self, value: float, present: float = 0.0) -> str | None:
        """How a value misses the range, if it does; present: the value that a percentage is of."""
        if self.percent is not None:
            limit = abs(present) * self.percent / 100
            least, most = present - limit, present + limit
        else:
            least, most = float(self.least or 0), float(self.most or 0)
        if least <= value <= most:
            return None
        return f"below {least:.6g}" if value < least else f"above {most:.6g}"

    def __str__(self) -> str:
        return f"{self.percent:g} %" if self.percent is not None else f"[{self.least:g}, {self.most:g}]"


class Requirement(_Part):
    """One thing to show, of one metric or of all that match a pattern."""

    metric: str = Field(min_length=1, description="as in the table of results; * stands for anything")
    better_by: FiniteFloat | None = Field(default=None, ge=0, description="standard errors of the difference")
    not_worse_by: FiniteFloat | None = Field(default=None, ge=0, description="standard errors of the difference")
    within: Annotated[Within, BeforeValidator(_read_within)] | None = None

    @model_validator(mode="after")
    def _says_one_thing(self) -> "Requirement":
        if sum(value is not None for value in (self.better_by, self.not_worse_by, self.within)) != 1:
            raise ValueError("one of better_by, not_worse_by and within is to be given")
        return self

    def __str__(self) -> str:
        if self.better_by is not None:
            return f"better by {self.better_by:g} s.e."
        if self.not_worse_by is not None:
            return f"not worse by {self.not_worse_by:g} s.e."
        return f"within {self.within}"


class Rule(_Part):
    """What a promotion to one name has to show."""

    name: Annotated[str, BeforeValidator(lambda value: check_name(str(value)))]
    after: Annotated[str, BeforeValidator(lambda value: check_name(str(value)))] | None = Field(
        default=None, alias="from", description="a name that the version must have had"
    )
    require: tuple[Requirement, ...] = ()
    max_age_days: FiniteFloat | None = Field(default=None, gt=0)

    def facts(self) -> dict[str, Any]:
        """The rule as it is written, for the history."""
        return self.model_dump(mode="json", by_alias=True, exclude_none=True)


def parse(text: str | bytes, origin: str) -> list[Rule]:
    """The rules of a file; UserError that names the file, the key, the value and what is allowed."""
    try:
        tree = yaml.safe_load(text)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{origin} is not YAML ({' '.join(str(error).split())})") from None
    trees = tree if isinstance(tree, list) else [tree]
    found = []
    for number, one in enumerate(trees):
        where = f"{origin}, rule {number + 1}" if len(trees) > 1 else origin
        if not isinstance(one, dict):
            raise UserError(f"{where}: a rule is a mapping with name, from, require and max_age_days, not {one!r:.60}")
        try:
            found.append(Rule.model_validate(one))
        except ValidationError as error:
            raise UserError(f"{where}: {_told(error)}") from None
        if not (found[-1].require or found[-1].after):
            raise UserError(f"{where}: the rule for {found[-1].name} requires nothing: give require: or from:")
    names = [rule.name for rule in found]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise UserError(f"{origin} has two rules for {twice}: join them")
    return found


def applying(registry: Folder, model: str, name: str, file: Path | None = None) -> list[tuple[str, Rule]]:
    """The rules for a promotion, each with where it stands: the registry's own, the model's, and those of `file`.

    Raises UserError for a damaged file, and if `file` is given but has no rule for the name.
    """
    found: list[tuple[str, Rule]] = []
    for folder in (registry, registry / model):
        try:
            data = folder.read(FILE)
        except FileNotFoundError:
            continue
        found += [(folder.path(FILE), rule) for rule in parse(data, folder.path(FILE)) if rule.name == name]
    if file is not None:
        try:
            given = parse(file.read_bytes(), str(file))
        except OSError as error:
            raise UserError(f"--rules {file} can't be read ({error.strerror})") from None
        own = [(str(file), rule) for rule in given if rule.name == name]
        if not own:
            raise UserError(f"{file} has no rule for {name}; it has rules for {', '.join(r.name for r in given)}")
        found += own
    return found


def _told(error: ValidationError) -> str:
    problem = error.errors()[0]
    place: Sequence[Any] = problem["loc"]
    where = ".".join(str(part + 1) if isinstance(part, int) else str(part) for part in place)
    if problem["type"] == "extra_forbidden":
        kind = Requirement if "require" in place else Rule
        known = [field.alias or name for name, field in kind.model_fields.items()]
        near = difflib.get_close_matches(str(place[-1]), known, 1)
        return f"{where} is no key of a rule; " + (
            f"did you mean {near[0]}?" if near else f"allowed: {', '.join(known)}"
        )
    said = _WANTED.get(problem["type"]) or problem["msg"].removeprefix("Value error, ")
    return f"{where} is {problem['input']!r:.80}: {said}"
