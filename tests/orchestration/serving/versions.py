"""Versions for a registry: sound ones, and ones that must not stay in service."""

from collections.abc import Callable
from pathlib import Path

import torch

from md4 import weights
from orchestration.runs import load_model
from tests.orchestration.small_run import write_run

MODEL, NAME = "small", "production"
_CHANGES: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "nan": lambda head: head * torch.nan,  # every answer is NaN
    "sharp": lambda head: head * 8,  # sure of itself without reason: its bound is far worse
}


def export(folder: Path, kind: str) -> Path:
    """An exported text model, made once: a number for its seed, `nan`, `sharp`, `short` (other length), `wide`."""
    if not (folder / kind).is_dir():
        overrides = {"short": ["data.length=16"], "wide": ["model.network.feature_dim=32"]}.get(kind, [])
        overrides += ["sampling={sampler: ancestral, steps: 8}"]
        loaded = load_model(write_run(folder / "runs" / kind, *overrides, seed=int(kind) if kind.isdigit() else 9))
        head = loaded.model.get_parameter("network.head.weight")
        with torch.no_grad():
            head.copy_(_CHANGES.get(kind, lambda head: head)(head))
        words = loaded.vocabulary
        weights.export(
            folder / kind,
            loaded.model,
            loaded.config.model,
            sampling=loaded.config.sampling,
            vocabulary=words.name,
            symbols=getattr(words, "symbols", None),
            source={"step": loaded.step},
        )
    return folder / kind
