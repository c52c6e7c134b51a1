"""What Ray Train's controller does for a run beyond Ray's own: notes its states, and asks for a checkpoint before it
ends a group of workers that is well, to make it larger or smaller.

These are callbacks of Ray's that its documentation calls developer's API. They run in the controller's process.
"""

import time
from typing import Any

import ray
from ray.exceptions import RayError
from ray.train.v2._internal.execution.callback import ControllerCallback, WorkerGroupCallback

from orchestration import leader
from orchestration.events import Events

_WAIT_SECONDS = 60.0  # for that checkpoint; then the group is ended all the same
_POLL_SECONDS = 0.2
_EVENT_SECONDS = 30.0  # for an event to arrive in S3


class Recovery(ControllerCallback, WorkerGroupCallback):
    """The callback of one run, whose folder is `folder`."""

    def __init__(self, folder: str):
        # With the run's end this process ends, and whether it was a good one is known from that event alone.
        self._events = Events(folder, patience=_EVENT_SECONDS)
        self._group: Any = None
        self._failed = False

    def after_controller_state_update(self, previous_state: Any, current_state: Any) -> None:
        name = current_state._state_type.state_name
        if name != previous_state._state_type.state_name:
            self._events.add("state", state=name)

    def after_worker_group_start(self, worker_group: Any) -> None:
        group = worker_group.get_worker_group_state().placement_group_handle.placement_group
        self._events.add("placed", placement_group=group.id.hex())

    def after_worker_group_training_start(self, worker_group: Any) -> None:
        self._group, self._failed = worker_group, False

    def before_controller_execute_failure_decision(self, failure_decision: Any) -> None:
        self._failed = True

    def before_worker_group_shutdown(self, worker_group: Any) -> None:
        self._group = None

    def before_controller_execute_resize_decision(self, resize_decision: Any) -> None:
        """Have the work so far saved, if this ends workers that are at it."""
        if self._group is None or self._failed:
            return
        began, saved = time.monotonic(), False
        try:
            self._ask(leader.ask_for_checkpoint)
            while not saved and time.monotonic() - began < _WAIT_SECONDS:
                time.sleep(_POLL_SECONDS)
                saved = self._ask(leader.has_saved)
        except (RayError, RuntimeError):
            pass  # the group died meanwhile: Ray goes on with what is there
        self._events.add(
            "resize", workers=resize_decision.num_workers, saved=saved, seconds=round(time.monotonic() - began, 2)
        )

    def _ask(self, what: Any) -> Any:
        return ray.get(self._group.execute_single_async(0, what), timeout=_WAIT_SECONDS)
