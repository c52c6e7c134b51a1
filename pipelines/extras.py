"""Packages that only some measures need: the extra `quality` of the installation."""

from importlib import import_module
from typing import Any

from md4.errors import UserError


def extra(module: str, purpose: str) -> Any:
    """The module of that name; UserError that says what it is for and how to get it, where it isn't installed."""
    try:
        return import_module(module)
    except ModuleNotFoundError as error:
        raise UserError(f"{purpose} needs the package {error.name!r}: pip install 'md4[quality]'") from None
