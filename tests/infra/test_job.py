"""The files of a rendered job, run as its pods run them, give the run that the command gives here."""

import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from infra.kuberay import places
from infra.kuberay.options import Options
from infra.render import render
from orchestration.config import load
from orchestration.runs import Run
from orchestration.train import train
from tests.orchestration.conftest import tiny_settings, write_corpus


@pytest.mark.slow
@pytest.mark.ray
def test_a_rendered_job_is_the_run_that_it_is_here(ray_cluster, tmp_path, monkeypatch):
    volume, mounted = tmp_path / "volume", tmp_path / "files"
    volume.mkdir()
    mounted.mkdir()
    monkeypatch.chdir(volume)
    write_corpus(Path("words.txt"))
    settings = tiny_settings(Path("words.txt"), Path("data"), Path("runs"))
    settings += ["train.steps=6", "checkpoint.every=3", "evaluation.every=0", "train.device=cpu"]
    monkeypatch.setattr(places, "MOUNT", str(volume))
    options = Options(kind="job", image="registry.example/md4:0.1.0", storage="pvc:md4")
    held, _, job = yaml.safe_load_all(render(load("pydocs-tiny", settings), options, []))
    for name, text in held["data"].items():
        (mounted / name).write_text(text)
    mounted.chmod(0o555)  # as the pods have it
    words = shlex.split(job["spec"]["entrypoint"].replace("/etc/md4", str(mounted)))
    done = subprocess.run(
        [sys.executable, *words[1:]], cwd=tmp_path, env={**os.environ}, capture_output=True, text=True, timeout=200
    )
    assert done.returncode == 0, done.stdout + done.stderr
    here = train(load("pydocs-tiny", [*settings, "name=here"]), report=lambda _: None).run
    there = Run(volume / "runs" / "tiny")
    figures = [[row["bits_per_token"] for row in run.metrics("train")] for run in (here, there)]
    assert len(figures[0]) == 6
    assert figures[0] == figures[1]
