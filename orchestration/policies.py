"""When Ray Train starts a group of workers anew, and how many: its own rules, with ours where they lose time or count
wrong.

These are parts of Ray Train that it has no settings for. They run in its controller's process.
"""

import logging
import socket
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import ray
from ray._common.constants import RAY_WARN_BLOCKING_GET_INSIDE_ASYNC_ENV_VAR
from ray._private.state import state
from ray._raylet import RAY_NODE_ID_KEY  # type: ignore[attr-defined]
from ray.exceptions import RayActorError
from ray.train.torch import TorchTrainer
from ray.train.v2._internal.constants import (
    DEFAULT_RAY_WARN_BLOCKING_GET_INSIDE_ASYNC_VALUE,
    get_env_vars_to_propagate,
)
from ray.train.v2._internal.execution.controller import TrainController
from ray.train.v2._internal.execution.failure_handling import FailureDecision, FailurePolicy
from ray.train.v2._internal.execution.scaling_policy import ElasticScalingPolicy, NoopDecision
from ray.train.v2.api.exceptions import WorkerGroupError

from md4.errors import UserError
from orchestration.checkpoints import committed_in
from orchestration.events import Events
from orchestration.stopping import Stop, Stopped
from pipelines.storage import Folder

logger = logging.getLogger(__name__)
_ANSWER_SECONDS = 1.0  # within which a node takes up a connection, if it is there
_PAUSE_SECONDS = 0.1  # between two looks for resources; Ray's controller makes none
# Where Ray's exceptions keep what they wrap.
_INNER = ("_base_exc", "cause", "health_check_failure", "controller_failure")


class Preempted(Exception):
    """Some of the workers' machines will be taken away; everything up to now is in a checkpoint."""


class Trainer(TorchTrainer):
    """Ray's trainer with the policies of this module for a run, whose folder is `folder`."""

    def __init__(
        self, *args: Any, folder: str, checkpoints: str, max_restarts: int, stop: Stop | None = None, **options: Any
    ):
        super().__init__(*args, **options)
        self._budget, self._stop = Budget(folder, checkpoints, max_restarts), stop

    def _initialize_and_run_controller(self, **parts: Any) -> Any:
        parts["failure_policy"] = self._budget
        if self.scaling_config.elasticity_enabled:
            parts["scaling_policy"] = Elastic(self.scaling_config)
        if self._stop is None:
            return super()._initialize_and_run_controller(**parts)
        # As Ray's own, which keeps its controller to itself.
        variables = {
            **get_env_vars_to_propagate(),
            RAY_WARN_BLOCKING_GET_INSIDE_ASYNC_ENV_VAR: DEFAULT_RAY_WARN_BLOCKING_GET_INSIDE_ASYNC_VALUE,
        }
        here = {RAY_NODE_ID_KEY: ray.get_runtime_context().get_node_id()}
        actor: Any = ray.remote(num_cpus=0, label_selector=here, runtime_env={"env_vars": variables})(TrainController)
        controller = actor.remote(**parts)
        self._stop.arrange(lambda: controller.abort.remote())
        try:
            ray.get(controller.run.remote())
            return ray.get(controller.get_result.remote())
        except RayActorError as error:
            if self._stop.asked:
                raise Stopped from error
            raise


class Budget(FailurePolicy):
    """Failures are forgiven as long as the run gets further: so many in a row without a new checkpoint end it.

    A user's mistake ends it at once. Preemption, and waiting for machines, are no failures.
    """

    def __init__(self, folder: str, checkpoints: str, max_restarts: int):
        self._events, self._checkpoints, self._allowed = Events(folder), Folder(checkpoints), max_restarts
        self._spent, self._newest = 0, self._last_checkpoint()

    def make_decision(self, training_failed_error: Exception) -> FailureDecision:
        failures = getattr(training_failed_error, "worker_failures", {})
        told = {str(rank): last_line(error) for rank, error in failures.items()} or last_line(training_failed_error)
        decision = self._decide(training_failed_error)
        self._events.add("failure", why=told, spent=self._spent, allowed=self._allowed, decision=decision.value)
        return decision

    def _decide(self, error: Exception) -> FailureDecision:
        everything = list(causes(error))
        if any(isinstance(one, UserError) for one in everything):
            return FailureDecision.RAISE
        if type(error).__name__ == "PreemptionError" or any(_is_preemption(one) for one in everything):
            return FailureDecision.RETRY
        if not isinstance(error, WorkerGroupError):
            startup = getattr(error, "controller_failure", None)
            waiting = type(startup).__name__ in ("WorkerGroupStartupTimeoutError", "WorkerGroupStartupFailedError")
            return FailureDecision.RETRY if waiting else FailureDecision.RAISE
        if (newest := self._last_checkpoint()) != self._newest:
            self._spent, self._newest = 0, newest
        if self._spent >= self._allowed:
            return FailureDecision.RAISE
        self._spent += 1
        return FailureDecision.RETRY

    def _last_checkpoint(self) -> str | None:
        try:
            found = committed_in(self._checkpoints)
        except (OSError, UserError):
            return None
        return found[0].name if found else None


class Elastic(ElasticScalingPolicy):
    """Looks at the cluster as it is, where Ray's own looks at a picture up to 20 s old that has machines in it which
    are dead or will be taken away, and then waits for those until a time is over."""

    def make_decision_for_non_running_worker_group(self) -> Any:
        decision = super().make_decision_for_non_running_worker_group()
        if isinstance(decision, NoopDecision):
            time.sleep(_PAUSE_SECONDS)
        return decision

    def make_decision_for_running_worker_group(self, worker_group_state: Any, worker_group_status: Any) -> Any:
        """Only ever to more workers: who is lost is found by failing, who will be taken away by its notice."""
        decision = super().make_decision_for_running_worker_group(worker_group_state, worker_group_status)
        fewer = getattr(decision, "num_workers", 0) <= worker_group_state.num_workers
        return NoopDecision() if fewer else decision

    def _get_reserved_resources(self) -> Any:
        now = time.monotonic()
        if now - self._latest_reserved_resources_query_time < self.GET_RESERVED_RESOURCES_INTERVAL_S:
            return self._latest_reserved_resources
        try:
            reserved: Any = ray.get(
                self._autoscaling_coordinator.get_reserved_resources.remote(self._requester_id, recompute=True),
                timeout=5,
            )
            usable = usable_nodes()
            found = {node: resources for node, resources in reserved.items() if node in usable}
        except Exception as error:  # as Ray's own: then the size stays
            logger.warning("the cluster's resources are not known: %s", error)
            found = None
        self._latest_reserved_resources_query_time, self._latest_reserved_resources = time.monotonic(), found
        return found


def usable_nodes() -> set[str]:
    """Ids of the nodes that are there and will stay."""
    leaving = state.get_draining_nodes() or {}
    nodes = [node for node in ray.nodes() if node["Alive"] and node["NodeID"] not in leaving]
    with ThreadPoolExecutor(16) as pool:
        there = pool.map(_answers, nodes)
        return {node["NodeID"] for node, answer in zip(nodes, there, strict=True) if answer}


def _answers(node: dict[str, Any]) -> bool:
    try:
        socket.create_connection((node["NodeManagerAddress"], node["NodeManagerPort"]), _ANSWER_SECONDS).close()
    except OSError:
        return False
    return True


def _is_preemption(error: BaseException) -> bool:
    return isinstance(error, Preempted) or (isinstance(error, RayActorError) and error.preempted)


def causes(error: BaseException) -> Iterator[BaseException]:
    """The failures of all workers behind `error`, and what each was caused by, as Ray and Python wrap them."""
    seen: set[int] = set()
    waiting: list[BaseException] = [error]
    while waiting:
        one = waiting.pop(0)
        if id(one) in seen:
            continue
        seen.add(id(one))
        yield one
        waiting += getattr(one, "worker_failures", {}).values()
        inner = [getattr(one, name, None) for name in _INNER]
        waiting += [cause for cause in [*inner, one.__cause__] if isinstance(cause, BaseException)]


def last_line(error: BaseException) -> str:
    """What happened, in short."""
    return (str(error).strip().splitlines() or [type(error).__name__])[-1][:300]
