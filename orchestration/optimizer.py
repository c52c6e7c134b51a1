"""AdamW with an exponential moving average, and the paper's learning-rate rule. PyTorch only."""

import math
from collections.abc import Callable, Iterable
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn


class OptimizerConfig(BaseModel):
    """AdamW, its schedule, clipping and the moving average (MD4, section 5 and released configurations)."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    learning_rate: float = Field(3e-4, gt=0, description="peak learning rate")
    schedule: Literal["cosine", "constant"] = Field("cosine", description="decay after warm-up")
    warmup: int = Field(2000, ge=0, description="steps of linear warm-up; the first update has learning rate 0")
    beta1: float = Field(0.9, ge=0, lt=1)
    beta2: float = Field(0.999, ge=0, lt=1)
    eps: float = Field(1e-8, gt=0)
    weight_decay: float = Field(
        0.0, ge=0, description="decoupled decay, times the learning rate, on every parameter of the network"
    )
    schedule_weight_decay: float = Field(
        0.0,
        ge=0,
        description="the same on genmd4's w, pulling powers to ln 2; the reference has weight_decay there, too",
    )
    clip_norm: float = Field(0.0, ge=0, description="global gradient norm is clipped to this; 0 = off (the paper)")
    ema: float = Field(0.9999, ge=0, lt=1, description="decay of the moving average of the weights; 0 = none")


def learning_rate(step: int, base: float, warmup: int, steps: int, schedule: str = "cosine") -> float:
    """Learning rate of the update made after `step` earlier ones (the first update is step 0).

    base * min(1, step/warmup) * (1 + cos(pi * max(0, step-warmup) / (steps-warmup))) / 2; without the cosine factor
    when `schedule` is "constant". With a warm-up the first update has rate 0.
    """
    rise = min(1.0, step / warmup) if warmup else 1.0
    if schedule == "constant":
        return base * rise
    progress = max(0, step - warmup) / max(1, steps - warmup)
    return base * rise * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))


def parameter_groups(model: nn.Module, options: OptimizerConfig) -> list[dict[str, Any]]:
    """Groups of parameters that the optimizer treats alike: the network's, and a learned schedule's if there is one.

    Groups are told apart by name: what lies below `schedule.` belongs to the schedule.
    """
    named = list(model.named_parameters())
    schedule = [p for name, p in named if name.startswith("schedule.")]
    groups = [
        {"params": [p for name, p in named if not name.startswith("schedule.")], "weight_decay": options.weight_decay},
        {"params": schedule, "weight_decay": options.schedule_weight_decay},
    ]
    return [group for group in groups if group["params"]]


class AdamWithEma(torch.optim.AdamW):
    """AdamW whose state also holds a moving average of each parameter: `ema <- ema + (1 - decay)(p - ema)`.

    The average starts at the initial parameters and has no bias correction (as the reference does). Keeping it in
    the optimizer's state, next to `exp_avg` and `exp_avg_sq`, means that whatever shards or offloads that state
    (ZeRO 0-3) shards the average too, with no second mechanism.

    `ema` is the decay rate; 0 keeps no average.
    """

    def __init__(self, params, *, ema: float = 0.0, **options):
        super().__init__(params, **options)
        for group in self.param_groups:
            group.setdefault("ema", ema)
        self.defaults["ema"] = ema
        self.idle = False  # `step` then changes nothing, whatever gradients there are

    @property
    def state_names(self) -> tuple[str, ...]:
        """Names of the per-element tensors that the state of every parameter holds."""
        averaged = any(group["ema"] for group in self.param_groups)
        return ("exp_avg", "exp_avg_sq", "ema") if averaged else ("exp_avg", "exp_avg_sq")

    @torch.no_grad()
    def materialize(self, group: dict, params: Iterable[Tensor]) -> None:
        """Create the state of those `params` of `group` that have none, as it is before the first update."""
        for p in params:
            state = self.state[p]
            if not state:
                place = p.device if group["fused"] or group["capturable"] else "cpu"
                state["step"] = torch.zeros((), dtype=torch.float32, device=place)
                state["exp_avg"] = torch.zeros_like(p)
                state["exp_avg_sq"] = torch.zeros_like(p)
                if group["ema"]:
                    state["ema"] = p.detach().clone()

    @torch.no_grad()
    def step(self, closure: Callable | None = None):  # type: ignore[override]
        if self.idle:
            return None
        for group in self.param_groups:
            self.materialize(group, group["params"])
        loss = super().step(closure)
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            if group["ema"] and params:
                torch._foreach_lerp_(  # type: ignore[attr-defined]
                    [self.state[p]["ema"] for p in params], params, 1 - group["ema"]
                )
        return loss
