"""Finds the folder of real data and golden vectors that may lie beside the checkout."""

from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2] / "shared"


def shared(*parts: str) -> Path:
    """The path of a file or folder beside the checkout; skips the calling test where it is absent."""
    path = ROOT.joinpath(*parts)
    if not path.exists():
        pytest.skip(f"needs {path.relative_to(ROOT.parent)} beside the checkout")
    return path
