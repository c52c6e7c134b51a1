"""Mistakes in settings as one message: what was given, what is allowed, and the nearest name."""

import difflib
from collections.abc import Iterable, Mapping
from typing import Any

from pydantic import ValidationError

from md4.errors import UserError
from md4.samplers.settings import SamplingConfig

SETTINGS: tuple[str, ...] = tuple(SamplingConfig.model_fields)


def change(base: SamplingConfig, changes: Mapping[str, Any]) -> SamplingConfig:
    """`base` with some settings changed; None stands for the sampler's own default.

    Raises `UserError` that names each wrong setting, its value, and what is allowed or the nearest valid name.
    """
    try:
        return base.changed(changes)
    except ValidationError as error:
        raise UserError("; ".join(describe(problem, SETTINGS) for problem in error.errors())) from None


def unknown(name: str, known: Iterable[str], what: str = "setting") -> str:
    """That `name` is none of the known ones, and which it may have been."""
    known = list(known)
    below = name.rsplit(".", 1)[-1]  # sampling.steps, as in the configuration of a run
    near = [below] if below in known else difflib.get_close_matches(below, known, 1)
    hint = f"did you mean {near[0]!r}? " if near else ""
    return f"unknown {what} {name!r}; {hint}allowed: {', '.join(known)}"


def describe(problem: Any, known: Iterable[str], path: tuple[str | int, ...] | None = None) -> str:
    """One line for one of pydantic's complaints. `known`: the names that are allowed where it happened."""
    where: tuple[str | int, ...] = problem["loc"] if path is None else path
    message = problem["msg"].removeprefix("Value error, ")
    if problem["type"] == "json_invalid":
        return f"not valid JSON: {problem['ctx']['error']} at character {problem['loc'][-1]}"
    name = ".".join(str(part) for part in where)
    if problem["type"] == "extra_forbidden":
        return unknown(name, known)
    if not name or (problem["type"] == "value_error" and isinstance(problem["input"], dict)):
        return message  # of settings that don't go together, which the message itself names
    value = repr(problem["input"])
    shown = "" if problem["type"] == "missing" else f"={value[:80]}{'...' * (len(value) > 80)}"
    return f"{name}{shown}: {message[0].lower()}{message[1:]}"
