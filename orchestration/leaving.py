"""`python -m orchestration.leaving SECONDS`: this machine will be taken away in so many seconds.

Tells Ray, and returns when nothing runs here any more, or the time is over. Training then writes a checkpoint and goes
on with fewer workers, replicas of the service move. For what is run before a pod's end: Kubernetes' preStop.
"""

import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

_POLL_SECONDS = 0.5


@dataclass(frozen=True)
class Raylet:
    """Ray's own process on a machine, as its command line tells of it."""

    pid: int
    node: str  # id
    cluster: str  # address of its head


def leave(seconds: float, node: str | None = None) -> bool:
    """Have Ray empty this machine, and wait for that; whether it is empty. node: the id, where it has several nodes.

    Nothing to do where no Ray runs, or its head doesn't answer: then everything ends at once.
    """
    until = time.monotonic() + seconds
    found = [raylet for raylet in _raylets() if node in (None, raylet.node)]
    if not found or not _announce(found[0], seconds):
        return False
    while working := _works(found[0]):
        if time.monotonic() >= until:
            break
        time.sleep(_POLL_SECONDS)
    return not working


def _announce(raylet: Raylet, seconds: float) -> bool:
    """Tell the cluster; whether it took it."""
    from ray._raylet import GcsClient  # type: ignore[attr-defined]
    from ray.core.generated import autoscaler_pb2

    reason = autoscaler_pb2.DrainNodeReason.Value("DRAIN_NODE_REASON_PREEMPTION")  # type: ignore[attr-defined]
    deadline = int((time.time() + seconds) * 1000)
    try:
        client = GcsClient(address=raylet.cluster)
        taken, why = client.drain_node(raylet.node, reason, "the machine will be taken away", deadline)
    except Exception as error:  # Ray's own have no common base; the machine goes all the same
        taken, why = False, str(error)
    if not taken:
        print(f"leaving: the cluster at {raylet.cluster} was not told: {why}", file=sys.stderr)
    return taken


def _raylets() -> Iterator[Raylet]:
    for pid, words in _processes():
        if words[0].endswith("/raylet"):
            facts = dict(word[2:].split("=", 1) for word in words if word.startswith("--") and "=" in word)
            yield Raylet(pid, facts["node_id"], facts["gcs-address"])


def _works(raylet: Raylet) -> bool:
    """Does anything run? Its processes call themselves ray::NAME of an actor or a task, ray::IDLE without one."""
    return any(
        words[0].startswith("ray::") and not words[0].startswith("ray::IDLE") and _parent(pid) == raylet.pid
        for pid, words in _processes()
    )


def _processes() -> Iterator[tuple[int, list[str]]]:
    """Number and command line of everything that this process may see."""
    for file in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = file.read_bytes().decode(errors="replace").rstrip("\0").split("\0")
        except OSError:  # it has ended since
            continue
        yield int(file.parent.name), words


def _parent(pid: int) -> int | None:
    try:
        status = Path(f"/proc/{pid}/status").read_text(errors="replace")
    except OSError:
        return None
    return next(int(line.split()[1]) for line in status.splitlines() if line.startswith("PPid:"))


if __name__ == "__main__":
    leave(float(sys.argv[1]))
