"""Writes the examples again, with the commands that they begin with."""

import shlex
import sys
from pathlib import Path

from orchestration.cli import app

FOLDER = Path(__file__).parent
_IMAGE = "--image registry.example/md4:0.1.0"
COMMANDS = {
    # One pod with one CPU worker, everything on a volume.
    "small": f"pydocs-tiny train.device=cpu train.workers=1 --kind job {_IMAGE} --storage pvc:md4",
    # Two to four pods with a GPU each, everything in S3; the head waits for the run, pods come and go.
    "multi-node": "text8 train.device=cuda train.workers=2..4 tracking.prometheus_port=9400 --kind job "
    f"{_IMAGE}-cuda --storage s3://bucket/md4 --secret s3 --token-secret ray-token --gpu-memory 80GB "
    "--time-limit 172800 --label team=language",
    # The same on machines that may be taken away at any time.
    "spot": "pydocs-tiny train.device=cuda train.workers=1..8 checkpoint.seconds=120 --kind job "
    f"{_IMAGE}-cuda --storage s3://bucket/md4 --secret s3 --gpu-memory 80GB --spot gke",
    # A cluster that stays, for `md4 submit`; machines come with the work.
    "cluster": f"pydocs-tiny train.device=cuda train.workers=1..4 --kind cluster {_IMAGE}-cuda "
    "--storage s3://bucket/md4 --secret s3 --token-secret ray-token",
    # The service: one to three replicas with a GPU each, behind one address.
    "serving": "pydocs-tiny serving.num_gpus=1 serving.min_replicas=1 serving.replicas=3 --kind service "
    f"{_IMAGE}-cuda --storage pvc:md4",
    # Its upgrade in steps, without twice the machines.
    "serving-incremental": "pydocs-tiny serving.num_gpus=1 serving.replicas=3 --kind service "
    f"{_IMAGE}-cuda --storage pvc:md4 --gateway-class istio",
}  # fmt: skip


def command(name: str) -> list[str]:
    """An example's command, with `md4` as its first word."""
    return ["md4", "render", "kuberay", *shlex.split(COMMANDS[name])]


def write(name: str, file: Path) -> None:
    """Write what the command writes now."""
    before, sys.argv = sys.argv, command(name)
    try:
        app([*sys.argv[1:], "--out", str(file)], standalone_mode=False)
    finally:
        sys.argv = before


if __name__ == "__main__":
    for example in COMMANDS:
        write(example, FOLDER / f"{example}.yaml")
