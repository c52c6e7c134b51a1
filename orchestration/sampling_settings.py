"""Sampling settings as a person types them: `sampler=first_hitting steps=64 grid=reports/grid-64.json`."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from md4.errors import UserError
from md4.samplers import SamplingConfig, wording
from orchestration.config import read_yaml
from pipelines.storage import Folder


def read_changes(assignments: Sequence[str]) -> dict[str, Any]:
    """`key=value` as changes to sampling settings, values being YAML; a grid may be a file that `md4 grid` wrote.

    Raises `UserError` for what is not of this form.
    """
    changes: dict[str, Any] = {}
    for assignment in assignments:
        key, equals, text = assignment.partition("=")
        if not equals or not key:
            raise UserError(f"{assignment!r} is not of the form key=value, for instance steps=64")
        changes[key] = read_yaml(text, f"value of {key}")
    grid = changes.get("grid")
    if isinstance(grid, str) and grid.endswith(".json"):
        changes["grid"] = read_grid(grid)
    return changes


def read_settings(base: SamplingConfig, assignments: Sequence[str]) -> SamplingConfig:
    """`base` changed by `key=value`, see `read_changes`.

    Raises `UserError` that names each wrong key, its value, and what is allowed or the nearest valid key.
    """
    return wording.change(base, read_changes(assignments))


def read_grid(file: str | Path) -> list[float]:
    """The times in a report of `md4 grid`, or in a file that is nothing but their list."""
    try:
        folder, _, name = Folder(file).absolute().url.rpartition("/")
        tree = json.loads(Folder(folder or "/").read(name))
    except (OSError, ValueError) as error:
        raise UserError(f"can't read the grid {file}: {error}") from None
    times = tree.get("times") if isinstance(tree, dict) else tree
    if not isinstance(times, list):
        raise UserError(f"{file} is not a grid as `md4 grid` writes it: it has no list of times")
    return times
