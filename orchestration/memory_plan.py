"""What a training run needs of each device's memory, for every ZeRO stage and number of workers, before it starts.

The network's part is traced (`orchestration.memory_trace`); what DeepSpeed adds around it follows from how it handles
float32 gradients, which is written out here stage by stage. The result is the peak over one optimizer step: forward and
backward with the gradients as they become ready, their reduction, the update. Memory is that of tensors; a share of the
device stays free for what is not (`HEADROOM`).
"""

import re
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch

from md4.errors import UserError
from md4.model import skeleton
from orchestration.buckets import bucket_size
from orchestration.config import Config
from orchestration.memory_trace import Trace, trace
from orchestration.optimizer import parameter_groups
from orchestration.passes import Passes
from pipelines.order import check_workers

STAGES = (0, 1, 2, 3)
HEADROOM = 0.1  # of a device, for the CUDA context, NCCL, cuDNN's workspaces and fragmentation: not measured
_FLOAT, _DOUBLE = 4, 8  # bytes
_PERSISTENT = 100_000  # elements up to which ZeRO-3 keeps a parameter whole (DeepSpeed's default)
_WHOLE_BUCKET = 500_000_000  # elements that stage 0 reduces at once (DeepSpeed's, not adjustable)
_UNITS = {"": 1, "K": 1e3, "M": 1e6, "G": 1e9, "T": 1e12, "KI": 2**10, "MI": 2**20, "GI": 2**30, "TI": 2**40}


@dataclass(frozen=True)
class Need:
    """Bytes on one device at the peak of a step; the parts add up to `total`."""

    weights: int  # that the network computes with
    optimizer: int  # moments, and ZeRO's own float32 copy of the weights
    ema: int
    gradients: int
    activations: int
    logits: int  # the projection to the vocabulary and the loss
    transient: int  # buffers of the reduction, gathered weights, copies for a norm
    peak: str  # backward, reduction or update: when it is
    host: int  # bytes in the CPU's memory, of offloaded state
    logits_most: int  # the most that projection and loss take at any time

    @property
    def total(self) -> int:
        return (
            self.weights + self.optimizer + self.ema + self.gradients + self.activations + self.logits + self.transient
        )


@dataclass(frozen=True)
class Line:
    """One stage on one number of devices."""

    stage: int
    workers: int
    micro_batch: int
    passes: int  # forward passes of a step
    need: Need
    fits: bool | None  # None: the memory is not known
    largest: int | None  # micro-batch that fits: a power of two, or a worker's whole share; 0 = none
    seconds: float | None  # of a step, at the throughput given
    cost: float | None  # of all steps


@dataclass(frozen=True)
class Layout:
    """The sizes of a network's parameters, in elements, as the optimizer's groups have them."""

    groups: tuple[tuple[int, ...], ...]

    @classmethod
    def of(cls, config: Config) -> "Layout":
        groups = parameter_groups(skeleton(config.model), config.optimizer)
        return cls(tuple(tuple(p.numel() for p in group["params"]) for group in groups))

    @property
    def sizes(self) -> list[int]:
        return [size for group in self.groups for size in group]

    @property
    def elements(self) -> int:
        return sum(self.sizes)

    def shares(self, workers: int) -> list[int]:
        """Elements of each group that a worker's partition has."""
        return [-(-sum(group) // workers) for group in self.groups]

    def touched(self, workers: int) -> int:
        """Elements of the parameters that lie in a partition, wholly or partly; of the worker that has most."""
        most = np.zeros(workers, dtype=np.int64)
        for group, share in zip(self.groups, self.shares(workers), strict=True):
            ends = np.cumsum(group)
            for worker in range(workers):
                first, last = worker * share, (worker + 1) * share
                most[worker] += sum(
                    size for size, end in zip(group, ends, strict=True) if end - size < last and end > first
                )
        return int(most.max())

    @property
    def kept_whole(self) -> int:
        """Elements of the parameters that ZeRO-3 does not partition."""
        return sum(size for size in self.sizes if size <= _PERSISTENT)


class _Reduction:
    """Bytes that hold gradients while ZeRO 1 or 2 reduces them in buckets, and the most there ever was."""

    def __init__(self, bucket: int, partition: int, offload: bool):
        self.bucket, self.partition, self.offload = bucket, partition, offload
        self.used = 0  # elements in the bucket
        self.large = 0  # elements of a gradient that is larger than a bucket
        self.kept = 0  # bytes of reduced gradients
        self.spike = 0  # bytes more than `held`, during the last reduction

    def add(self, size: int) -> None:
        """A gradient of so many elements is complete, and goes into the bucket."""
        self.spike = 0
        if self.used + size > self.bucket:
            self.flush()
        if size > self.bucket:
            self.large = size
        self.used += size

    def flush(self) -> None:
        before, self.kept = self.kept, 0 if self.offload else self.partition * _FLOAT
        self.spike = max(0, before + self.used * _FLOAT - self.kept)  # the collective works on a copy
        self.used = self.large = 0

    @property
    def held(self) -> int:
        return self.kept + (self.bucket + self.large) * _FLOAT


@dataclass(frozen=True)
class Target:
    """The devices that a run is planned for."""

    device: torch.device
    compute: torch.dtype  # of the network's products
    memory: int | None = None  # bytes of one device; None: not known
    price: float | None = None  # of one device for an hour, in any currency
    throughput: float | None = None  # tokens/s of one device, measured

    @property
    def usable(self) -> float:
        """Bytes that tensors may take; without limit where the memory is not known."""
        return float("inf") if self.memory is None else self.memory * (1 - HEADROOM)


class Planner:
    """Plans runs of `config` on devices like `target`."""

    def __init__(self, config: Config, target: Target):
        self.config, self.target = config, target
        self._layout = Layout.of(config)

    def lines(self, workers: Sequence[int]) -> list[Line]:
        """Every stage on every number of devices; UserError for a number that the batch can't be dealt out to."""
        for one in workers:
            check_workers(one, self.config.train.slices)
        return [self.line(stage, one) for one in workers for stage in STAGES]

    def line(self, stage: int, workers: int) -> Line:
        """One stage, with the micro-batch of the configuration."""
        passes = self._passes(workers, self.config.train.micro_batch)
        found = self.need(stage, workers, passes.size)
        fits = largest = None
        if self.target.memory is not None:
            fits = found.total <= self.target.usable
            largest = self._largest(stage, workers)
        seconds, cost = self._time(workers, passes)
        return Line(stage, workers, passes.size, passes.count, found, fits, largest, seconds, cost)

    def need(self, stage: int, workers: int, micro_batch: int) -> Need:
        """What a worker needs with so many rows in a pass."""
        traced = trace(self.config.model, micro_batch, self.target.compute, self.target.device)  # type: ignore[arg-type]  # frozen
        passes, train = self._passes(workers, micro_batch).count, self.config.train
        averaged, offload = bool(self.config.optimizer.ema), train.offload and stage > 0
        return step_need(self._layout, traced, stage, workers, passes, averaged, offload)

    def refuse(self, lines: Sequence[Line]) -> str | None:
        """Why the configured stage can't run on any of the numbers of devices in `lines`, and what could; None if it
        can, or the memory is not known."""
        train, memory = self.config.train, self.target.memory
        own = [line for line in lines if line.stage == train.zero_stage]
        if memory is None or not own or any(line.fits for line in own):
            return None
        least = min(own, key=lambda line: line.need.total)
        ways = []
        if least.largest:
            ways.append(f"train.micro_batch={least.largest}")
        fitting = [line for line in lines if line.fits and line.workers == least.workers]
        if fitting:
            ways.append(f"train.zero_stage={fitting[0].stage}")
        network = self.config.model.network
        if not network.checkpoint_activations:
            ways.append("model.network.checkpoint_activations=true")
        if not train.offload:
            ways.append("train.offload=true with ZeRO 1 to 3")
        return (
            f"train.zero_stage={train.zero_stage} with train.micro_batch={least.micro_batch} on {least.workers} "
            f"device(s) needs {size(least.need.total)} of tensors on each; of {size(memory)} there, "
            f"{size(int(self.target.usable))} can be counted on. "
            + ("These fit: " if least.largest or fitting else "Less is needed with: ")
            + ", or ".join(ways[: len(fitting[:1]) + bool(least.largest)] if least.largest or fitting else ways)
        )

    def _passes(self, workers: int, micro_batch: int | None) -> Passes:
        return Passes(self.config.train.batch_size, self.config.train.slices, workers, micro_batch)

    def _largest(self, stage: int, workers: int) -> int:
        """The most rows of a pass that fit, among the powers of two below a worker's share and that share."""
        share = self._passes(workers, None).places
        sizes = [0, *(2**power for power in range(share.bit_length()) if 2**power < share), share]
        found = bisect_right(sizes, self.target.usable, lo=1, key=lambda rows: self.need(stage, workers, rows).total)
        return sizes[found - 1]

    def _time(self, workers: int, passes: Passes) -> tuple[float | None, float | None]:
        """Seconds of a step, which lasts as long as the largest share, and the price of all steps."""
        if self.target.throughput is None:
            return None, None
        seconds = passes.size * passes.count * self.config.model.length / self.target.throughput
        if self.target.price is None:
            return seconds, None
        return seconds, seconds / 3600 * self.config.train.steps * workers * self.target.price


def step_need(
    layout: Layout, traced: Trace, stage: int, workers: int, passes: int, averaged: bool, offload: bool
) -> Need:
    """The peak of one worker's memory over a step of `passes` forward and backward passes like the `traced` one."""
    elements, bucket = layout.elements, bucket_size(layout.elements)
    share = elements if stage == 0 else sum(layout.shares(workers))
    moments, ema = 2 * share * _FLOAT, share * _FLOAT * averaged
    master = 0 if stage == 0 else share * _FLOAT
    weights = elements * _FLOAT if stage < 3 else (share + layout.kept_whole) * _FLOAT
    host = 0
    if offload:
        gradients = share * _FLOAT * (2 if passes > 1 else 1)
        host, moments, ema, master = moments + ema + master * 2 + gradients, 0, 0, 0
    phases = dict(_phases(layout, traced, stage, workers, passes, bucket, offload))
    peak = max(phases, key=lambda name: sum(phases[name]))
    gradients, activations, logits, transient = phases[peak]
    return Need(
        weights, moments + master, ema, gradients, activations, logits, transient, peak, host, int(traced.head.max())
    )


Parts = tuple[int, int, int, int]  # bytes of gradients, activations, logits, transient


def _phases(
    layout: Layout, traced: Trace, stage: int, workers: int, passes: int, bucket: int, offload: bool
) -> Iterator[tuple[str, Parts]]:
    """The parts that come and go in a step, at the highest moment of each of its phases."""
    elements, sizes = layout.elements, layout.sizes
    moments = len(traced.body)
    complete = np.zeros(moments, dtype=np.int64)  # bytes of gradients that are complete by then
    for moment, size in traced.ready:
        complete[moment] += size * _FLOAT
    complete = complete.cumsum()
    underway = np.maximum(traced.gradients - complete, 0)
    transient = np.zeros(moments, dtype=np.int64)
    largest = max(sizes)
    buffers = largest * _FLOAT if offload and stage < 3 else 0

    if stage < 2:
        gradients = traced.gradients if passes == 1 else elements * _FLOAT + underway
        if stage == 1:  # the bucket is there from the first gradient on, although it is filled later
            transient[traced.ready[0][0] :] += bucket * _FLOAT
        yield "backward", _highest(traced, gradients, transient + buffers)
        if stage == 0:
            yield "reduction", (elements * _FLOAT, 0, 0, min(elements, _WHOLE_BUCKET) * _FLOAT)
            yield "update", (elements * _FLOAT, 0, 0, 0)
            return
        yield "reduction", _reduce_all(layout, workers, bucket, buffers, offload)
    elif stage == 2:
        touched = layout.touched(workers)
        reduction = _Reduction(bucket, touched, offload)
        held = np.zeros(moments, dtype=np.int64)
        spikes = np.zeros(moments, dtype=np.int64)
        before = 0
        for moment, size in traced.ready:
            held[before:moment] = reduction.held if before else 0
            reduction.add(size)
            spikes[moment] = max(spikes[moment], reduction.spike)
            before = moment
        held[before:] = reduction.held
        earlier = touched * _FLOAT if passes > 1 and not offload else 0  # gradients of the passes before
        kept = np.maximum(held - bucket * _FLOAT, 0) + underway + earlier
        yield "backward", _highest(traced, kept, np.minimum(held, bucket * _FLOAT) + spikes + buffers)
        reduction.flush()
        yield "reduction", (reduction.kept + earlier, 0, 0, bucket * _FLOAT + reduction.spike + buffers)
    else:
        share = sum(layout.shares(workers)) * _FLOAT
        own = 0 if offload else share
        gathered = min(elements - layout.kept_whole, bucket + largest) * _FLOAT
        yield "backward", _highest(traced, own + underway, transient + bucket * _FLOAT * 2 + gathered)
        yield "update", (own, 0, 0, bucket * _FLOAT + (0 if offload else max(layout.shares(workers)) * _FLOAT))
        return

    if not offload:
        touched = layout.touched(workers) * _FLOAT
        copies = max(max(layout.shares(workers)) * _FLOAT, largest * _DOUBLE)  # all in one piece; for the norm
        yield "update", (touched, 0, 0, copies)


def _highest(traced: Trace, gradients: np.ndarray, transient: np.ndarray) -> Parts:
    moment = int((traced.body + traced.head + gradients + transient).argmax())
    return tuple(int(part[moment]) for part in (gradients, traced.body, traced.head, transient))  # type: ignore[return-value]


def _reduce_all(layout: Layout, workers: int, bucket: int, buffers: int, offload: bool) -> Parts:
    """Stage 1 reduces after the backward pass, when all gradients are there; they leave one by one."""
    left, highest = layout.elements * _FLOAT, (0, 0, 0, 0)
    reduction = _Reduction(bucket, layout.touched(workers), offload)
    for size in [*layout.sizes, 0]:
        gradients = left + reduction.large * _FLOAT + reduction.kept
        if size:
            reduction.add(size)
        else:
            reduction.flush()
        highest = max(highest, (gradients, 0, 0, bucket * _FLOAT + reduction.spike + buffers), key=sum)
        left -= size * _FLOAT
    return highest


def check(config: Config) -> None:
    """UserError when a run can't fit on the CUDA devices of this machine; says nothing where there is none."""
    if not torch.cuda.is_available() or config.train.device == "cpu":
        return
    memory = torch.cuda.get_device_properties(0).total_memory
    planner = Planner(config, Target(torch.device("cuda"), products(config, torch.device("cuda")), memory))
    line = planner.line(config.train.zero_stage, config.train.least_workers)
    if not line.fits and (reason := planner.refuse(planner.lines([line.workers]))):
        raise UserError(reason)


def products(config: Config, device: torch.device) -> torch.dtype:
    """What the network multiplies in on `device`, by the configuration; "auto" is bfloat16 on GPUs, whether or not
    there is one here, and else what this machine's CPU does."""
    if config.train.precision != "auto":
        return getattr(torch, config.train.precision)
    native = device.type == "cuda" or torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return torch.bfloat16 if native else torch.float32


def read_size(text: str) -> int:
    """Bytes of "80GB", "141 GiB", "512MiB"; UserError for anything else."""
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?i?)B?\s*", text, re.IGNORECASE)
    if found is None or not (value := int(float(found[1]) * _UNITS[found[2].upper()])):
        raise UserError(f"memory {text!r} must be a size such as 80GB or 141GiB")
    return value


def read_counts(text: str) -> list[int]:
    """Numbers of devices: "8", "1,2,4" or "2..8"; UserError for anything else."""
    found = re.fullmatch(r"(\d{1,6})\.\.(\d{1,6})", text)
    if found:
        counts = list(range(int(found[1]), int(found[2]) + 1))
    elif re.fullmatch(r"\d{1,6}(,\d{1,6})*", text):
        counts = sorted({int(one) for one in text.split(",")})
    else:
        counts = []
    if not counts or counts[0] < 1:
        raise UserError(f"gpus={text!r} must be a number, several with commas, or a range such as 2..8")
    return counts


def size(count: int) -> str:
    """Bytes for people, in powers of ten."""
    for unit, scale in (("GB", 1e9), ("MB", 1e6)):
        if count >= scale:
            return f"{count / scale:.1f} {unit}"
    return f"{count / 1e3:.1f} kB"


def as_json(config: Config, target: Target, lines: Sequence[Line]) -> dict[str, Any]:
    """The plan as plain values; sizes in bytes, times in seconds."""
    return {
        "run": config.name,
        "device": target.device.type,
        "compute": str(target.compute).removeprefix("torch."),
        "memory": target.memory,
        "headroom": HEADROOM,
        "offload": config.train.offload,
        "checkpoint_activations": config.model.network.checkpoint_activations,
        "plans": [{**asdict(line), "total": line.need.total} for line in lines],
    }
