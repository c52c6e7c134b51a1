"""What the house costs: training through Ray Train and DeepSpeed against bare PyTorch, in one interleaved run.

    python -m tests.benchmarks.bench_train_overhead [ROUNDS]

The demo's network and batch; every process has one torch thread. Goals: one worker >= 0.90 of a bare loop, two
workers (ZeRO-2) >= 0.85 of two bare DistributedDataParallel processes. Steady state: medians over windows of 5 steps,
the first four windows left out. Ray's own processes are weighed while the steps run.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import psutil

from orchestration.cluster import ENVIRONMENT, cluster
from orchestration.config import load
from orchestration.train import train
from pipelines.prepare import prepare
from tests.benchmarks.bare_loop import WINDOW
from tests.benchmarks.harness import Benchmark

PRESET, STEPS, SKIP = "pydocs-tiny", 80, 4
QUIET = ["evaluation.every=0", "checkpoint.every=0", "tracking.tensorboard=false", f"train.log_every={WINDOW}"]


def bare(data: Path, workers: int) -> float:
    """Tokens/s of the bare loop on `workers` processes."""
    command = [sys.executable]
    if workers > 1:
        command += ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={workers}"]
    command += ["-m", "tests.benchmarks.bare_loop", PRESET, str(data), str(workers), str(STEPS)]
    malloc = {name: value for name, value in ENVIRONMENT.items() if name.startswith("MALLOC")}  # as our workers have
    done = subprocess.run(
        command, env={**os.environ, **malloc, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, check=True
    )
    return statistics.median(json.loads(done.stdout.splitlines()[-1])[SKIP:])


def ours(runs: str, data_directory: str, workers: int, weights: list[dict[str, float]]) -> float:
    """Tokens/s of `md4 train` on `workers` workers; what Ray's own processes took goes to `weights`."""
    name = f"w{workers}-{time.time_ns()}"
    config = load(PRESET, [
        f"name={name}", f"runs={runs}", f"data.directory={data_directory}", f"train.steps={STEPS}",
        f"train.workers={workers}", *QUIET,
    ])  # fmt: skip
    scale = _Scale(Path(runs) / name)
    scale.start()
    run = train(config, report=lambda _: None).run
    scale.join()
    weights.append(scale.result)
    return statistics.median([row["tokens_per_second"] for row in run.metrics("train")][SKIP:])


class _Scale(threading.Thread):
    """CPU share and private memory of Ray's processes (not the workers) while the steps run."""

    def __init__(self, run: Path):
        super().__init__(daemon=True)
        self.path, self.result = run, {}

    def run(self) -> None:
        self._wait_for_lines(SKIP)
        began, before = time.perf_counter(), self._seconds()
        self._wait_for_lines(STEPS // WINDOW - 2)
        wall, spent = time.perf_counter() - began, self._seconds() - before
        memory = sum(p.memory_full_info().uss for p in self._processes())
        self.result = {"cpu_cores": spent / wall, "private_mb": memory / 2**20}

    def _wait_for_lines(self, count: int) -> None:
        """Until the run has written `count` lines of training metrics. Looks once a second, to weigh little itself."""
        file = self.path / "metrics.jsonl"
        while not file.exists() or file.read_text().count('"kind": "train"') < count:
            time.sleep(1)

    @staticmethod
    def _processes() -> list[psutil.Process]:
        found = []
        for process in psutil.Process().children(recursive=True):
            try:
                command = " ".join(process.cmdline())
            except psutil.Error:
                continue
            if "RayTrainWorker" not in command:
                found.append(process)
        return found

    def _seconds(self) -> float:
        return sum(sum(p.cpu_times()[:2]) for p in self._processes() if p.is_running())


def main() -> None:
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 5
    benchmark = Benchmark("train_overhead", "tokens/s", baseline="bare loop, 1 process")
    weights: dict[int, list[dict[str, float]]] = {1: [], 2: []}
    with tempfile.TemporaryDirectory() as folder:
        data_directory = f"{folder}/data"
        with cluster(num_cpus=4):
            data = prepare(load(PRESET, [f"data.directory={data_directory}"]).data, lambda _: None)
        benchmark.run(
            {
                "bare loop, 1 process": lambda: bare(data, 1),
                "md4 train, 1 worker": lambda: ours(f"{folder}/runs", data_directory, 1, weights[1]),
                "bare DDP, 2 processes": lambda: bare(data, 2),
                "md4 train, 2 workers": lambda: ours(f"{folder}/runs", data_directory, 2, weights[2]),
            },
            rounds,
        )
    benchmark.goal("md4 train, 1 worker", 0.90)
    benchmark.goal("md4 train, 2 workers", 0.85, against="bare DDP, 2 processes")
    for workers, taken in weights.items():
        for figure in ("cpu_cores", "private_mb"):
            values = [facts[figure] for facts in taken if facts]
            benchmark.notes[f"Ray's own processes beside {workers} worker(s), {figure}"] = round(
                statistics.median(values), 3
            )
    benchmark.report()


if __name__ == "__main__":
    main()
