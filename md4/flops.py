"""How many floating-point operations a network's products take, counted where they are called.

Counted are matrix products, convolutions and attention, 2 operations for each multiplication and addition, as
`torch.utils.flop_counter` does; but at the functions that Python calls, not at the kernels behind them. So it does not
matter which kernel attention ends in (not all of them are known to torch's counter), and one real pass can be counted
on the way, at no cost worth naming.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from md4.masked_loss import PLAIN_UP_TO, Head

TRAINING = 3  # times the operations of a forward pass: the backward pass makes two products for each of its products

_PRODUCTS = {torch.matmul, torch.mm, torch.bmm, Tensor.matmul, Tensor.__matmul__, Tensor.mm, Tensor.bmm}
_WITH_SUM = {torch.addmm, torch.baddbmm, Tensor.addmm}  # the product's factors come second and third


class ForwardFlops(TorchFunctionMode):
    """Counts the forward products that are called inside `with`; `total` has them."""

    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func is F.linear or (func in _PRODUCTS and args[1].ndim > 1):
            self.total += 2 * result.numel() * args[0].shape[-1]
        elif func in _WITH_SUM:
            self.total += 2 * result.numel() * args[1].shape[-1]
        elif func is F.scaled_dot_product_attention:
            query, key, value = args[:3]
            self.total += 2 * query.numel() * key.shape[-2] + 2 * result.numel() * value.shape[-2]
        elif func in (F.conv1d, F.conv2d, torch.conv1d, torch.conv2d):
            self.total += 2 * result.numel() * math.prod(args[1].shape[1:])
        return result


class PassFlops:
    """The operations of one pass of `network`, its head apart from its body.

    with PassFlops(network) as flops: ... one forward pass of `rows` examples ...
    flops.of_training(rows, examples, projected)
    """

    def __init__(self, network: nn.Module):
        self._head = getattr(network, "head", None)
        self._chunked = isinstance(self._head, Head) and self._head.out_features > PLAIN_UP_TO
        self._counter = ForwardFlops()
        self._before = self._of_head = 0

    def __enter__(self) -> "PassFlops":
        self._hooks = []
        if self._chunked and self._head is not None:
            self._hooks = [
                self._head.register_forward_pre_hook(self._enter_head),
                self._head.register_forward_hook(self._leave_head),
            ]
        self._counter.__enter__()
        return self

    def __exit__(self, *raised: Any) -> None:
        self._counter.__exit__(*raised)
        for hook in self._hooks:
            hook.remove()

    def _enter_head(self, *_: Any) -> None:
        self._before = self._counter.total

    def _leave_head(self, *_: Any) -> None:
        self._of_head += self._counter.total - self._before

    def of_training(self, rows: int, examples: float, hidden: float) -> float:
        """Operations of training on `examples`, of which `rows` were in the pass that was counted.

        hidden: positions of those examples, all masked copies taken together, at which something is predicted. Where
        the loss projects those alone, the others cost nothing; where it computes again what it did not keep, that is
        not counted: these are the operations that the model needs.
        """
        body = (self._counter.total - self._of_head) / rows * examples
        if not self._chunked or self._head is None:
            return TRAINING * body
        return TRAINING * (body + 2 * self._head.in_features * self._head.out_features * hidden)
