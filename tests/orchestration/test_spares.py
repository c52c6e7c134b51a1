"""A process that waits with everything imported is what Ray gives the next actor of the same environment."""

import os
import sys
import time

import psutil
import pytest

from orchestration import spares

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_cluster")]


class Worker:
    def ask(self) -> None:
        spares.ask()

    def facts(self) -> tuple[int, bool]:
        return os.getpid(), "torch._dynamo" in sys.modules


def test_the_next_worker_is_there_already():
    import ray

    start = ray.remote(num_cpus=1, runtime_env={"env_vars": spares.environment()})(Worker).remote
    first = start()
    before = psutil.pids()
    ray.get(first.ask.remote())
    pid, _ = ray.get(first.facts.remote())
    spare = wait_for_idle(before, psutil.Process(pid).ppid())
    ray.kill(first)
    second = start()
    assert ray.get(second.facts.remote()) == (spare, True)
    ray.kill(second)


def wait_for_idle(before: list[int], raylet: int) -> int:
    """The new process of the raylet that has imported everything and waits."""
    end = time.monotonic() + 60
    while time.monotonic() < end:
        for process in psutil.Process(raylet).children():
            if process.pid not in before and " ".join(process.cmdline()).strip() == "ray::IDLE":
                spent = process.cpu_times().user
                time.sleep(1)
                if process.cpu_times().user - spent < 0.1:
                    return process.pid
        time.sleep(0.2)
    raise TimeoutError("no idle process came")
