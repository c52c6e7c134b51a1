"""Engine state by parameter name: every ZeRO stage, real DeepSpeed engines in bare process groups."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def launch(folder: Path, workers: int, objective: str, pairs: list[str]) -> str:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={workers}"]
    command += ["-m", "tests.orchestration.zero_program", str(folder), objective, *pairs]
    done = subprocess.run(command, cwd=ROOT, env={**os.environ}, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


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
