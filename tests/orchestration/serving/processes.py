"""The processes of a service on a Ray cluster that this process has started."""

import re

import psutil

_TITLE = re.compile(r"ray::(ServeReplica:[\w:-]+|ServeController|ProxyActor)")


def processes() -> dict[psutil.Process, str]:
    """Controller, proxy, gateways and replicas, by what Ray calls them."""
    found = {}
    for process in psutil.Process().children(recursive=True):
        try:
            title = _TITLE.match(" ".join(process.cmdline()))
        except psutil.Error:
            continue
        if title:
            found[process] = title[1]
    return found


def replicas() -> list[psutil.Process]:
    """Those that hold models."""
    return [process for process, title in processes().items() if title.endswith(":Engine")]
