"""`python -m orchestration.leaving SECONDS`: this machine will be taken away in so many seconds.

Tells Ray, and returns when nothing runs here any more, or the time is over. Training then writes a checkpoint and goes
on with fewer workers, replicas of the service move. For what is run before a pod's end: Kubernetes' preStop.
"""

import os
import socket
import sys
import time
from pathlib import Path

_POLL_SECONDS = 0.5
_ANSWER_SECONDS = 5.0  # of a head that may be gone itself


def leave(seconds: float, node: str | None = None) -> bool:
    """Have Ray empty this machine's node, and wait for that; whether it is. node: its id, where an address has several.

    Nothing where the cluster at RAY_ADDRESS doesn't answer or doesn't know this machine: then it ends with it.
    """
    until = time.monotonic() + seconds
    if not _announce(os.environ["RAY_ADDRESS"], seconds, node):
        return False
    while busy := any(_work()):
        if time.monotonic() >= until:
            break
        time.sleep(_POLL_SECONDS)
    return not busy


def _announce(address: str, seconds: float, node: str | None) -> bool:
    """Tell the cluster; whether it took it."""
    from ray._raylet import GcsClient  # type: ignore[attr-defined]
    from ray.core.generated import autoscaler_pb2

    try:
        client = GcsClient(address=address)
        node = node or _own(client)
        if node is None:
            return False
        reason = autoscaler_pb2.DrainNodeReason.Value("DRAIN_NODE_REASON_PREEMPTION")  # type: ignore[attr-defined]
        deadline = int((time.time() + seconds) * 1000)
        taken, why = client.drain_node(node, reason, "the machine will be taken away", deadline)
        if not taken:
            print(f"leaving: Ray refused: {why}", file=sys.stderr)
        return taken
    except Exception as error:  # Ray's own have no common base; a pod ends all the same
        print(f"leaving: no cluster answers at {address}: {error}", file=sys.stderr)
        return False


def _own(client: object) -> str | None:
    """The id of the node that has this machine's address; None if the cluster has none."""
    addresses = {found[4][0] for found in socket.getaddrinfo(socket.gethostname(), None)}
    for node, info in client.get_all_node_info(timeout=_ANSWER_SECONDS).items():  # type: ignore[attr-defined]
        if info.node_manager_address in addresses and info.state == 0:  # alive
            return node.hex()
    return None


def _work() -> list[str]:
    """Names of Ray's processes on this machine that run something: actors and tasks call themselves ray::NAME."""
    names = []
    for file in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            name = file.read_bytes().split(b"\0")[0].decode(errors="replace")
        except OSError:  # it has ended since
            continue
        if name.startswith("ray::") and not name.startswith("ray::IDLE"):
            names.append(name)
    return names


if __name__ == "__main__":
    leave(float(sys.argv[1]))
