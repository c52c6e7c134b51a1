"""Training under a real Ray Train and DeepSpeed: the same curve on any number of workers, and after a kill."""

import os
import signal
import threading
import time

import pytest
import torch

from md4.errors import UserError
from orchestration import checkpoints
from orchestration.config import load
from orchestration.runs import Run, load_model
from orchestration.train import train
from tests.orchestration.conftest import tiny_settings

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_cluster")]
STEPS = 50
LONG = [f"train.steps={STEPS}", "checkpoint.every=10", "evaluation.every=25", "train.workers=2", "train.zero_stage=2"]


def losses(run: Run) -> list[float]:
    rows = run.metrics("train")
    assert [row["step"] for row in rows] == list(range(1, STEPS + 1))
    return [row["bits_per_token"] for row in rows]


def final_state(run: Run) -> dict[str, torch.Tensor]:
    checkpoint = checkpoints.newest(run.checkpoints, print)
    assert checkpoint is not None
    assert checkpoint.step == STEPS
    return {f"{kind}/{name}": t for kind in checkpoint.kinds for name, t in checkpoint.tensors(kind).items()}


@pytest.fixture(scope="module")
def undisturbed(corpus, data_directory, tmp_path_factory, ray_cluster):
    """A run of 2 workers and ZeRO-2 that nothing happened to: (run, what it printed)."""
    said: list[str] = []
    overrides = [*tiny_settings(corpus, data_directory, tmp_path_factory.mktemp("runs")), *LONG]
    return train(load("pydocs-tiny", overrides), report=said.append).run, said


def test_a_run_learns_and_leaves_everything_in_its_folder(undisturbed):
    run, said = undisturbed
    curve = losses(run)
    assert sum(curve[-5:]) / 5 < sum(curve[:5]) / 5 - 0.5
    assert [row["step"] for row in run.metrics("evaluation")] == [0, 25, 50]
    before, _, after = (row["bits_per_token"] for row in run.metrics("evaluation"))
    assert before == pytest.approx(4.755, abs=0.001)  # log2(27): the head starts at zero
    assert after < before - 0.5
    assert [row["step"] for row in run.metrics("checkpoint")] == [10, 20, 30, 40, 50]
    assert any("tokens/s" in line and "left" in line for line in said)
    assert (run.path / "config.yaml").is_file()


def test_one_worker_gives_the_same_curve_as_two(undisturbed, tiny):
    config = tiny(*LONG, "train.workers=1", "train.zero_stage=0", "train.micro_batch=8")
    run = train(config, report=print).run
    for one, two in zip(losses(run), losses(undisturbed[0]), strict=True):
        assert abs(one - two) <= 1e-5 * two


def test_a_killed_run_resumes_to_the_same_bits(undisturbed, tiny):
    config = tiny(*LONG)
    killed = threading.Event()

    def kill_rank_0_after_step(step: int) -> None:
        run = None
        while not killed.is_set():
            time.sleep(0.005)
            run = run or (Run(config.directory) if (config.directory / "metrics.jsonl").exists() else None)
            rows = run.metrics() if run else []
            if rows and rows[-1]["step"] >= step:
                os.kill(next(row["pid"] for row in rows if row["kind"] == "start"), signal.SIGKILL)
                killed.set()

    thread = threading.Thread(target=kill_rank_0_after_step, args=(22,), daemon=True)
    thread.start()
    with pytest.raises(UserError, match="--resume"):
        train(config, report=print)
    assert killed.is_set()
    thread.join()

    said: list[str] = []
    with pytest.raises(UserError, match="exists already"):
        train(config, report=said.append)
    run = train(config, resume=True, report=said.append).run
    assert any("from step" in line for line in said)
    assert losses(run) == losses(undisturbed[0])
    resumed, expected = final_state(run), final_state(undisturbed[0])
    assert resumed.keys() == expected.keys()
    assert all(torch.equal(resumed[name], expected[name]) for name in expected)


def test_a_trained_model_loads_with_averaged_or_last_weights(undisturbed):
    averaged, last = (load_model(undisturbed[0].path, ema=ema) for ema in (True, False))
    assert averaged.step == last.step == STEPS
    assert averaged.weights_hash != last.weights_hash
    z, t = torch.full((1, 32), 27), torch.tensor([0.9])
    assert not torch.equal(averaged.model.logits(z, t), last.model.logits(z, t))
