"""Masked diffusion on discrete data: schedules, objectives, networks, samplers. PyTorch only.

    import md4
    model = md4.load("exports/mine")

Nothing is imported before it is asked for: whoever prepares data needs no PyTorch.
"""

import os
from typing import TYPE_CHECKING, Any

# MKL's products of a row have the same bits whatever the number of rows beside it; read at its first product. It costs
# nothing that can be measured. Without it, Intel's processors take other kernels for few rows.
os.environ.setdefault("MKL_CBWR", "AUTO,STRICT")

if TYPE_CHECKING:
    from md4.weights import Pretrained, load

__all__ = ["Pretrained", "load"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from md4 import weights

    return getattr(weights, name)
