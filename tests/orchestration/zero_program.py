"""Run by every process of a bare gloo group (see test_zero.py): trains, saves and restores over all ZeRO stages.

    python -m tests.orchestration.zero_program FOLDER MODEL A-B...

A and B are stages 0 to 3; `2o` is stage 2 with its optimizer's state on the CPU. Prints `stage A -> stage B ok` for
each pair that held what it asserts.
"""

import os
import sys
from pathlib import Path

os.environ["DS_ACCELERATOR"] = "cpu"

import deepspeed
import deepspeed.ops
import torch
import torch.distributed as dist

from md4.genmd4 import GenMD4
from md4.model import ModelConfig, build
from md4.networks.transformer import TransformerConfig
from md4.networks.unet import UNetConfig
from md4.objectives import MaskedDiffusion, bits_per_token
from orchestration import checkpoints
from orchestration.checkpoint_writer import Retention, Writer
from orchestration.optimizer import AdamWithEma, OptimizerConfig, parameter_groups
from orchestration.passes import Passes
from orchestration.zero import EngineState, initialize
from pipelines.order import share

NETWORK = TransformerConfig(feature_dim=16, heads=2, layers=2)
MODELS = {
    objective: ModelConfig(objective=objective, vocab_size=27, length=32, network=NETWORK)
    for objective in ("md4", "genmd4")
}
# Activations computed again in the backward pass, when ZeRO-3 has to gather the weights again.
MODELS["unet"] = ModelConfig(
    vocab_size=27,
    length=32,
    shape=(4, 4, 2),
    network=UNetConfig(feature_dim=64, layers=1, checkpoint_activations=True),
)
BATCH, SLICES, STEPS, CLIP = 8, 4, 5, 1.0


def passes(micro_batch: int | None = None) -> Passes:
    """Of an update on this worker: two if `micro_batch` is None and the shares are equal."""
    world = dist.get_world_size()
    return Passes(BATCH, SLICES, world, micro_batch or BATCH // world // 2)


def my_slots() -> torch.Tensor:
    """This worker's slots of the global batch."""
    first, last = share(dist.get_rank(), dist.get_world_size(), SLICES)
    return torch.arange(first * (BATCH // SLICES), last * (BATCH // SLICES))


def parts(objective: str) -> tuple[MaskedDiffusion, AdamWithEma]:
    model = build(MODELS[objective], seed=1)
    if objective == "genmd4":
        groups = parameter_groups(model, OptimizerConfig(weight_decay=0.1, schedule_weight_decay=0.02))
        assert [group["weight_decay"] for group in groups] == [0.1, 0.02]
    else:  # two groups of odd sizes: partitions must not line up with parameters
        wide = [p for p in model.parameters() if p.ndim > 1]
        narrow = [p for p in model.parameters() if p.ndim <= 1]
        groups = [{"params": wide, "weight_decay": 0.1}, {"params": narrow, "weight_decay": 0.0}]
    return model, AdamWithEma(groups, lr=1e-2, ema=0.9, fused=True)


def make(stage: str, objective: str, micro_batch: int | None = None) -> EngineState:
    """stage: "0" to "3", with an "o" behind it if the optimizer's state lies in the CPU's memory."""
    model, optimizer = parts(objective)
    cut, offload = passes(micro_batch), stage.endswith("o")
    engine = initialize(
        model,
        optimizer,
        stage=int(stage.removesuffix("o")),
        micro_batch=cut.size,
        accumulation=cut.count,
        clip_norm=CLIP,
        offload=offload,
    )
    assert engine.zero_cpu_offload() == offload
    state = EngineState(engine, optimizer)
    check_shares(state)
    return state


def check_shares(state: EngineState) -> None:
    """A worker holds its part of the moments and of the average, and no more (some elements of padding aside)."""
    groups, world = len(state.optimizer.param_groups), dist.get_world_size()
    whole = sum(shape.numel() for shape in state.shapes.values())
    share = whole if state.stage == 0 else whole / world
    # At most an element for each parameter and worker, and 4 for each worker and group.
    padding = (len(state.shapes) + 4 * groups) * world
    for kind in state.kinds[1:]:
        held = {values[kind].untyped_storage().data_ptr(): values[kind] for values in state.optimizer.state.values()}
        elements = sum(values.untyped_storage().nbytes() // 4 for values in held.values())
        assert abs(elements - share) <= padding, (kind, elements, share)


def batch(step: int) -> torch.Tensor:
    """Global batches of very unequal tokens, so that there is something to learn about their powers."""
    data = torch.Generator().manual_seed(step)
    return (27 * torch.rand(BATCH, 32, generator=data) ** 3).long()


def train_plainly(objective: str, steps: int) -> list[float]:
    """The same training in this process alone: whole batches, no engine. Returns bounds, in bits per token."""
    model, optimizer = parts(objective)
    bounds = []
    for step in range(steps):
        loss = model(batch(step), **model.noise(0, step, torch.arange(BATCH), BATCH, SLICES, 32))
        optimizer.zero_grad()
        bits_per_token(loss.optimised, 32).mean().backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        bounds.append(bits_per_token(loss.bound, 32).mean().item())
    if isinstance(model, GenMD4):
        powers = model.schedule()
        assert powers.max() / powers.min() > 1.02, powers  # it has learned about them
    return bounds


def agree(one: list[float], other: list[float]) -> bool:
    return all(abs(a - b) <= 1e-5 * abs(a) for a, b in zip(one, other, strict=True))


def train(state: EngineState, start: int, stop: int, micro_batch: int | None = None) -> list[float]:
    """Global bounds of steps start..stop-1 on data that depend on the step alone, in bits per token."""
    engine, losses = state.engine, []
    slots, cut = my_slots(), passes(micro_batch)
    for step in range(start, stop):
        tokens = batch(step)[slots]
        drawn = engine.module.noise(0, step, slots, BATCH, SLICES, 32)
        total = torch.zeros(())
        for part, real in cut.parts(len(slots)):
            loss = engine(tokens[part], **{name: values[part] for name, values in drawn.items()})
            engine.backward(cut.loss(bits_per_token(loss.optimised, 32), real))
            engine.step()
            total += bits_per_token(loss.bound, 32)[:real].sum() / BATCH
        dist.all_reduce(total)
        losses.append(float(total))
    return losses


def everything(state: EngineState) -> dict[tuple[str, str], torch.Tensor]:
    """The whole state, on rank 0."""
    return {(name, kind): tensor for name, kind, tensor in state.gather(dict.fromkeys(state.shapes, 0))}


def check_average(state: EngineState, objective: str) -> None:
    """Inside `averaged` the network computes with the EMA; afterwards all is as before, bit for bit."""
    before = everything(state)
    tokens, t = torch.arange(32).remainder(27)[None], torch.tensor([0.5])
    with state.averaged():
        inside = state.engine.module.logits(tokens, t)
        if dist.get_rank() == 0:
            other = build(MODELS[objective], seed=2)
            other.load_state_dict({name: tensor for (name, kind), tensor in before.items() if kind == "ema"})
            assert torch.equal(inside, other.logits(tokens, t))
    outside, after = state.engine.module.logits(tokens, t), everything(state)
    assert not torch.equal(inside, outside)
    assert all(torch.equal(before[key], after[key]) for key in before)


def check_powers(state: EngineState) -> None:
    """The powers, read between two steps as the trainer does, are those of the parameter."""
    model = state.engine.module
    if isinstance(model, GenMD4):
        with torch.no_grad():
            powers = model.schedule()
        whole = everything(state)
        if dist.get_rank() == 0:
            assert torch.allclose(powers, torch.nn.functional.softplus(whole["schedule.w", "weights"]))


def join() -> None:
    torch.set_num_threads(1)
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(dist_backend="gloo", auto_mpi_discovery=False, verbose=False)


def main(folder: Path, objective: str, pairs: list[tuple[str, str]]) -> None:
    join()
    plain = train_plainly(objective, STEPS)
    for old, new in pairs:
        first = make(old, objective)
        bounds = train(first, 0, STEPS)
        assert agree(bounds, plain), (bounds, plain)
        check_powers(first)
        writer = Writer(folder / old, Retention())
        writer.save(first, STEPS, {"config": {}})
        writer.finish()
        dist.barrier()
        saved = everything(first)
        check_average(first, objective)
        expected = train(first, STEPS, 2 * STEPS)

        second = make(new, objective)
        checkpoint = checkpoints.newest_together(folder / old, print)
        assert checkpoint is not None
        checkpoints.restore(checkpoint, second)
        loaded = everything(second)
        assert saved.keys() == loaded.keys()
        assert all(torch.equal(saved[key], loaded[key]) for key in saved)
        losses = train(second, STEPS, 2 * STEPS)
        assert agree(expected, losses), (expected, losses)
        if dist.get_rank() == 0:
            print(f"stage {old} -> stage {new} ok", flush=True)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], [tuple(pair.split("-")) for pair in sys.argv[3:]])  # type: ignore[misc]
