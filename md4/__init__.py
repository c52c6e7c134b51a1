"""Masked diffusion on discrete data: schedules, objectives, networks, samplers. PyTorch only.

    import md4
    model = md4.load("exports/mine")

Nothing is imported before it is asked for: whoever prepares data needs no PyTorch.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from md4.weights import Pretrained, load

__all__ = ["Pretrained", "load"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from md4 import weights

    return getattr(weights, name)
