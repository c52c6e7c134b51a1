"""`md4 plan`: the plan of `orchestration.memory_plan` as a table or as JSON."""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from md4.errors import UserError
from orchestration.config import Config, load, override
from orchestration.memory_plan import HEADROOM, Line, Planner, Target, as_json, products, read_counts, read_size, size


def run(
    preset: str,
    overrides: Sequence[str],
    file: Path | None,
    gpus: str | None,
    memory: str | None,
    price: float | None,
    throughput: float | None,
    json_wanted: bool,
) -> None:
    """Print the plan; UserError when the configured stage fits on none of the numbers of devices."""
    config = load(preset, overrides, file)
    counts = None if gpus is None else read_counts(gpus)
    if counts is None:
        counts = list(range(config.train.least_workers, config.train.most_workers + 1))
    device = torch.device("cpu" if config.train.device == "cpu" else "cuda")
    target = Target(device, products(config, device), None if memory is None else read_size(memory), price, throughput)
    if memory is None and device.type == "cuda" and torch.cuda.is_available():
        target = replace(target, memory=torch.cuda.get_device_properties(0).total_memory)
    config = override(config, {"train": {"workers": counts[0]}}) if gpus else config
    planner = Planner(config, target)
    lines = planner.lines(counts)
    if json_wanted:
        print(json.dumps(as_json(config, target, lines), indent=1))
    else:
        show(config, target, lines)
    if reason := planner.refuse(lines):
        raise UserError(reason)


_PARTS = {
    "weights": "weights",
    "gradients": "grads",
    "optimizer": "optim",
    "ema": "EMA",
    "activations": "activ",
    "logits": "logits",
    "transient": "buffers",
}


def show(config: Config, target: Target, lines: Sequence[Line]) -> None:
    """The table, and what it means."""
    known, timed, priced = target.memory is not None, target.throughput is not None, target.price is not None
    scale, unit = (1e9, "GB") if max(line.need.total for line in lines) >= 1e9 else (1e6, "MB")
    compute = str(target.compute).removeprefix("torch.")
    table = Table(title=f"{config.name}: {unit} on each device at the peak of a step ({target.device.type}, {compute})")
    columns = ["devices", "ZeRO", "rows", *_PARTS.values(), "total", "peak in", *["host"] * config.train.offload]
    columns += ["fits", "rows that fit"] * known + ["s/step"] * timed + ["cost"] * priced
    for column in columns:
        table.add_column(column, justify="left" if column == "peak in" else "right", no_wrap=True)
    for number, line in enumerate(lines):
        need = line.need
        row = [str(line.workers), str(line.stage), f"{line.micro_batch} x {line.passes}"]
        row += [f"{getattr(need, part) / scale:.2f}" for part in _PARTS] + [f"{need.total / scale:.2f}", need.peak]
        row += [f"{need.host / scale:.2f}"] * config.train.offload
        row += ["yes" if line.fits else "no", str(line.largest or "none")] * known
        row += ["" if line.seconds is None else f"{line.seconds:.3g}"] * timed
        row += ["" if line.cost is None else f"{line.cost:,.0f}"] * priced
        chosen = line.stage == config.train.zero_stage
        table.add_row(*row, style="bold" if chosen else None, end_section=line.stage == 3 and number + 1 < len(lines))
    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = 160
    console.print(table)
    console.print(
        f"Tensors alone, with all positions hidden; the configured stage is {config.train.zero_stage}. Logits and loss "
        f"take at most {size(lines[0].need.logits_most)}. "
        + (f"{HEADROOM:.0%} of {size(target.memory)} stay free." if target.memory else "--memory 80GB compares."),
        soft_wrap=True,
    )
