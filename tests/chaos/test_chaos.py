"""The tool itself: what it must not overlook, and (slow) that it runs."""

import json
import os
import re
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch

from orchestration import checkpoints
from orchestration.config import load
from orchestration.content_sums import content_sum
from orchestration.runs import Run
from orchestration.tensor_files import write
from pipelines.storage import Folder
from tests.chaos import judge
from tests.chaos.__main__ import main
from tests.chaos.attempts import Attempts, Recovery, Trouble
from tests.chaos.cases import CASES, EVERY, STEPS, random_kills
from tests.chaos.disk import limit_files
from tests.nodes import ROOT
from tests.s3 import BUCKET

KINDS = ("weights", "ema", "exp_avg", "exp_avg_sq")


def make_run(folder: Path, steps: int = 3, shift: float = 0.0, rows: str = "ab") -> Run:
    """A run's folder with metrics and a final checkpoint, made without training."""
    config = load("pydocs-tiny", [f"runs={folder}", f"train.steps={steps}", "checkpoint.keep=2"])
    run = Run.create(config)
    lines = [
        {"kind": "train", "step": step, "ledger": f"{rows}{step}", "bits_per_token": 2.0 + shift}
        for step in range(1, steps + 1)
    ]
    run.metrics_file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    for step in range(1, steps + 1):
        write_checkpoint(run, step, shift)
    return run


def write_checkpoint(run: Run, step: int, shift: float) -> None:
    folder = run.checkpoints / f"step-{step:08d}-aaaaaa"
    tensors = {"a": torch.arange(4.0) + shift, "b": torch.ones(3, 2)}
    sums = {name: int(content_sum(tensor)) for name, tensor in tensors.items()}
    manifest = {
        "format": checkpoints.FORMAT, "step": step, "config": {}, "writers": 1, "kinds": list(KINDS),
        "tensors": {
            name: {"shape": list(tensor.shape), "writer": 0, "sums": dict.fromkeys(KINDS, sums[name])}
            for name, tensor in tensors.items()
        },
        "files": {
            (file := checkpoints.file_name(kind, 0, 1)): write(folder, file, tensors) for kind in KINDS
        },
    }  # fmt: skip
    folder.create(checkpoints.MANIFEST, json.dumps(manifest).encode())


def test_equal_runs_are_equal_and_others_are_not(tmp_path):
    one, same = make_run(tmp_path / "one"), make_run(tmp_path / "same")
    assert judge.compare(one, same, exact=True) == "ledger equal, weights bit-equal"
    near = make_run(tmp_path / "near", shift=1e-6)
    with pytest.raises(Trouble, match="tensors of weights differ, the first is a"):
        judge.compare(near, one, exact=True)
    assert "weights within" in judge.compare(near, one, exact=False)
    with pytest.raises(Trouble, match="apart"):
        judge.compare(make_run(tmp_path / "far", shift=1e-3), one, exact=False)
    with pytest.raises(Trouble, match="ledger differs from step 1"):
        judge.compare(make_run(tmp_path / "rows", rows="ba"), one, exact=True)
    (one.checkpoints / "step-00000003-aaaaaa").remove(checkpoints.MANIFEST)
    with pytest.raises(Trouble, match="last sound checkpoint is of step"):
        judge.compare(one, same, exact=True)


def attempts_of(run: Run, told: dict[str, int]) -> Attempts:
    made = Attempts.__new__(Attempts)
    made.path, made.damaged, made.told = run.path, set(), {name: (step, 0.0) for name, step in told.items()}
    return made


def test_a_lost_or_damaged_checkpoint_is_found(tmp_path):
    run = make_run(tmp_path)
    names = {f"step-{step:08d}-aaaaaa": step for step in (1, 2, 3)}
    assert judge.check_checkpoints(attempts_of(run, names)) == 3
    (run.checkpoints / "step-00000001-aaaaaa").remove_all()  # superseded by two newer ones, as many as are kept
    assert judge.check_checkpoints(attempts_of(run, names)) == 3
    (run.checkpoints / "step-00000002-aaaaaa").remove(checkpoints.MANIFEST)
    with pytest.raises(Trouble, match="told of, and is gone; 1 newer"):
        judge.check_checkpoints(attempts_of(run, names))
    file = run.path / "checkpoints/step-00000003-aaaaaa" / checkpoints.file_name("ema", 0, 1)
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(Trouble, match=r"ema-00000-of-00001\.safetensors has"):
        judge.check_checkpoints(attempts_of(run, {}))


def test_lost_steps():
    assert Recovery(0.0, finished=37, begun=30).lost == 7
    assert Recovery(0.0, finished=37).lost == 0


def test_all_random_kills_fit_into_the_run():
    (case,) = (one for one in CASES if one.run is random_kills)
    assert case.steps(3) == STEPS
    assert case.steps(25) > 25 * EVERY
    assert len({one.name for one in CASES}) == len(CASES) == 25
    assert all(one.about for one in CASES)


def test_a_request_is_held_until_it_is_let_go_or_lost(s3):
    folder = Folder(f"s3://{BUCKET}/x")
    for passes in (True, False):
        hold = s3.hold(rf"^PUT /{BUCKET}/x/held-{passes}")
        thread = threading.Thread(target=folder.write, args=(f"held-{passes}", b"data"))
        thread.start()
        assert hold.came.wait(10)
        folder.write(f"other-{passes}", b"data")  # only that one waits
        assert f"x/held-{passes}" not in s3.objects()
        hold.release(passes)
        thread.join(10)
        assert f"x/held-{passes}" in s3.objects()  # a lost request is made again
    puts = [line for line in s3.asked if line.startswith(f"PUT /{BUCKET}/x/held-False")]
    assert len(puts) == 1  # the lost one is not among those that came to the server


def test_a_limit_on_files_makes_writes_fail(tmp_path):
    program = (
        "import sys; sys.stdin.readline()\n"
        "try:\n    open(sys.argv[1], 'wb', buffering=0).write(bytes(100)) == 100 or sys.exit(3)\n"
        "except OSError: sys.exit(3)\n"
    )
    for limit, status in ((16, 3), (None, 0)):
        process = subprocess.Popen([sys.executable, "-c", program, str(tmp_path / "file")], stdin=subprocess.PIPE)
        limit_files(process.pid, limit)
        process.communicate(b"\n")
        assert process.returncode == status


def chaos(*arguments: str) -> subprocess.CompletedProcess[str]:
    """In a process of its own: it has a cluster of its own."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "AWS_"))}
    command = [sys.executable, "-m", "tests.chaos", *arguments]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)


def test_mistakes_end_before_anything_starts(capsys):
    assert main(["--only", "no such case"]) == 2
    assert "--list" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_a_short_form():
    done = chaos("--only", "leader in", "--only", "commit after", "--only", "flipped bit, new", "--patience", "200")
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"PASS  leader in a step +\d+ s  recovery \d+\.\d s  lost \d+ steps  ledger equal", done.stdout)
    assert done.stdout.splitlines()[-1] == "3 passed, 0 failed"
