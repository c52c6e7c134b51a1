"""The state of a DeepSpeed engine as canonical tensors by parameter name, whatever the ZeRO stage and worker count.

A ZeRO stage decides which worker holds which *fragment* (a run of elements) of each parameter's float32 weights and
optimizer state. Everything here speaks of fragments, so the rest of the house never sees DeepSpeed's partitions:

    stage 0     every worker holds every parameter whole
    stage 1, 2  parameters are laid end to end in flat groups, a worker holds one contiguous part of each group
    stage 3     every parameter is cut into equal parts, padded at the end, one for each worker

A tensor *kind* is "weights" or one of the optimizer's per-element states ("exp_avg", "exp_avg_sq", "ema").
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from torch import Tensor, nn

from orchestration.buckets import bucket_size
from orchestration.content_sums import content_sum
from orchestration.optimizer import AdamWithEma

WEIGHTS = "weights"
Part = tuple[str, int, int]  # name of a parameter, first element, number of elements
Reader = Callable[[str, Sequence[Part]], Iterable[tuple[Part, Tensor]]]  # (kind, parts) -> each with its float32 [n]


def initialize(
    module: nn.Module,
    optimizer: AdamWithEma,
    *,
    stage: int,
    micro_batch: int,
    accumulation: int,
    clip_norm: float,
    offload: bool = False,
) -> deepspeed.DeepSpeedEngine:
    """A DeepSpeed engine around `module`, in float32, with nothing that is compiled at run time.

    Weights are float32 whatever the network multiplies in: they are their own master copy, their gradients are float32
    and are reduced as such. (DeepSpeed's bfloat16 mode holds bfloat16 weights beside a float32 copy; here autocast
    makes the bfloat16 ones, so a checkpoint, the moving average and `model.state_dict()` know one precision only.)

    `micro_batch` counts rows of one forward pass on this worker, `accumulation` the passes of one update. With
    `offload`, of stages 1 to 3, master weights and the optimizer's state are in the CPU's memory and updated there, by
    the same torch optimizer.
    """
    engine, *_ = deepspeed.initialize(
        model=module,
        optimizer=optimizer,
        config={
            "train_micro_batch_size_per_gpu": micro_batch,
            "gradient_accumulation_steps": accumulation,
            "gradient_clipping": clip_norm,
            "zero_optimization": _zero_options(
                stage, bucket_size(sum(p.numel() for p in module.parameters())), offload
            ),
            # Any element-wise optimizer is sound under ZeRO; ours is torch's AdamW with one more state.
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,  # the one that it wants is compiled at run time
            "steps_per_print": 2**62,
        },
    )
    return engine


def _zero_options(stage: int, bucket: int, offload: bool) -> dict[str, Any]:
    options: dict[str, Any] = {"stage": stage, "reduce_bucket_size": bucket}
    if stage == 3:
        options |= {
            "stage3_max_live_parameters": bucket,
            "stage3_max_reuse_distance": bucket,
            "stage3_prefetch_bucket_size": bucket,
        }
    if offload:
        options["offload_optimizer"] = {"device": "cpu"}
    return options


@dataclass(frozen=True)
class Fragment:
    """This worker's elements `start .. start + len` of one parameter: 1-D views into the live state, by kind."""

    name: str
    shape: torch.Size
    start: int
    views: dict[str, Tensor]


class EngineState:
    """Reads, writes and averages the state of `engine` by parameter name. Methods marked *collective* must be called
    by every worker in the same order."""

    def __init__(self, engine: deepspeed.DeepSpeedEngine, optimizer: AdamWithEma):
        self.engine, self.optimizer = engine, optimizer
        self._zero: Any = engine.optimizer  # DeepSpeed's wrapper, of a class that depends on the stage
        self.stage = engine.zero_optimization_stage()
        self.kinds = (WEIGHTS, *optimizer.state_names)
        self.parameters: dict[str, nn.Parameter] = dict(engine.module.named_parameters())  # type: ignore[operator]
        self.shapes = {name: getattr(p, "ds_shape", p.shape) for name, p in self.parameters.items()}
        for group, tensors in self._groups():
            optimizer.materialize(group, tensors)
        self._fragments = {fragment.name: fragment for fragment in self._find_fragments()}

    def _groups(self) -> list[tuple[dict, list[Tensor]]]:
        """Pairs of an optimizer group and the tensors that the optimizer really updates for it on this worker."""
        zero, groups = self._zero, self.optimizer.param_groups
        if self.stage == 0:
            return [(group, group["params"]) for group in groups]
        if self.stage < 3:
            return [(group, [flat]) for group, flat in zip(groups, zero.single_partition_of_fp32_groups, strict=True)]
        owners = zero.sub_group_to_group_id
        return [(groups[owners[i]], [flat]) for i, flat in enumerate(zero.fp32_partitioned_groups_flat)]

    def _find_fragments(self) -> Iterator[Fragment]:
        states = self.kinds[1:]
        for name, p in self.parameters.items():
            shape = self.shapes[name]
            if self.stage == 0:
                own = {kind: self.optimizer.state[p][kind].view(-1) for kind in states}
                yield Fragment(name, shape, 0, {WEIGHTS: p.data.view(-1), **own})
            elif self.stage < 3:
                mapping = p._hp_mapping  # type: ignore[attr-defined]
                if mapping is None:  # no element of it lives here
                    continue
                flat = self._zero.single_partition_of_fp32_groups[mapping.param_group_index]
                place = mapping.hp_fragment_address
                sources = {WEIGHTS: flat.data} | {kind: self.optimizer.state[flat][kind] for kind in states}
                views = {kind: source.narrow(0, place.start, place.numel) for kind, source in sources.items()}
                yield Fragment(name, shape, mapping.lp_fragment_address.start, views)
            else:
                part = p.ds_tensor.numel()  # type: ignore[attr-defined]  # elements a worker, padding included
                start = part * dist.get_rank()
                count = min(part, shape.numel() - start)
                if count <= 0:
                    continue
                # Not DeepSpeed's `safe_get_local_...`: of an offloaded state those give copies on the GPU.
                group, offset, _ = self._zero.grad_position[self._zero.get_param_id(p)]
                flat = self._zero.fp32_partitioned_groups_flat[group]
                sources = {WEIGHTS: flat.data} | {kind: self.optimizer.state[flat][kind] for kind in states}
                views = {kind: source.narrow(0, offset, count) for kind, source in sources.items()}
                yield Fragment(name, shape, start, views)

    @torch.no_grad()
    def gather(self, writers: Mapping[str, int]) -> Iterator[tuple[str, str, Tensor]]:
        """Yield (name, kind, whole tensor) of the parameters that `writers` assigns to this worker. *Collective.*

        One tensor is in flight at a time. Bits are preserved: fragments travel as integers and are disjoint, so the
        sum that assembles them has one term for each element.
        """
        rank = dist.get_rank()
        for name, shape in self.shapes.items():
            fragment, writer = self._fragments.get(name), writers[name]
            for kind in self.kinds:
                if self.stage == 0:
                    if rank == writer:
                        assert fragment is not None
                        yield name, kind, fragment.views[kind].reshape(shape).clone()
                    continue
                whole = torch.zeros(shape.numel(), dtype=torch.int32, device=self.engine.device)
                if fragment is not None:
                    view = fragment.views[kind]
                    whole[fragment.start : fragment.start + view.numel()] = view.view(torch.int32)
                dist.reduce(whole, dst=writer)
                if rank == writer:
                    yield name, kind, whole.view(torch.float32).reshape(shape)

    @torch.no_grad()
    def load(self, read: Reader, step: int) -> None:
        """Fill the state with what `read` gives of this worker's fragments, as it is after `step` updates.
        *Collective.*"""
        wanted = [(part.name, part.start, part.views[WEIGHTS].numel()) for part in self._fragments.values()]
        for kind in self.kinds:
            for (name, *_), values in read(kind, wanted):
                self._fragments[name].views[kind].copy_(values)
        for _, tensors in self._groups():
            for tensor in tensors:
                self.optimizer.state[tensor]["step"].fill_(step)
        self.engine.global_steps = step
        self._publish()

    def count_update(self) -> None:
        """Count an update that was not made: the optimizer's clock stays that of the run."""
        for _, tensors in self._groups():
            for tensor in tensors:
                self.optimizer.state[tensor]["step"] += 1

    @torch.no_grad()
    def sums(self) -> dict[tuple[str, str], int]:
        """Content sums of all tensors, by (name, kind), over all workers' fragments. *Collective.*"""
        keys = [(name, kind) for name in self.shapes for kind in self.kinds]
        found = torch.zeros(len(keys), dtype=torch.int64, device=self.engine.device)
        for place, (name, kind) in enumerate(keys):
            if fragment := self._fragments.get(name):
                found[place] = content_sum(fragment.views[kind], fragment.start)
        if self.stage:  # else every worker has all of it
            dist.all_reduce(found)
        return dict(zip(keys, found.tolist(), strict=True))

    @torch.no_grad()
    def network_sums(self) -> dict[tuple[str, str], int]:
        """Content sums of the weights that the network computes with, as this worker sees them. *Collective.*"""
        found = {}
        for name, p in self.parameters.items():
            with deepspeed.zero.GatheredParameters([p], enabled=self.stage == 3):
                found[name, WEIGHTS] = int(content_sum(p.data))
        return found

    def _publish(self) -> None:
        """Make the network compute with the float32 fragments as they now are. *Collective.*

        Without this ZeRO goes on with the weights that it was built with, and no error shows it.
        """
        zero = self._zero
        if self.stage in (1, 2):
            zero.update_lp_params()
        elif self.stage == 3:
            for i in range(len(zero.fp16_groups)):
                zero._reassign_or_swap_out_partitioned_parameters(i)
            # Small parameters are kept whole on every worker: drop the stale copies and gather them again.
            if persistent := zero.persistent_parameters:
                persistent[0].partition(persistent)
                persistent[0].all_gather(persistent)

    @torch.no_grad()
    def _swap_average(self) -> None:
        for fragment in self._fragments.values():
            weights, average = fragment.views[WEIGHTS], fragment.views["ema"]
            held = weights.clone()
            weights.copy_(average)
            average.copy_(held)
        self._publish()

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """The network computes with the moving average inside the block, if there is one. *Collective.*

        Weights and average change places, so nothing is rounded and no second network is held.
        """
        if "ema" not in self.kinds:
            yield
            return
        self._swap_average()
        try:
            yield
        finally:
            self._swap_average()
