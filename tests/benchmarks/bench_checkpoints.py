"""What checkpoints cost: 200 steps with one every 20 seconds against the same steps without, interleaved.

    python -m tests.benchmarks.bench_checkpoints [ROUNDS] [STEPS] [SECONDS]

Two workers of the demo's network. Wall time from the first step's beginning to the end of the last, the checkpoints at
the end of the run, which both have, left out. Goal: at most 1.05 times as long.
"""

import sys
import tempfile
import time

from orchestration.config import load
from orchestration.train import train
from tests.benchmarks.harness import Benchmark

PRESET = "pydocs-tiny"
QUIET = ["train.workers=2", "train.log_every=1", "evaluation.every=0", "tracking.tensorboard=false"]


def seconds(folder: str, steps: int, every: float, counted: list[int]) -> float:
    """Wall time of the steps 2..`steps`, a checkpoint every `every` seconds (0: none); how many goes to `counted`."""
    name = f"every-{every:g}-{time.time_ns()}"
    own = [f"name={name}", f"runs={folder}/runs", f"data.directory={folder}/data", f"train.steps={steps}"]
    config = load(PRESET, [*own, *QUIET, "checkpoint.every=0", f"checkpoint.seconds={every}"])
    run = train(config, report=lambda _: None).run
    rows = run.metrics("train")
    counted.append(sum(row["step"] < steps for row in run.metrics("checkpoint")))
    return rows[-1]["time"] - rows[0]["time"]


def main() -> None:
    rounds, steps, every = (
        kind(sys.argv[place]) if len(sys.argv) > place else default
        for place, kind, default in ((1, int, 5), (2, int, 200), (3, float, 20.0))
    )
    benchmark = Benchmark("checkpoints", "s", baseline="without", higher_is_better=False)
    counted: list[int] = []
    with tempfile.TemporaryDirectory() as folder:
        seconds(folder, 5, 0, [])  # prepares the data
        benchmark.run(
            {
                "without": lambda: seconds(folder, int(steps), 0, []),
                f"every {every:g} s": lambda: seconds(folder, int(steps), every, counted),
            },
            int(rounds),
        )
    benchmark.notes["checkpoints of each run"] = counted
    benchmark.notes["goal"] = "at most 1.05 of the time without"
    benchmark.report()


if __name__ == "__main__":
    main()
