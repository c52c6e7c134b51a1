"""A Ray cluster of several nodes on this machine, whose processes can be found and killed one by one.

Whoever starts the nodes does not join the cluster: the tests' own Ray, if there is one, goes on undisturbed beside it.
"""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil

from orchestration.cluster import ENVIRONMENT

ROOT = Path(__file__).resolve().parents[1]
_HEAD_BYTES, _NODE_BYTES = 150 << 20, 80 << 20  # of their object stores


def set_environment(folder: Path | None = None) -> None:
    """For Ray and all processes that it starts from here; before anything imports Ray.

    folder: where its sessions go, apart from other clusters'. A short path: sockets lie below it. None: where they
        always do.
    """
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    os.environ |= {
        "DS_ACCELERATOR": "cpu",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(ROOT),  # what is tested is the code beside this
        "RAY_AUTH_MODE": "disabled",
    }
    if folder is not None:
        os.environ["RAY_TMPDIR"] = str(folder)


class Nodes:
    """A head without CPUs and nodes of one CPU, each of which holds one worker. Use from the main thread alone, and
    after `set_environment`."""

    def __init__(self, count: int):
        from ray.cluster_utils import Cluster

        self._cluster = Cluster()
        self._add(num_cpus=0, include_dashboard=False, object_store_memory=_HEAD_BYTES)
        self.address: str = self._cluster.address  # type: ignore[assignment]
        self._nodes: list[Any] = []
        self.ensure(count)

    def ensure(self, count: int) -> None:
        """Add nodes until there are so many; takes away those that are too many."""
        while len(self._nodes) < count:
            self.add()
        while len(self._nodes) > count:
            self._remove(self._nodes[-1])

    def add(self, **environment: str) -> Any:
        """Start a node, whose processes have these in their environment; returns when the cluster knows it."""
        self._nodes.append(self._add(num_cpus=1, object_store_memory=_NODE_BYTES, env_vars=environment))
        return self._nodes[-1]

    def workers(self) -> list[int]:
        """Processes in which Ray Train's workers live."""
        return [pid for node in self._nodes for pid in _workers_of(node)]

    def kill_node_of(self, worker: int) -> None:
        """The node that a worker is on is gone."""
        self.kill(next(node for node in self._nodes if worker in _workers_of(node)))

    def kill(self, node: Any) -> None:
        """SIGKILL to all of a node, its raylet first, as when a machine loses power. Nothing if it is gone already."""
        if node not in self._nodes:
            return
        below = _below(node)
        for process in [_raylet(node), *below]:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        self._remove(node)

    def drain(self, node: Any, seconds: int) -> None:
        """Announce that a node will be taken away."""
        command = [sys.executable, "-m", "ray.scripts.scripts", "drain-node", "--address", self.address]
        command += ["--node-id", node.node_id, "--reason", "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", "spot"]
        command += ["--deadline-remaining-seconds", str(seconds)]
        subprocess.run(command, check=True, capture_output=True, timeout=60)

    def close(self) -> None:
        """End all of it, stopped processes too."""
        remaining = [process for node in self._nodes for process in _below(node)]
        with suppress(Exception):  # of processes that are gone already
            self._cluster.shutdown()
        for process in remaining:
            with suppress(psutil.NoSuchProcess):
                process.kill()

    def _add(self, **facts: Any) -> Any:
        handler = signal.getsignal(signal.SIGTERM)
        node = self._cluster.add_node(**facts)
        signal.signal(signal.SIGTERM, handler)  # Ray puts its own there, which waits half a minute
        return node

    def _remove(self, node: Any) -> None:
        self._nodes.remove(node)
        self._cluster.remove_node(node, allow_graceful=False)


@contextmanager
def nodes(count: int) -> Iterator[Nodes]:
    """A cluster of so many nodes, ended with the block."""
    set_environment()
    cluster = Nodes(count)
    try:
        yield cluster
    finally:
        cluster.close()


def _raylet(node: Any) -> psutil.Process:
    (info,) = node.all_processes["raylet"]
    return psutil.Process(info.process.pid)


def _below(node: Any) -> list[psutil.Process]:
    try:
        return _raylet(node).children(recursive=True)
    except (psutil.NoSuchProcess, KeyError, ValueError):
        return []


def _workers_of(node: Any) -> list[int]:
    found = []
    for process in _below(node):
        with suppress(psutil.Error):
            if "RayTrainWorker" in " ".join(process.cmdline()):
                found.append(process.pid)
    return found


def signal_all(processes: Iterable[int], number: signal.Signals) -> None:
    """Send a signal to those that are still there."""
    for process in processes:
        with suppress(ProcessLookupError):
            os.kill(process, number)


def wait_until_gone(processes: Iterable[int], seconds: float = 20) -> None:
    """TimeoutError if one of them is still there by then."""
    end, left = time.monotonic() + seconds, list(processes)
    while left := [pid for pid in left if psutil.pid_exists(pid) and psutil.Process(pid).status() != "zombie"]:
        if time.monotonic() > end:
            raise TimeoutError(f"processes {left} did not end within {seconds:.0f} s")
        time.sleep(0.05)
