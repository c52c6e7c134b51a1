"""Processes that wait with everything imported, so that a worker which dies is replaced within seconds.

Most of the time between a worker's death and the next step goes into imports: some five seconds of a core for torch,
DeepSpeed and Ray Train, in every worker of the new group. Ray gives an actor a process that waits unused, if it was
started for the same job and runtime environment; so each worker has one started beside it, in which Ray runs `load`
before it waits. It holds no logical CPU and nothing of a GPU, but some 400 MB of the machine's memory.

Ray starts such processes by itself where CPUs are free; for those that are not, its node managers take the request
`PrestartWorkers`, which has no public form in Python (Ray 2.60).
"""

import logging
from contextlib import suppress
from importlib import import_module

from ray._private.ray_constants import WORKER_PROCESS_SETUP_HOOK_ENV_VAR as HOOK

from orchestration.jobs import secrets

AFTER_SECONDS = 5.0  # of training: a run that is over by then has no use for a spare
# What torch imports when the first layer is made, and DeepSpeed when an engine is.
_LATE = (
    "torch._dynamo",
    "deepspeed.module_inject.auto_ep_config",
    "deepspeed.module_inject.auto_ep_layer",
    "deepspeed.ops.op_builder.all_ops",
    "deepspeed.runtime.zero.muon.muon_optimizer",
)
_KEPT_SECONDS = 30 * 24 * 3600  # Ray ends it with the job, too


def environment() -> dict[str, str]:
    """What the environment of a worker must hold; readers that a worker starts must not have it."""
    return {HOOK: f"{__name__}.{load.__name__}"}


def load() -> None:
    """Import what a worker imports before its first step."""
    import orchestration.worker  # noqa: F401

    secrets.set_up_worker()  # Ray has place for one function alone; of a job with secrets it would be that

    for module in _LATE:
        with suppress(ImportError):
            import_module(module)


def ask() -> None:
    """Have one more process on this machine made ready for a worker of this job. Returns at once, or within seconds
    if the node manager is not there.

    Does nothing but leave a line in the worker's log where that fails: a restart then takes as long as it does anyway.
    """
    import grpc
    import ray
    from ray._private.grpc_utils import init_grpc_channel
    from ray.core.generated import common_pb2, node_manager_pb2, node_manager_pb2_grpc

    here = ray.get_runtime_context()
    try:
        node = next(one for one in ray.nodes() if one["NodeID"] == here.get_node_id())
        request = node_manager_pb2.PrestartWorkersRequest(  # type: ignore[attr-defined]
            language=common_pb2.PYTHON,  # type: ignore[attr-defined]
            job_id=bytes.fromhex(here.get_job_id()),
            num_workers=1,
            keep_alive_duration_secs=_KEPT_SECONDS,
        )
        request.runtime_env_info.serialized_runtime_env = here.get_runtime_env_string()
        address = f"{node['NodeManagerAddress']}:{node['NodeManagerPort']}"
        with init_grpc_channel(address) as channel:  # type: ignore[attr-defined]
            node_manager_pb2_grpc.NodeManagerServiceStub(channel).PrestartWorkers(request, timeout=10)
    except (grpc.RpcError, StopIteration) as error:
        logging.getLogger(__name__).warning("no spare process was started: %r", error)
