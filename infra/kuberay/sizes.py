"""CPUs, memory and GPUs of the pods: from the memory plan where it can tell, else from what processes were seen to
take.

A pod's `/dev/shm` is memory, too, and counts towards its limit. CPUs are requested and not limited: a limit slows a
step down that would find free cores.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch

from md4.errors import UserError
from md4.model import count_parameters
from orchestration.config import Config
from orchestration.memory_plan import Planner, Target, products, read_size, size

MARGIN = 1.25  # of what is counted, for what is not: fragmentation, buffers of the network, peaks of readers
_GIB = 2**30
# Bytes of resident memory, seen on machines with two cores (CUDA's share is estimated).
_NODE = 600 << 20  # raylet, its agents and actors of Ray's own
_PROCESS = 800 << 20  # a worker with torch, DeepSpeed and Ray Train imported
_CUDA = 3 << 30  # what CUDA's context and NCCL take of the machine's memory
_SPARE = 400 << 20  # of train.spare
_READERS = 2 * (300 << 20)
_REPLICA = 1200 << 20  # of the service, without its models
_STATE = 16  # bytes of a parameter in a copy for a checkpoint: weight, two moments, average


@dataclass(frozen=True)
class Size:
    """Of one pod."""

    cpus: float  # requested
    memory: int  # bytes, shared memory included; requested, and the limit
    shared: int  # bytes of /dev/shm
    slots: int  # logical CPUs that Ray gives out on it
    gpus: int = 0
    reason: str = ""  # how the memory was found, for people

    @property
    def object_store(self) -> int:
        """Bytes of Ray's object store, which lies in the shared memory beside what NCCL keeps there."""
        return self.shared // 2

    def resources(self) -> dict[str, Any]:
        """The `resources` of a container."""
        memory = quantity(self.memory)
        gpus = {"nvidia.com/gpu": self.gpus} if self.gpus else {}
        return {
            "requests": {"cpu": f"{math.ceil(self.cpus * 1000)}m", "memory": memory, **gpus},
            "limits": {"memory": memory, **gpus},
        }


def quantity(count: int) -> str:
    """Bytes as Kubernetes writes them, rounded up to a quarter of a GiB."""
    return f"{math.ceil(count / _GIB * 4) * 256}Mi"


def head(drivers: bool) -> Size:
    """The pod that leads a cluster and computes nothing; drivers: commands run on it."""
    return Size(2, (4 if drivers else 3) * _GIB + _GIB // 2, _GIB // 2, slots=0)


def of_training(config: Config, per_pod: int, gpu_memory: str | None, memory: str | None) -> Size:
    """A pod of `per_pod` workers; UserError where the plan says that the run can't fit what is given.

    gpu_memory: of one GPU, such as 80GB; memory: of the pod, such as 16GiB. Elastic runs need most on the
    fewest workers.
    """
    train, cuda = config.train, on_gpus(config)
    if gpu_memory is not None and not cuda:
        raise UserError(f"--gpu-memory {gpu_memory}: train.device={train.device} uses no GPU")
    if train.most_workers % per_pod or train.least_workers % per_pod:
        raise UserError(f"--workers-per-pod {per_pod} must divide train.workers={train.workers}")
    device = torch.device("cuda" if cuda else "cpu")
    # "auto" follows the CPU of this machine here; float32 needs as much as any.
    compute = products(config, device) if cuda or train.precision != "auto" else torch.float32
    limit = None if gpu_memory is None else read_size(gpu_memory)
    planner = Planner(config, Target(device, compute, limit))
    line = planner.line(train.zero_stage, train.least_workers)
    if not line.fits and (reason := planner.refuse(planner.lines([line.workers]))):
        raise UserError(reason)
    tensors = line.need.host if cuda else line.need.total
    share = 1 if train.zero_stage == 0 else train.least_workers
    copy = _STATE * count_parameters(config.model) // share
    worker = _PROCESS + cuda * _CUDA + train.spare * _SPARE + _READERS + tensors + copy
    rows = config.data.cache_mb * 1_000_000 if config.data.order != "lanes" else 0  # pages of a file; slow without
    shared = (4 * _GIB if cuda else _GIB) * (1 if per_pod == 1 else 2)
    need = int((_NODE + per_pod * worker) * MARGIN) + rows + shared
    reason = (
        f"{size(need)} counted: {per_pod} x {size(worker)} (of these tensors {size(tensors)}, a checkpoint's copy "
        f"{size(copy)}), times {MARGIN}, decoded rows {size(rows)}, /dev/shm {size(shared)}"
    )
    if memory is not None:
        need = _at_least(memory, need, reason)
    cpus = per_pod * (train.threads + 1)  # beside each worker: readers, the writer of checkpoints
    return Size(
        cpus, need, shared, slots=per_pod if not cuda else max(per_pod, cpus), gpus=per_pod * cuda, reason=reason
    )


def of_serving(config: Config, memory: str | None) -> Size:
    """A pod of one replica that holds the model."""
    serving = config.serving
    if serving.num_gpus != int(serving.num_gpus):
        raise UserError(f"serving.num_gpus={serving.num_gpus:g}: a pod has whole GPUs")
    weights = 4 * count_parameters(config.model)
    shared = _GIB
    # Weights are read, averaged ones beside them; while newer ones are loaded there are both.
    need = int((_NODE + _REPLICA + bool(serving.num_gpus) * _CUDA + 4 * weights) * MARGIN) + shared
    reason = (
        f"{size(need)} counted: a replica with 4 x {size(weights)} of weights, times {MARGIN}, /dev/shm {size(shared)}"
    )
    if memory is not None:
        need = _at_least(memory, need, reason)
    slots = math.ceil(serving.num_cpus)
    return Size(serving.num_cpus + 0.5, need, shared, slots, gpus=int(serving.num_gpus), reason=reason)


def on_gpus(config: Config) -> bool:
    """Does each worker take a GPU? UserError for "auto", which looks at the machine that it runs on."""
    if config.train.device == "auto":
        raise UserError("train.device='auto' says nothing of pods: say cuda, for a GPU a worker, or cpu")
    return config.train.device == "cuda"


def _at_least(memory: str, need: int, reason: str) -> int:
    given = read_size(memory)
    if given < need:
        raise UserError(f"--memory {memory} is less than a pod needs: {reason}")
    return given
