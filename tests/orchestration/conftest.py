"""Small real parts for the tests of this folder: a corpus, a configuration that trains in a second, a process group."""

import random
from pathlib import Path

import pytest

from orchestration.config import Config, load


def write_corpus(path: Path, words: int = 30_000, seed: int = 1) -> Path:
    """A text of random words from a small lexicon: quick to learn, and the same every time."""
    draw = random.Random(seed)
    lexicon = ["".join(draw.choices("abcdefghij", k=draw.randint(2, 7))) for _ in range(50)]
    path.write_text(" ".join(draw.choices(lexicon, k=words)), encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def corpus(tmp_path_factory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("corpus") / "words.txt")


@pytest.fixture(scope="session")
def data_directory(tmp_path_factory) -> Path:
    """Where the tests' prepared data sets go, so that they are prepared once."""
    return tmp_path_factory.mktemp("data")


def tiny_settings(corpus: Path, data_directory: Path, runs: Path) -> list[str]:
    """Overrides of pydocs-tiny: a network that takes milliseconds a step, on the random words."""
    return [
        "name=tiny", f"runs={runs}", "data.source=text", f"data.path={corpus}", f"data.directory={data_directory}",
        "data.length=32", "data.document_chars=1000", "model.network.feature_dim=16", "model.network.heads=2",
        "model.network.layers=2", "optimizer.learning_rate=1e-2", "optimizer.warmup=5", "optimizer.ema=0.8",
        "train.batch_size=16", "train.slices=4", "train.log_every=1", "train.precision=float32",
        "train.max_restarts=0", "evaluation.rows=16", "evaluation.draws=2", "tracking.tensorboard=false",
    ]  # fmt: skip


@pytest.fixture
def tiny(corpus, data_directory, tmp_path):
    """`tiny("key=value", ...)` -> Config of the small network, with its runs in tmp_path."""

    def make(*overrides: str) -> Config:
        return load("pydocs-tiny", [*tiny_settings(corpus, data_directory, tmp_path / "runs"), *overrides])

    return make


@pytest.fixture(scope="session")
def process_group(tmp_path_factory):
    """A gloo group of this one process. DeepSpeed remembers the first it sees, so all tests share one."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {"DS_ACCELERATOR": "cpu", "RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}.items():
            patch.setenv(name, value)
        import deepspeed
        import deepspeed.ops
        import torch.distributed as dist

        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        store = tmp_path_factory.mktemp("store") / "store"
        dist.init_process_group("gloo", init_method=f"file://{store}", rank=0, world_size=1)
        deepspeed.init_distributed(dist_backend="gloo", auto_mpi_discovery=False, verbose=False)
        yield
        dist.destroy_process_group()
