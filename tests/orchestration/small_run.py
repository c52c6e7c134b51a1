"""A run's folder as training leaves it, without the training: a small network whose weights are disturbed, so that its
predictions depend on everything."""

import json
from pathlib import Path

import torch

from md4.model import build
from md4.objectives import MaskedDiffusion
from orchestration.checkpoints import FORMAT, MANIFEST, file_name
from orchestration.config import load
from orchestration.content_sums import content_sum
from orchestration.runs import Run
from orchestration.tensor_files import write

LENGTH = 32


def disturbed(model: MaskedDiffusion, seed: int, scale: float = 0.2) -> MaskedDiffusion:
    """Add noise to all weights; fresh networks predict nothing (their heads are zero)."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += scale * torch.randn(parameter.shape, generator=generator)
    return model


def write_run(folder: Path, *overrides: str, seed: int = 0, step: int = 7) -> Path:
    """A run of a tiny text8 network with one checkpoint at `step`; returns its folder."""
    return make_run(str(folder), *overrides, seed=seed, step=step).path


def make_run(runs: str, *overrides: str, seed: int = 0, step: int = 7) -> Run:
    """The same below a path or a url."""
    config = load(
        "pydocs-tiny",
        [
            "name=small",
            f"runs={runs}",
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
    return run


def write_checkpoint(run: Run, model: MaskedDiffusion, step: int) -> None:
    """The model's weights as a checkpoint of one writer."""
    folder = run.checkpoints / f"step-{step:08d}-abcdef"
    tensors = {name: tensor.detach() for name, tensor in model.state_dict().items()}
    file = file_name("weights", 0, 1)
    manifest = {
        "format": FORMAT,
        "step": step,
        "config": run.config.model_dump(mode="json"),
        "writers": 1,
        "kinds": ["weights"],
        "tensors": {
            name: {
                "shape": list(tensor.shape),
                "dtype": "float32",
                "writer": 0,
                "sums": {"weights": int(content_sum(tensor))},
            }
            for name, tensor in tensors.items()
        },
        "files": {file: write(folder, file, tensors)},
    }
    folder.create(MANIFEST, json.dumps(manifest).encode())
