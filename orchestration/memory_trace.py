"""What one pass of a network allocates, forward and backward, found by running it on tensors without memory.

The real network runs on torch's fake tensors, which have shapes, types and lifetimes but no contents. Every tensor that
an operation puts out is followed until it is freed; what operations use inside themselves is not seen. With contents
unknown every position counts as hidden, the most that a batch can ask for.
"""

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from md4.model import ModelConfig, skeleton
from md4.networks import dit, transformer

_BODY, _HEAD = 0, 1


@dataclass(frozen=True)
class Trace:
    """A pass, moment by moment (T of them, one for each tensor made or freed), in bytes; weights left out."""

    body: np.ndarray  # [T] activations and what their gradients need, inputs included
    head: np.ndarray  # [T] the same of the projection to the vocabulary and the loss
    gradients: np.ndarray  # [T] gradients of weights
    ready: tuple[tuple[int, int], ...]  # (moment, elements) of each weight's gradient as it is complete, in this order


class _Watch(TorchDispatchMode):
    """Notes when the tensors that operations put out are made and freed: (number, bytes, negative when freed)."""

    def __init__(self) -> None:
        super().__init__()
        self.events: list[tuple[int, int]] = []
        self.regions: list[int] = []  # of each storage, by number
        self.region = _BODY
        self._numbers: dict[int, int] = {}  # by the address of a live storage

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        tree_map_only(Tensor, self.number, out)
        return out

    def number(self, tensor: Tensor) -> int:
        """The number of a tensor's memory; it is followed from now on."""
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key not in self._numbers:
            number, size = len(self.regions), storage.nbytes()
            self._numbers[key] = number
            self.regions.append(self.region)
            self.events.append((number, size))
            weakref.finalize(storage, self._freed, key, number, size)
        return self._numbers[key]

    def _freed(self, key: int, number: int, size: int) -> None:
        self._numbers.pop(key, None)
        self.events.append((number, -size))


@contextmanager
def _fake(device: torch.device) -> Iterator[None]:
    """Fake tensors, and a network that takes the ways that it takes on `device`, although the tensors are the CPU's
    (torch built without CUDA has no fake CUDA tensors that learn)."""
    kept = transformer.PRODUCTS_UP_TO
    transformer.rotations.cache_clear()  # a table made outside can't be used here, nor the other way round
    try:
        if device.type != "cpu":
            transformer.PRODUCTS_UP_TO = 0
        with FakeTensorMode():
            yield
    finally:
        transformer.PRODUCTS_UP_TO = kept
        transformer.rotations.cache_clear()


@lru_cache(maxsize=64)
def trace(config: ModelConfig, rows: int, compute: torch.dtype, device: torch.device) -> Trace:
    """One training pass over `rows` examples with products in `compute`, as on `device`."""
    with _fake(device):
        model = skeleton(config, compute, "cpu").train()
        if device.type != "cpu":
            # A GPU's fused attention keeps as much with dropout as without; a CPU writes all products out for it.
            for module in model.modules():
                if isinstance(module, transformer.Attention | dit.Attention):
                    module.rate = 0.0
        parameters = list(model.parameters())
        watch = _Watch()
        weights = {watch.number(p) for p in parameters}
        ready: list[tuple[int, int]] = []
        for p in parameters:
            p.register_post_accumulate_grad_hook(lambda p: ready.append((len(watch.events), p.numel())))
        head = model.network.head
        assert isinstance(head, nn.Module)
        _mark_head(head, watch)
        masks = (model.masks_per_example,) if model.masks_per_example > 1 else ()
        with watch:
            given = {
                "tokens": torch.empty(rows, config.length, dtype=torch.int64),
                "t": torch.empty(rows, dtype=torch.float64),
                "uniforms": torch.empty(rows, *masks, config.length, dtype=torch.float64),
            }
            if config.classes:
                given["labels"] = torch.empty(rows, dtype=torch.int64)
            loss = model(**given).optimised.sum()
            watch.region = _HEAD
            loss.backward()
        grads = {watch.number(p.grad) for p in parameters if p.grad is not None}
        events = list(watch.events)
        return _timeline(events, watch.regions, weights, grads, ready)


def _mark_head(head: nn.Module, watch: _Watch) -> None:
    """What is made from the head's beginning on, until the gradient of what it reads is there, is the head's."""

    def done(_: Tensor) -> None:
        watch.region = _BODY

    def begin(_: nn.Module, given: tuple[Tensor, ...]) -> None:
        watch.region = _HEAD
        if given[0].requires_grad:
            given[0].register_hook(done)

    head.register_forward_pre_hook(begin)


def _timeline(
    events: list[tuple[int, int]], regions: list[int], weights: set[int], grads: set[int], ready: list[tuple[int, int]]
) -> Trace:
    changes = np.zeros((3, len(events)), dtype=np.int64)
    for moment, (number, size) in enumerate(events):
        if number not in weights:
            changes[2 if number in grads else regions[number], moment] = size
    body, head, gradients = changes.cumsum(axis=1)
    last = len(events) - 1
    return Trace(body, head, gradients, tuple((min(moment, last), elements) for moment, elements in ready))
