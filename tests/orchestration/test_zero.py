"""Engine state by parameter name: every ZeRO stage, real DeepSpeed engines in bare process groups."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def start(workers: int, program: str, *arguments: str) -> subprocess.Popen[str]:
    """A group of `workers` processes that run a program of this folder; what they say is one text."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={workers}"]
    command += ["-m", f"tests.orchestration.{program}", *arguments]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def launch(folder: Path, workers: int, objective: str, pairs: list[str]) -> str:
    process = start(workers, "zero_program", str(folder), objective, *pairs)
    try:
        said, _ = process.communicate(timeout=280)
    finally:
        process.kill()
    assert process.returncode == 0, said
    return said


@pytest.mark.parametrize("objective", ["md4", "genmd4"])
def test_state_moves_between_stages_bit_for_bit(objective, tmp_path):
    """And every stage, with accumulation, trains as a plain loop does."""
    out = launch(tmp_path, 2, objective, ["0-1", "1-2", "2-3", "3-0"])
    assert out.count("ok") == 4


def test_state_moves_in_and_out_of_the_memory_of_the_cpu(tmp_path):
    """Offloaded optimizers of stages 1 to 3 train, are saved and are loaded as all others."""
    out = launch(tmp_path, 2, "md4", ["1o-2o", "2o-3o", "3o-1"])
    assert out.count("ok") == 3


@pytest.mark.slow
def test_an_image_network_that_recomputes_activations_trains_in_every_stage(tmp_path):
    assert launch(tmp_path, 2, "unet", ["0-1", "1-2", "2-3", "3-0"]).count("ok") == 4


@pytest.mark.slow
@pytest.mark.parametrize("objective", ["md4", "genmd4"])
@pytest.mark.parametrize("workers", [1, 2, 4])
def test_state_moves_between_all_stages(objective, workers, tmp_path):
    pairs = [f"{old}-{new}" for old in range(4) for new in range(4)]
    assert launch(tmp_path, workers, objective, pairs).count("ok") == 16


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_state_moves_between_all_numbers_of_workers_bit_for_bit(tmp_path):
    """1 to 4 workers into 1 to 4, in every stage; three workers have unequal shares. And 20 steps on, to 1e-5."""
    launched = [start(workers, "resize_program", str(tmp_path)) for workers in (1, 2, 3, 4)]
    try:
        said = [process.communicate(timeout=800)[0] for process in launched]
    finally:
        for process in launched:
            process.kill()
    assert [process.returncode for process in launched] == [0, 0, 0, 0], "\n".join(said)
    expected = {f"{old} -> {new} stage {stage} ok" for old in range(1, 5) for new in range(1, 5) for stage in range(4)}
    assert {line for text in said for line in text.splitlines() if line.endswith(" ok")} == expected
