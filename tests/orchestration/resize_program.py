"""Run by every process of one of four bare gloo groups, of 1 to 4 workers, at the same time (see test_zero.py).

    python -m tests.orchestration.resize_program FOLDER

Each group trains in every ZeRO stage, saves, and goes on by itself; then it loads what each group saved, in every
stage, and goes on from there. Prints `N -> M stage S ok` for each that held what it asserts.
"""

import json
import os
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist

from orchestration import checkpoints
from orchestration.checkpoint_writer import Retention, Writer
from tests.orchestration.zero_program import agree, everything, join, make, train  # first: sets the accelerator

WORLDS, STAGES = (1, 2, 3, 4), (0, 1, 2, 3)
SAVED, FURTHER, MICRO_BATCH = 5, 20, 2  # steps, steps, rows: 4, 2, 2 and 1 passes


def place(folder: Path, world: int, stage: int) -> Path:
    return folder / f"{world}-workers-stage-{stage}"


def save(folder: Path, stage: int) -> None:
    """Train, save, train on; the losses of that are written last."""
    mine = place(folder, dist.get_world_size(), stage)
    state = make(str(stage), "md4", MICRO_BATCH)
    train(state, 0, SAVED, MICRO_BATCH)
    writer = Writer(mine, Retention())
    writer.save(state, SAVED, {"config": {}})
    writer.finish()
    whole = everything(state)
    losses = train(state, SAVED, SAVED + FURTHER, MICRO_BATCH)
    if dist.get_rank() == 0:
        torch.save({f"{name}/{kind}": tensor for (name, kind), tensor in whole.items()}, mine / "whole.pt")
        (mine / "losses.tmp").write_text(json.dumps(losses))
        os.rename(mine / "losses.tmp", mine / "losses.json")


def load(folder: Path, world: int, stage: int) -> None:
    """What `world` workers saved is here, bit for bit, and trains on as it did there."""
    theirs = place(folder, world, stage)
    state = make(str(stage), "md4", MICRO_BATCH)
    checkpoint = checkpoints.newest_together(theirs, print)
    assert checkpoint is not None
    assert checkpoint.step == SAVED
    checkpoints.restore(checkpoint, state)
    loaded = everything(state)
    if dist.get_rank() == 0:
        whole = torch.load(theirs / "whole.pt")
        assert {f"{name}/{kind}" for name, kind in loaded} == whole.keys()
        assert all(torch.equal(tensor, whole[f"{name}/{kind}"]) for (name, kind), tensor in loaded.items())
    losses = train(state, SAVED, SAVED + FURTHER, MICRO_BATCH)
    expected = json.loads((theirs / "losses.json").read_text())
    assert agree(expected, losses), (expected, losses)
    if dist.get_rank() == 0:
        print(f"{world} -> {dist.get_world_size()} stage {stage} ok", flush=True)


def main(folder: Path) -> None:
    join()
    for stage in STAGES:
        save(folder, stage)
    while not all((place(folder, world, stage) / "losses.json").exists() for world in WORLDS for stage in STAGES):
        time.sleep(0.1)
    for stage in STAGES:
        for world in WORLDS:
            load(folder, world, stage)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
