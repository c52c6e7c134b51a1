"""How models, names and versions are called on the command line and in the folder."""

import re

from md4.errors import UserError

LATEST = "latest"  # the newest version; so no name
_MODEL = re.compile(r"[a-z0-9][a-z0-9._-]{0,62}")
_NAME = re.compile(r"(?=.*[a-z])[a-z0-9][a-z0-9-]{0,62}")


def check_model(model: str) -> str:
    """The name of a model; UserError for what can't be one."""
    if not _MODEL.fullmatch(model) or model.endswith((".yaml", ".json")):
        raise UserError(
            f"model {model!r}: small letters, digits, dots, - and _ are allowed, at most 63, and no end such as .yaml"
        )
    return model


def is_name(name: str) -> bool:
    return _NAME.fullmatch(name) is not None and name != LATEST


def check_name(name: str) -> str:
    """A name that versions are signed off by, such as production; UserError for what can't be one."""
    if not is_name(name):
        raise UserError(
            f"name {name!r}: small letters, digits and - are allowed, at most 63, with a letter among them; "
            f"{LATEST!r} is taken (the newest version)"
        )
    return name


def split(text: str) -> tuple[str, str]:
    """MODEL[@REF] as model and reference, `latest` if there is none."""
    model, at, ref = text.partition("@")
    if at and not ref:
        raise UserError(f"{text!r}: after the @ goes a version's number, a name such as production, or {LATEST}")
    return check_model(model), ref or LATEST


def number_of(ref: str) -> int | None:
    """The number that a reference is, if it is one."""
    return int(ref) if re.fullmatch(r"[0-9]{1,9}", ref) else None
