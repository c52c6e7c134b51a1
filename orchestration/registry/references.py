"""MODEL@REF in the place of a folder: what a command means by it."""

import os

from orchestration.registry.registry import Registry
from orchestration.registry.words import split
from pipelines.storage import Place


def reference(text: str) -> tuple[str, str] | None:
    """Model and reference, of a text that means something in the registry; None for a folder."""
    if "@" not in text or "/" in text or os.path.exists(text):
        return None
    return split(text)


def folder(text: str, registry: Place | None = None) -> str:
    """The folder of a model: `text` itself, or for MODEL@REF that version's, on this machine and verified.

    Raises `UserError` for a version that is not there, or damaged.
    """
    found = reference(text)
    return text if found is None else str(Registry(registry).version(*found).fetch())
