"""Starting weights of a network: a function of the seed and each parameter's name alone."""

import math
from collections.abc import Callable, Set

import torch
from torch import nn

from md4 import noise

# A standard normal cut at two deviations keeps this share of its deviation.
CUT_DEVIATION = 0.87962566103423978


@torch.no_grad()
def initialise(
    network: nn.Module, seed: int, zeros: Set[str], variance: Callable[[str], float] = lambda role: 1.0
) -> None:
    """Set every parameter `module.role.weight` or `module.role.bias` of `network` by its role.

    Roles `*norm`: 1. Roles in `zeros`, and all biases: 0. Roles `*embed`: normal of variance 1/width. All else
    (matrices and convolutions, output first): truncated normal of variance `variance(role)` / fan_in (LeCun).
    """
    for name, parameter in network.named_parameters():
        generator = torch.Generator(parameter.device).manual_seed(noise.key(seed, "init", name) % 2**63)
        *_, role, kind = name.split(".")
        if kind == "bias" or role in zeros:
            nn.init.zeros_(parameter)
        elif role.endswith("norm"):
            nn.init.ones_(parameter)
        elif role.endswith("embed"):
            nn.init.normal_(parameter, std=parameter.shape[1] ** -0.5, generator=generator)
        else:
            std = math.sqrt(variance(role) / parameter[0].numel()) / CUT_DEVIATION
            nn.init.trunc_normal_(parameter, std=std, a=-2 * std, b=2 * std, generator=generator)
