"""Starting or joining Ray, the same way for every command."""

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager

from md4.errors import UserError

# Read by Ray when it is imported or when its processes start, hence set before; a user's own settings win.
ENVIRONMENT = {
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",  # a dead worker is seen within a second (default 2)
    "RAY_TRAIN_WORKER_HEALTH_CHECK_TIMEOUT_S": "60",  # a stopped process (default 600)
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "20",  # after a node's death Ray tries the old size first (default 60)
    "RAY_TRAIN_PREEMPTION_POLL_INTERVAL_S": "1",  # default 5
    "RAY_TRAIN_ENABLE_NCCL_HANG_DETECTOR": "",  # off by default, and then it only observes; filled in
    "RAY_TRAIN_NCCL_RAS_ACTION": "fail",
    "RAY_TRAIN_NCCL_RAS_CONFIRM_DURATION_S": "60",
    # A node that is gone is given up after 4 s (default 5 + 5 * 3 + ...); of clusters that this process starts.
    "RAY_health_check_initial_delay_ms": "1000",
    "RAY_health_check_period_ms": "1000",
    "RAY_health_check_timeout_ms": "1000",
    "RAY_health_check_failure_threshold": "4",
    "RAY_SERVE_USE_GRPC_BY_DEFAULT": "1",  # between the processes of the service: a request costs less
    "RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": "60",  # a busy machine needs longer than 5 s to start a process
    "TORCH_PROCESS_GROUP_SHUTDOWN_TIMEOUT_S": "3",  # a group that lost a worker is not put in order (default 30)
    "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",  # else every line of a worker is printed twice
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_DATA_DISABLE_PROGRESS_BARS": "1",
    # glibc gives freed memory back to the system after every step and faults it in again: 2-14 % of a CPU step.
    "MALLOC_TRIM_THRESHOLD_": "4000000000",
    "MALLOC_MMAP_THRESHOLD_": "4000000000",
    "MALLOC_TOP_PAD_": "268435456",
    "DS_ACCELERATOR": "",  # filled in
}
_OF_WORKERS = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "MALLOC_TOP_PAD_")
_OBJECT_STORE_BYTES = 512 << 20


def set_environment() -> None:
    """Settings of Ray and its processes, unless they are set already; before Ray is imported."""
    import torch

    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    cuda = torch.cuda.is_available()
    # Without this DeepSpeed prints a warning in every process that has no GPU.
    os.environ["DS_ACCELERATOR"] = os.environ["DS_ACCELERATOR"] or ("cuda" if cuda else "cpu")
    # It looks for a program of NCCL's in every new group of workers.
    watch = "RAY_TRAIN_ENABLE_NCCL_HANG_DETECTOR"
    os.environ[watch] = os.environ[watch] or str(int(cuda))


def worker_environment() -> dict[str, str]:
    """What the workers of a cluster that was started by somebody else have to be told."""
    return {name: os.environ[name] for name in _OF_WORKERS}


def start_local(num_cpus: int, object_store_bytes: int = _OBJECT_STORE_BYTES) -> None:
    """Start a private Ray on this machine with `num_cpus` logical CPUs and this machine's GPUs.

    Logical CPUs only bound how many workers and tasks run at once, so they may exceed the cores: a reading task
    beside two training workers needs a slot more than its share of a core. Token authentication, which Ray turns on
    by default, guards ports that a local cluster does not open; it stays off unless RAY_AUTH_MODE says otherwise.
    """
    set_environment()
    os.environ.setdefault("RAY_AUTH_MODE", "disabled")
    import ray

    ray.init(
        address="local",
        num_cpus=num_cpus,
        include_dashboard=False,
        object_store_memory=object_store_bytes,
        logging_level=logging.ERROR,
        log_to_driver=False,
    )


def join(address: str) -> None:
    """Join a running cluster; UserError when there is none at `address`."""
    set_environment()
    import ray

    try:
        ray.init(address=address, logging_level=logging.ERROR, log_to_driver=False)
    except (ConnectionError, ValueError, RuntimeError) as error:
        raise UserError(f"no Ray cluster answers at address {address!r}: {error}") from error


def address() -> str | None:
    """Of the running cluster that commands join; None where they start one of their own."""
    return os.environ.get("RAY_ADDRESS") or None


def gpus() -> float:
    """Of the cluster that this process is in, on any of its machines."""
    import ray

    return ray.cluster_resources().get("GPU", 0.0)


@contextmanager
def cluster(num_cpus: int) -> Iterator[bool]:
    """Ray for the length of a command: the one already running in this process, else the cluster that RAY_ADDRESS
    names, else a private local one. Gives whether it is that last one, which ends with the command."""
    set_environment()
    import ray

    if ray.is_initialized():
        yield False
        return
    running = address()
    join(running) if running else start_local(num_cpus)
    try:
        yield running is None
    finally:
        ray.shutdown()
