"""Run by every process of a bare gloo group (see test_zero.py): trains, saves and restores over all ZeRO stages.

Prints `stage A -> stage B ok` for each pair that held what it asserts.
"""

import os
import sys
from pathlib import Path

os.environ["DS_ACCELERATOR"] = "cpu"

import deepspeed
import deepspeed.ops
import torch
import torch.distributed as dist

from md4.model import ModelConfig, build
from md4.networks.transformer import TransformerConfig
from md4.objectives import global_times, mask_uniforms
from orchestration import checkpoints
from orchestration.optimizer import AdamWithEma
from orchestration.zero import EngineState, initialize

MODEL = ModelConfig(vocab_size=27, length=32, network=TransformerConfig(feature_dim=16, heads=2, layers=2))
BATCH, SLICES, STEPS = 8, 4, 5


def make(stage: int) -> EngineState:
    model = build(MODEL, seed=1)
    # Two groups of odd sizes: partitions must not line up with parameters.
    wide = [p for p in model.parameters() if p.ndim > 1]
    narrow = [p for p in model.parameters() if p.ndim <= 1]
    groups = [{"params": wide, "weight_decay": 0.1}, {"params": narrow, "weight_decay": 0.0}]
    optimizer = AdamWithEma(groups, lr=1e-2, ema=0.9, fused=True)
    share = BATCH // dist.get_world_size()
    engine = initialize(model, optimizer, stage=stage, micro_batch=share // 2, accumulation=2, clip_norm=1.0)
    return EngineState(engine, optimizer)


def train(state: EngineState, start: int, stop: int) -> list[float]:
    """Global losses of steps start..stop-1 on data that depend on the step alone."""
    engine, losses = state.engine, []
    share = BATCH // dist.get_world_size()
    slots = torch.arange(share) + share * dist.get_rank()
    for step in range(start, stop):
        data = torch.Generator().manual_seed(step)
        tokens = torch.randint(0, 27, (BATCH, 32), generator=data)[slots]
        t = global_times(0, step, slots, BATCH, SLICES)
        uniforms = mask_uniforms(0, step, slots, 32)
        total = torch.zeros(())
        for part in torch.arange(share).chunk(2):
            loss = engine.module.bits_per_token(engine(tokens[part], t[part], uniforms[part]), 32).mean()
            engine.backward(loss)
            engine.step()
            total += loss.detach() / 2
        dist.all_reduce(total)
        losses.append(float(total) / dist.get_world_size())
    return losses


def everything(state: EngineState) -> dict[tuple[str, str], torch.Tensor]:
    """The whole state, on rank 0."""
    return {(name, kind): tensor for name, kind, tensor in state.gather(dict.fromkeys(state.shapes, 0))}


def check_average(state: EngineState) -> None:
    """Inside `averaged` the network computes with the EMA; afterwards all is as before, bit for bit."""
    before = everything(state)
    tokens, t = torch.arange(32).remainder(27)[None], torch.tensor([0.5])
    with state.averaged():
        inside = state.engine.module.logits(tokens, t)
        if dist.get_rank() == 0:
            other = build(MODEL, seed=2)
            other.load_state_dict({name: tensor for (name, kind), tensor in before.items() if kind == "ema"})
            assert torch.equal(inside, other.logits(tokens, t))
    outside, after = state.engine.module.logits(tokens, t), everything(state)
    assert not torch.equal(inside, outside)
    assert all(torch.equal(before[key], after[key]) for key in before)


def main(folder: Path, pairs: list[tuple[int, int]]) -> None:
    torch.set_num_threads(1)
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(dist_backend="gloo", auto_mpi_discovery=False, verbose=False)
    for old, new in pairs:
        first = make(old)
        train(first, 0, STEPS)
        checkpoints.save(folder / str(old), first, STEPS, {"config": {}}, keep=2)
        saved = everything(first)
        check_average(first)
        expected = train(first, STEPS, 2 * STEPS)

        second = make(new)
        checkpoint = checkpoints.newest(folder / str(old), print)
        assert checkpoint is not None
        checkpoints.restore(checkpoint, second)
        loaded = everything(second)
        assert saved.keys() == loaded.keys()
        assert all(torch.equal(saved[key], loaded[key]) for key in saved)
        losses = train(second, STEPS, 2 * STEPS)
        for a, b in zip(expected, losses, strict=True):
            assert abs(a - b) <= 1e-5 * abs(a), (expected, losses)
        if dist.get_rank() == 0:
            print(f"stage {old} -> stage {new} ok", flush=True)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), [tuple(map(int, pair.split("-"))) for pair in sys.argv[2:]])  # type: ignore[misc]
