"""A run's folder as training leaves it, without the training: a small network whose weights are disturbed, so that its
predictions depend on everything."""

import hashlib
import json
from pathlib import Path

import torch
from safetensors.torch import save_file

from md4.model import build
from md4.objectives import MD4
from orchestration.checkpoints import FORMAT, MANIFEST
from orchestration.config import load
from orchestration.runs import Run

LENGTH = 32


def disturbed(model: MD4, seed: int, scale: float = 0.2) -> MD4:
    """Add noise to all weights; fresh networks predict nothing (their heads are zero)."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += scale * torch.randn(parameter.shape, generator=generator)
    return model


def write_run(folder: Path, *overrides: str, seed: int = 0, step: int = 7) -> Path:
    """A run of a tiny text8 network with one checkpoint at `step`; returns its folder."""
    config = load(
        "pydocs-tiny",
        [
            "name=small",
            f"runs={folder}",
            f"data.length={LENGTH}",
            "model.network.feature_dim=16",
            "model.network.heads=2",
            "model.network.layers=2",
            "sampling={sampler: ancestral, steps: 24}",
            *overrides,
        ],
    )
    run = Run.create(config)
    write_checkpoint(run, disturbed(build(config.model), seed), step)
    return run.path


def write_checkpoint(run: Run, model: MD4, step: int) -> None:
    """The model's weights as a checkpoint of one writer."""
    folder = run.checkpoints / f"step-{step:08d}-abcdef"
    folder.mkdir(parents=True)
    file = folder / "weights-00000-of-00001.safetensors"
    tensors = model.state_dict()
    save_file(tensors, str(file))
    data = file.read_bytes()
    manifest = {
        "format": FORMAT,
        "step": step,
        "config": run.config.model_dump(mode="json"),
        "writers": 1,
        "kinds": ["weights"],
        "tensors": {
            name: {"shape": list(tensor.shape), "dtype": "float32", "writer": 0} for name, tensor in tensors.items()
        },
        "files": {file.name: {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}},
    }
    (folder / MANIFEST).write_text(json.dumps(manifest), encoding="utf-8")
