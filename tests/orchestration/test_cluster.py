"""A driver on a machine without a GPU, as the head of a cluster is, and workers on machines that have them."""

import os
import subprocess
import sys
import textwrap

import pytest
import torch

from md4.errors import UserError
from orchestration.train import check

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="is about a driver that sees no GPU")

# A Ray that believes to have a GPU: nothing is computed there.
_PROGRAM = textwrap.dedent("""
    import sys, ray
    from orchestration.config import load
    from orchestration.train import scaling

    ray.init(address="local", num_cpus=1, num_gpus=int(sys.argv[1]), include_dashboard=False, logging_level="ERROR")
    for device in ("auto", "cuda", "cpu"):
        print(device, scaling(load("pydocs-tiny", [f"train.device={device}"])).use_gpu)
    ray.shutdown()
""")


def test_a_run_on_gpus_is_refused_here_and_not_on_a_cluster(tiny, monkeypatch):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    with pytest.raises(UserError, match="torch sees no CUDA device here"):
        check(tiny("train.device=cuda"), False, lambda _: None)
    monkeypatch.setenv("RAY_ADDRESS", "head:6379")
    said: list[str] = []
    check(tiny("train.device=cuda"), False, said.append)
    assert "parameters" in said[0]


@pytest.mark.slow
@pytest.mark.parametrize(("gpus", "auto"), [(0, False), (1, True)])
def test_auto_takes_the_gpus_of_the_cluster(gpus, auto):
    environment = {**os.environ, "RAY_ADDRESS": "head:6379", "RAY_AUTH_MODE": "disabled"}
    done = subprocess.run(
        [sys.executable, "-c", _PROGRAM, str(gpus)], env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split("\n")[:3] == [f"auto {auto}", "cuda True", "cpu False"]
