"""What only one worker can know, made known to all at the end of each step: that a checkpoint is due, for instance."""

import threading
import time
from enum import IntFlag
from typing import Any

import torch
import torch.distributed as dist

from orchestration.checkpoint_writer import News
from orchestration.config import Config

_LOOK_SECONDS = 1.0  # how often Ray is asked whether machines will be taken away

_REST_SECONDS = 60.0  # that a group waits to be ended; then it goes on

_asked = threading.Event()  # somebody else wants a checkpoint
_wanted = threading.Event()  # and it is not committed yet


def ask_for_checkpoint() -> None:
    """Have this process, if it is the leader's, order a checkpoint at the end of its step, and rest: the group will be
    ended, and what it did after the checkpoint would be done twice. From any thread."""
    _wanted.set()
    _asked.set()


def has_saved() -> bool:
    """Is the checkpoint that was asked for committed, or given up?"""
    return not _wanted.is_set()


class Orders(IntFlag):
    """What all workers do at the end of a step."""

    NOTHING = 0
    SAVE = 1  # a checkpoint
    LOOK = 2  # ask Ray for a notice of preemption, which takes all workers
    STOP = 4  # checkpoints cannot be written
    REST = 8  # begin nothing more, as long as `resting`


class Leader:
    """The first worker's decisions, which depend on its clock and on what it heard; the others only listen."""

    def __init__(self, config: Config):
        self._checkpoint, self._last = config.checkpoint, config.train.steps
        self._leads = dist.get_rank() == 0
        self._saved_at = self._looked_at = time.monotonic()
        self._failed = 0
        self._rest_until = 0.0
        self._answer: int | None = None  # step of the checkpoint that was asked for
        self.trouble: str | None = None  # why the newest checkpoint could not be written
        # Decisions travel on the host: on a GPU they would wait for all that is queued there.
        self._group: Any = dist.new_group(backend="gloo") if dist.get_backend() != "gloo" else None

    def orders(self, step: int, figures: torch.Tensor) -> tuple[Orders, torch.Tensor]:
        """The orders for the end of `step`, and the `figures` [n] (float64, on the CPU) of every worker: float64
        `[workers, n]`, the same bits everywhere. *Collective.*"""
        word = torch.tensor([float(self._decide(step)) if self._leads else 0.0], dtype=torch.float64)
        own = torch.cat([word, figures])
        everyone = [torch.empty_like(own) for _ in range(dist.get_world_size())]
        dist.all_gather(everyone, own, group=self._group)
        table = torch.stack(everyone)
        return Orders(int(table[0, 0])), table[:, 1:]

    def resting(self) -> bool:
        """Is the group still to wait for its end? *Collective.*"""
        if _asked.is_set():  # again: it is saved
            _asked.clear()
            _wanted.clear()
        word = torch.tensor(int(time.monotonic() < self._rest_until))
        dist.broadcast(word, src=0, group=self._group)
        return bool(word)

    def heard(self, news: News) -> None:
        """Take note of what became of a checkpoint."""
        self.trouble = news.error
        self._failed = self._failed + 1 if news.error else 0
        if self._answer is not None and news.step >= self._answer:
            self._answer = None
            _wanted.clear()

    def _decide(self, step: int) -> Orders:
        orders, now, rule = Orders.NOTHING, time.monotonic(), self._checkpoint
        due = step == self._last or (rule.every and step % rule.every == 0)
        if due or _asked.is_set() or (rule.seconds and now - self._saved_at >= rule.seconds):
            orders |= Orders.SAVE
            self._saved_at = now
            if _asked.is_set():
                _asked.clear()
                self._answer = step
                if step != self._last:
                    orders |= Orders.REST
                    self._rest_until = now + _REST_SECONDS
        if now - self._looked_at >= _LOOK_SECONDS:
            orders |= Orders.LOOK
            self._looked_at = now
        if self._failed >= rule.failures:
            orders |= Orders.STOP
        return orders
