"""Writes the examples again, with the commands that they begin with."""

import shlex
import sys
from pathlib import Path

from infra.kuberay.options import Options
from infra.render import render
from orchestration.cli import app
from orchestration.config import load
from orchestration.cron import Entry
from orchestration.jobs.spec import make

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


CRON = f"pydocs-tiny --kind cron {_IMAGE}-cuda --entry nightly --store s3://bucket/cron"  # on the cluster of that name
NIGHTLY = Entry(
    name="nightly",
    schedule="30 2 * * *",
    zone="Europe/Berlin",
    job=make(verb="evaluate", arguments=("s3://bucket/md4/runs/pydocs-tiny",), name="nightly"),
    catch_up_s=6 * 3600,
)


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


def cron() -> str:
    """What CRON writes if the entry in S3 is NIGHTLY."""
    options = Options(kind="cron", image="registry.example/md4:0.1.0-cuda", store="s3://bucket/cron")
    return render(load("pydocs-tiny"), options, ["render", "kuberay", *shlex.split(CRON)], NIGHTLY)


if __name__ == "__main__":
    for example in COMMANDS:
        write(example, FOLDER / f"{example}.yaml")
    (FOLDER / "cron.yaml").write_text(cron())
