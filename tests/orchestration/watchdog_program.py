"""Run by every process of a bare gloo group (see test_watchdog.py): a loop of collectives that one worker leaves.

    python -m tests.orchestration.watchdog_program HOW

HOW: sleep (a thread hangs), stop (a process is stopped), stop0 (that of the first worker), or end (nothing happens).
"""

import os
import signal
import sys
import time

import torch
import torch.distributed as dist

from orchestration.watchdog import Watchdog

STEPS = 4


def main(how: str) -> None:
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    watchdog = Watchdog(3.0, lambda reason: print(f"worker {rank}: {reason}", flush=True))
    for step in range(1, STEPS + 1):
        watchdog.at("the sum", step)
        dist.all_reduce(torch.ones(1))
        watchdog.at("the update", step)
        watchdog.stepped()
        if step == 2 and rank == 1 and how == "sleep":
            time.sleep(600)
        if step == 2 and rank == int(how == "stop") and how.startswith("stop"):
            time.sleep(1.5)  # the others have heard of this step
            os.kill(os.getpid(), signal.SIGSTOP)
    watchdog.close()
    print(f"worker {rank} done", flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
