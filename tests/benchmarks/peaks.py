"""The real peak of tensor memory in a training step, to hold `md4 plan` against."""

import gc
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.distributed._tools.mem_tracker import MemTracker

from md4.model import build
from md4.objectives import bits_per_token
from orchestration.config import Config
from orchestration.optimizer import AdamWithEma, parameter_groups
from orchestration.zero import EngineState, initialize


def step_of(
    config: Config, rows: int, device: torch.device, compute: torch.dtype, passes: int = 1
) -> Callable[[], None]:
    """One optimizer update of the configured model by a real DeepSpeed engine, as a worker makes it, in which every
    position is hidden. The process group must be there."""
    options, length = config.optimizer, config.model.length
    model = build(config.model, compute=compute, seed=1).to(device)
    optimizer = AdamWithEma(parameter_groups(model, options), lr=1e-4, ema=options.ema, fused=True)
    engine = initialize(
        model,
        optimizer,
        stage=config.train.zero_stage,
        micro_batch=rows,
        accumulation=passes,
        clip_norm=options.clip_norm,
        offload=config.train.offload,
    )
    state = EngineState(engine, optimizer)
    masks = (model.masks_per_example,) if model.masks_per_example > 1 else ()

    def step() -> None:
        assert state.engine is engine
        engine.train()
        for _ in range(passes):
            given: dict[str, Tensor] = {
                "tokens": torch.randint(0, config.model.vocab_size, (rows, length), device=device),
                "t": torch.full((rows,), 1 - 1e-9, dtype=torch.float64, device=device),
                "uniforms": torch.full((rows, *masks, length), 0.5, dtype=torch.float64, device=device),
            }
            if config.model.classes:
                given["labels"] = torch.zeros(rows, dtype=torch.int64, device=device)
            engine.backward(bits_per_token(engine(**given).optimised, length).mean())
            del given
            engine.step()

    return step


def tracked(step: Callable[[], None]) -> int:
    """Bytes of tensors at the peak of `step`, those that were there before included, by torch's memory tracker."""
    gc.collect()
    tracker = MemTracker()
    tracker.track_external(*live_tensors())
    with tracker:
        step()
    peak = tracker.get_tracker_snapshot("peak")
    return max(int(kinds["Total"]) for kinds in peak.values())


def allocated(step: Callable[[], None]) -> int:
    """The same by PyTorch's profiler, which sees every allocation on the CPU, those inside of operations included."""
    gc.collect()
    before = live_bytes()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as seen:
        step()
    assert seen.profiler is not None
    now = highest = 0
    for event in sorted(seen.profiler.kineto_results.events(), key=lambda event: event.start_ns()):
        if event.name() == "[memory]":
            now += event.nbytes()
            highest = max(highest, now)
    return before + highest


def live_tensors() -> list[Any]:
    return [one for one in gc.get_objects() if issubclass(type(one), Tensor) and one.device.type != "meta"]


def live_bytes() -> int:
    storages = [tensor.untyped_storage() for tensor in live_tensors()]
    return sum({storage._cdata: storage.nbytes() for storage in storages}.values())
