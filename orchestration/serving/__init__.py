"""The sampling service. For programs on the same Ray cluster: `from orchestration.serving import Client`."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from orchestration.serving.client import Client as Client

__all__ = ["Client"]


def __getattr__(name: str) -> Any:
    # Not imported before it is asked for: Ray Serve takes seconds, and `orchestration.config` comes by here.
    if name == "Client":
        from orchestration.serving.client import Client

        return Client
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
