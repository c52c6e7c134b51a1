"""Real models for the tests of this folder, made in milliseconds: random weights, so that predictions depend on all."""

import hashlib
from pathlib import Path

from md4.model import build
from orchestration.config import load
from orchestration.runs import Loaded
from tests.orchestration.small_run import LENGTH, disturbed

NETWORK = ("model.network.feature_dim=16", "model.network.heads=2", "model.network.layers=2")


def small_model(*overrides: str, seed: int = 0, step: int = 7) -> Loaded:
    """A text8 model of 32 tokens, or what `overrides` make of it."""
    settings = [f"data.length={LENGTH}", *NETWORK, "sampling={sampler: ancestral, steps: 24}", *overrides]
    return _loaded("pydocs-tiny", settings, seed, step)


def small_images(*overrides: str, seed: int = 0) -> Loaded:
    """A model of handwritten digits."""
    return _loaded("digits-tiny", list(overrides), seed, 7)


def _loaded(preset: str, settings: list[str], seed: int, step: int) -> Loaded:
    config = load(preset, settings)
    return Loaded(
        model=disturbed(build(config.model), seed).eval(),  # type: ignore[arg-type]
        vocabulary=config.data.tokens,
        config=config,
        step=step,
        weights_hash=hashlib.sha256(f"{preset} {settings} {seed} {step}".encode()).hexdigest(),
        path=Path("nowhere"),
    )
