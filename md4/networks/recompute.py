"""Activation checkpointing: memory for time."""

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


def run_block(block: nn.Module, recompute: bool, *args: Tensor | None) -> Tensor:
    """`block(*args)`; with `recompute` its activations are not kept for the backward pass but computed again there."""
    if recompute and torch.is_grad_enabled():
        return checkpoint(block, *args, use_reentrant=False)
    return block(*args)
