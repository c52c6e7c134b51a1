"""Run by every process of a bare gloo group (see test_watchdog.py): a loop of collectives that one worker leaves.

    python -m tests.orchestration.watchdog_program HOW

HOW: sleep (a thread hangs), stop (a process is stopped), stop0 (that of the first worker), slow (the first step takes
longer than later ones may), or end (nothing happens).
"""

import os
import signal
import sys
import time

import torch
import torch.distributed as dist

from orchestration.watchdog import Watchdog

STEPS = 4
PATIENCE = 3.0  # s


def main(how: str) -> None:
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    watchdog = Watchdog(PATIENCE, lambda reason: print(f"worker {rank}: {reason}", flush=True))
    for step in range(1, STEPS + 1):
        watchdog.at("the sum", step)
        dist.all_reduce(torch.ones(1))
        watchdog.at("the update", step)
        if step == 1 and how == "slow":
            time.sleep(PATIENCE + 1.5)
        watchdog.stepped()
        assert watchdog._stuck() is None
        if step == 2 and rank == 1 and how == "sleep":
            time.sleep(600)
        if step == 2 and rank == int(how == "stop") and how.startswith("stop"):
            time.sleep(1.5)  # the others have heard of this step
            os.kill(os.getpid(), signal.SIGSTOP)
    watchdog.close()
    dist.destroy_process_group()  # a thread of gloo's that outlives the program can abort it
    print(f"worker {rank} done", flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
