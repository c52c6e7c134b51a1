"""`md4 plan` against the peak of a real step: torch's memory tracker on a CPU, the allocator on a GPU.

    python -m tests.benchmarks.bench_plan

Three presets at micro-batch 1 on one worker, ZeRO 0 and 2, each in a process of its own: a DeepSpeed engine makes two
steps, then one that is tracked, with every position hidden. Goal: planned and tracked peak differ by 10 % at most. The
peak that PyTorch's profiler sees (temporaries inside of operations included) and the largest resident size of the
process, Python and libraries included, stand beside it. openwebtext-small needs 6 GB of memory.
"""

import json
import os
import resource
import subprocess
import sys
import tempfile
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from tests.benchmarks.harness import RESULTS, machine

PRESETS = ("pydocs-tiny", "text8", "openwebtext-small")
STAGES = (0, 2)
GOAL = 0.1


def measure(preset: str, stage: int) -> dict[str, Any]:
    """In a process of its own: the peaks of one step, and what is planned for it, in bytes."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    os.environ |= {"DS_ACCELERATOR": device.type, "RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}
    import deepspeed
    import deepspeed.ops
    import torch.distributed as dist

    from orchestration.config import load
    from orchestration.memory_plan import Planner, Target, products
    from tests.benchmarks import peaks

    config = load(preset, ["train.micro_batch=1", f"train.zero_stage={stage}"])
    compute = products(config, device)
    planned = Planner(one_pass(config), Target(device, compute)).need(stage, 1, 1)

    torch.set_num_threads(os.cpu_count() or 1)
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    with tempfile.TemporaryDirectory() as folder:
        backend = "nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, init_method=f"file://{folder}/store", rank=0, world_size=1)
        deepspeed.init_distributed(dist_backend=backend, auto_mpi_discovery=False, verbose=False)
        step = peaks.step_of(config, 1, device, compute)
        for _ in range(2):
            step()
        found = {"planned": planned.total, "tracked": peaks.tracked(step)}
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
            step()
            found["allocated"] = torch.cuda.max_memory_allocated()
        else:
            found["allocated"] = peaks.allocated(step)
        dist.destroy_process_group()
    found["resident"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {**found, "device": device.type, "compute": str(compute).removeprefix("torch."), "peak": planned.peak}


def one_pass(config: Any) -> Any:
    """The configuration with a batch that one worker takes through the network in one pass."""
    from orchestration.config import override

    return override(config, {"train": {"batch_size": 1, "slices": 1, "workers": 1, "micro_batch": 1}})


def main() -> None:
    rows = []
    for preset in PRESETS:
        for stage in STAGES:
            command = [sys.executable, "-m", "tests.benchmarks.bench_plan", "--measure", preset, str(stage)]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode:
                raise SystemExit(done.stderr)
            found = json.loads(done.stdout.splitlines()[-1])
            rows.append({"preset": preset, "stage": stage, **found, "ratio": found["planned"] / found["tracked"]})
            print(f"{preset}, ZeRO-{stage}: {rows[-1]['ratio']:.3f}", file=sys.stderr, flush=True)
    table = Table(title="peak of a step, MB, micro-batch 1, one worker")
    for column in ("preset", "ZeRO", "planned", "tracked", "ratio", "allocator", "ratio", "process"):
        table.add_column(column, justify="left" if column == "preset" else "right")
    for row in rows:
        mb = {name: f"{row[name] / 1e6:,.1f}" for name in ("planned", "tracked", "allocated", "resident")}
        more = f"{row['planned'] / row['allocated']:.3f}"
        table.add_row(
            row["preset"], str(row["stage"]), mb["planned"], mb["tracked"], f"{row['ratio']:.3f}", mb["allocated"],
            more, mb["resident"],
        )  # fmt: skip
    console = Console(width=120)
    console.print(table)
    passed = all(abs(row["ratio"] - 1) <= GOAL for row in rows)
    console.print(f"goal: all within {GOAL:.0%}: {'reached' if passed else 'MISSED'}")
    result = {
        "benchmark": "plan",
        "measured": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": "python -m tests.benchmarks.bench_plan",
        "machine": machine(),
        "goal": f"planned / tracked within 1 +- {GOAL}",
        "reached": passed,
        "rows": rows,
    }
    path: Path = RESULTS / "plan.json"
    path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    console.print(f"written: {path}")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--measure"]:
        print(json.dumps(measure(sys.argv[2], int(sys.argv[3]))))
    else:
        main()
