"""Attempts, with real child processes; waits and limits by an injected clock."""

import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from orchestration.jobs.attempts import Attempts
from orchestration.jobs.spec import Job, Retry

ENDLESS = "import time\nprint('ready', flush=True)\ntime.sleep(300)"
DEAF = "import signal\nfor one in (2, 15): signal.signal(one, signal.SIG_IGN)\n" + ENDLESS


class Clock:
    """Seconds that pass when somebody waits for them; waiting itself takes none."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def attempts(programs: list[str], clock=None, progress=lambda: None, end_seconds=20.0, **facts):
    """(Attempts whose n-th child runs the n-th program, what is said, the waits between them)."""
    job = Job.model_validate({"verb": "train", "name": "x", **facts})
    said: list[str] = []
    todo = iter(programs)
    found = Attempts(
        job,
        lambda: [sys.executable, "-c", next(todo)],
        os.environ,
        said.append,
        progress,
        clock or time.monotonic,
        end_seconds,
    )
    return found, said


def no_waits(found: Attempts, clock: Clock) -> list[float]:
    """Let the clock jump over the waits between attempts; gives them."""
    waits: list[float] = []
    whole = found._stop.wait

    def wait(seconds: float | None = None) -> bool:
        assert seconds is not None
        waits.append(seconds)
        clock.now += seconds
        return whole(0)

    found._stop.wait = wait  # type: ignore[method-assign]
    return waits


def test_failures_are_tried_again_with_growing_waits(tmp_path):
    clock = Clock()
    retry = Retry(attempts=5, first_s=10, longest_s=25)
    found, said = attempts(["exit(1)", "exit(3)", "exit(1)", "exit(0)"], clock, retry=retry)
    waits = no_waits(found, clock)
    assert found.run() == 0
    assert waits == [10, 20, 25]
    assert said[0] == "attempt 1 failed (exit code 1), failure 1 of 5; the next in 10 s"
    assert said[1] == "attempt 2 failed (exit code 3), failure 2 of 5; the next in 20 s"


def test_so_many_failures_in_a_row_end_the_job_with_the_last_code(tmp_path):
    clock = Clock()
    found, said = attempts(["exit(1)"] * 2 + ["exit(7)"], clock, retry=Retry(attempts=3, first_s=1))
    waits = no_waits(found, clock)
    assert found.run() == 7
    assert waits == [1, 2]
    assert said[-1] == "attempt 3 failed (exit code 7): 3 in a row, no more"


def test_a_mistake_of_the_users_is_not_tried_again(tmp_path):
    found, said = attempts(["exit(2)"], retry=Retry(attempts=5, first_s=0))
    assert found.run() == 2
    assert said == []


def test_the_budget_counts_failed_attempts_and_waits(tmp_path):
    clock = Clock()
    retry = Retry(attempts=9, first_s=10, longest_s=10, budget_s=250)
    found, said = attempts(["exit(1)"] * 9, clock, retry=retry)
    wait_for = found._wait

    def takes_time(child):
        clock.now += 100
        return wait_for(child)

    found._wait = takes_time  # type: ignore[method-assign]
    waits = no_waits(found, clock)
    assert found.run() == 1
    assert waits == [10, 10]  # 100, 10, 100, 10, 100: then 320 s are spent
    assert "would exceed the budget of 250 s for failures (320 s are spent)" in said[-1]


def test_progress_forgives_earlier_failures(tmp_path):
    clock = Clock()
    steps = iter([None, 100, 200, 200, 200])
    found, said = attempts(
        ["exit(1)"] * 5, clock, lambda: next(steps), retry=Retry(attempts=3, first_s=1, longest_s=100)
    )
    waits = no_waits(found, clock)
    assert found.run() == 1
    # The third attempt got further than the second: its failure is the first again.
    assert waits == [1, 2, 1, 2]
    assert said[-1].startswith("attempt 5 failed (exit code 1): 3 in a row")


def test_a_child_killed_by_a_signal_has_failed(tmp_path):
    found, _ = attempts(["import os, signal; os.kill(os.getpid(), signal.SIGKILL)"], retry=Retry(attempts=1))
    assert found.run() == 128 + signal.SIGKILL


def test_over_its_time_limit_a_command_ends_as_by_ctrl_c(tmp_path):
    note = tmp_path / "note"
    program = f"import time\ntry:\n open({str(note)!r}, 'w').write('begun'); time.sleep(300)\n"
    program += f"except KeyboardInterrupt:\n open({str(note)!r}, 'w').write('ended well'); raise SystemExit(130)"
    begun = time.monotonic()

    def clock() -> float:  # an hour passes when the child is at work
        return 3600.0 if note.exists() and note.read_text() else 0.0

    found, said = attempts([program], clock, time_limit_s=3600.0)
    assert found.run() == 124
    assert note.read_text() == "ended well"
    assert said == ["over its time limit of 3600 s: the command is asked to end"]
    assert time.monotonic() - begun < 15


def test_what_does_not_end_is_killed(tmp_path):
    found, said = attempts([DEAF], time_limit_s=0.5, end_seconds=0.3)
    assert found.run() == 124
    assert said[-1].endswith("and is killed")


def test_time_spent_waiting_counts_for_the_limit(tmp_path):
    clock = Clock()
    found, said = attempts(["exit(1)"] * 3, clock, retry=Retry(attempts=9, first_s=60, longest_s=60), time_limit_s=100)
    waits = no_waits(found, clock)
    assert found.run() == 124
    assert waits == [60, 40]
    assert said[-1].startswith("over its time limit of 100 s")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_is_passed_on_and_nothing_is_tried_again(tmp_path, number):
    program = "import sys, time\ntry:\n time.sleep(300)\nexcept KeyboardInterrupt:\n sys.exit(130)"
    code = (
        "import os, sys\nfrom orchestration.jobs.attempts import Attempts, say\n"
        "from orchestration.jobs.spec import Job\n"
        f"job = Job(verb='train', name='x')\n"
        f"command = [sys.executable, '-c', {('print(1, flush=True)' + chr(10) + program)!r}]\n"
        "sys.exit(Attempts(job, lambda: command, os.environ, say).run())"
    )
    runner = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    assert runner.stdout is not None
    assert runner.stdout.readline() == "1\n"
    runner.send_signal(number)
    _, said = runner.communicate(timeout=30)
    assert runner.returncode == 143
    assert said == "job: stopped: the command is asked to end\n"


def test_a_signal_ends_the_wait_between_attempts(tmp_path):
    found, _ = attempts(["exit(1)", ENDLESS], retry=Retry(attempts=3, first_s=300))
    timer = threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGTERM))
    begun = time.monotonic()
    timer.start()
    assert found.run() == 143
    assert time.monotonic() - begun < 20
