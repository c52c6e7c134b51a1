"""Standing still is noticed, the missing worker named, and the waiting ones end; in real process groups."""

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from orchestration.watchdog import EXIT_CODE

ROOT = Path(__file__).resolve().parents[2]
WORLD = 3


def launch(how: str, patience: float = 60) -> list[tuple[int | None, str]]:
    """Exit status (None: still there, and ended now) and output of each worker."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    common = {**os.environ, "WORLD_SIZE": str(WORLD), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    command = [sys.executable, "-m", "tests.orchestration.watchdog_program", how]
    workers = [
        subprocess.Popen(command, cwd=ROOT, env={**common, "RANK": str(rank)}, stdout=subprocess.PIPE, text=True)
        for rank in range(WORLD)
    ]
    found: list[tuple[int | None, str]] = []
    stuck = {"sleep": 1, "stop": 1, "stop0": 0}.get(how)
    for rank in sorted(range(WORLD), key=lambda rank: rank == stuck):  # the one that hangs last
        worker = workers[rank]
        if rank == stuck and worker.poll() is None:
            worker.send_signal(signal.SIGKILL)
            output, _ = worker.communicate(timeout=patience)
            found.append((None, output))
        else:
            output, _ = worker.communicate(timeout=patience)
            found.append((worker.returncode, output))
    return found


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ("sleep", "worker 1 stays at the update of step 2; the others wait at the sum of step 3"),
        ("stop", "worker 1 stays at the update of step 2, and its process is silent for"),
        ("stop0", "worker 0 has not answered for"),
    ],
)
def test_who_is_missing_is_named_and_the_waiting_end(how, said):
    *waiting, stuck = ended = launch(how)
    # When the first ends (a worker whose loop alone hangs does too), the others may fail before their time is up.
    assert all(status for status, _ in waiting), ended
    assert stuck[0] != 0, ended
    assert EXIT_CODE in [status for status, _ in ended]
    assert all(said in output for status, output in ended if status == EXIT_CODE), ended


@pytest.mark.parametrize("how", ["end", "slow"])
def test_a_group_that_gets_on_is_left_alone(how):
    assert launch(how) == [(0, f"worker {rank} done\n") for rank in range(WORLD)]
