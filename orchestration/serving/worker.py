"""The engine's thread. It owns the rows, and calls the network again and again while there are any.

What it does between two calls: take in and throw out requests, give places to rows (`lanes`), hand over what has ended.
Rows of different lengths can't share a call, so lengths take turns, and texts to score with them: who has had the least
time is next.

Everything public is for event loops, and returns at once.
"""

import logging
import math
import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from time import perf_counter
from typing import TYPE_CHECKING, Any

import torch

from md4.errors import UserError
from md4.samplers.batch import collect, glance
from md4.samplers.rows import Rows
from orchestration.serving import capacity
from orchestration.serving.capacity import Capacity
from orchestration.serving.config import EngineConfig
from orchestration.serving.engine_stats import EngineStats, Observe, Observed
from orchestration.serving.lanes import Lane, Member
from orchestration.serving.models import Broken, Busy, Lost
from orchestration.serving.parts import advance_in_parts, out_of_memory, words
from orchestration.serving.post import Post
from orchestration.serving.tickets import Outcome, Rate, Scoring, Ticket, Waiter
from orchestration.serving.watching import Snapshot

if TYPE_CHECKING:
    import asyncio

    from orchestration.runs import Loaded

_log = logging.getLogger(__name__)


@dataclass
class _Weights:
    """Weights that rows under way have."""

    loaded: "Loaded"
    lanes: dict[int, Lane] = field(default_factory=dict)  # by the tokens that the network sees


class Worker:
    """A model, the rows that are sampled from it, and the thread that does it.

    Args:
        loaded: the weights of requests until there are others.
        config: how rows share the network.
        observe: is told of single values.
    """

    def __init__(self, loaded: "Loaded", config: EngineConfig, observe: Observe | None):
        self.config = config
        self.capacity = Capacity(loaded.config.model.length, config.max_rows or 1)
        self._observer = observe
        self._weights = [_Weights(loaded)]  # the last ones are those of new requests; the others have rows under way
        self._scorings: deque[Scoring] = deque()
        self._scoring_used_s = 0.0
        self._stats = EngineStats()
        self._rate = Rate()
        self._post = Post()
        # What event loops touch, too, under this lock:
        self._wake = threading.Condition()
        self._commands: list[Callable[[], None]] = []
        self._waiters: set[Waiter] = set()
        self._rows = 0  # of all waiters
        self._closing = False
        self._dead: str | None = None
        self._next = 0  # number of a row
        self._thread = threading.Thread(target=self._work, name="md4 engine", daemon=True)
        self._thread.start()

    # --- for event loops ---

    @property
    def loaded(self) -> "Loaded":
        """The weights that new requests get."""
        return self._weights[-1].loaded

    @property
    def healthy(self) -> bool:
        """Whether requests are answered; once False, it stays so."""
        return self._dead is None and self._thread.is_alive()

    def stats(self) -> EngineStats:
        """Counters and the present state. Taken while the thread works: sums may be off by a request."""
        with self._wake:
            waiters = list(self._waiters)
        tickets = [waiter for waiter in waiters if isinstance(waiter, Ticket)]
        return replace(
            self._stats,
            healthy=self.healthy,
            places=self.capacity.rows,
            measured={point.rows: point.seconds for point in self.capacity.points},
            requests_waiting=sum(ticket.started == 0 for ticket in tickets),
            requests_running=sum(ticket.started > 0 for ticket in tickets),
            rows_waiting=sum(ticket.waiting for ticket in tickets),
            rows_running=sum(len(ticket.running) for ticket in tickets),
            lengths_running=sum(len(weights.lanes) for weights in self._weights),
            scores_running=sum(isinstance(waiter, Scoring) for waiter in waiters),
            rows_per_call=dict(self._stats.rows_per_call),
        )

    def sample(self, ticket: Ticket) -> None:
        """Take in a request. Raises `Busy`, `Lost`, or `UserError` for more rows than the queue can ever hold."""
        with self._wake:
            self._make_sure_of_room(ticket.rows, self.capacity.places(ticket.view))
            ticket.first, self._next = self._next, self._next + ticket.rows
            self._command(ticket, lambda: self._enter(ticket))
            self._stats.requests += 1

    def score(self, scoring: Scoring, length: int) -> None:
        """Take in texts of at most `length` tokens; raises as `sample` does."""
        with self._wake:
            self._make_sure_of_room(scoring.rows, self.capacity.places(length))
            self._command(scoring, lambda: self._enter_scoring(scoring))
            self._stats.requests += 1

    def refresh(self, loaded: "Loaded", waiter: Waiter) -> None:
        """Let requests that have not begun have other weights; `waiter` gets None when it is so. Raises `Lost`."""
        self._command(waiter, lambda: self._change_weights(loaded, waiter))

    def give_up(self, waiter: Waiter) -> None:
        """Nobody waits any more, with or without a result."""
        if not waiter.result.done():
            waiter.result.cancel()
        elif not waiter.result.cancelled():
            waiter.result.exception()  # it may be that nobody has asked for it, which would be complained of
        with self._wake:
            if waiter in self._waiters and self._dead is None:
                self._commands.append(lambda: self._end(waiter, None))
                self._wake.notify()

    def close(self, drain: bool) -> threading.Thread:
        """Take in nothing more; the thread, which ends with what was taken in, or at once (without `drain`)."""
        with self._wake:
            self._closing = True
            if not drain:
                self._commands.append(lambda: self._lose_all("the service was shut down"))
            self._wake.notify()
        return self._thread

    def _command(self, waiter: Waiter, command: Callable[[], None]) -> None:
        """Have the thread do something for `waiter`, of which it lets go in the end. Raises `Lost` if it has ended."""
        with self._wake:
            if self._dead is not None:
                raise Lost(self._dead)
            if self._closing:
                raise Lost("the service is being shut down")
            self._waiters.add(waiter)
            self._rows += waiter.rows
            self._commands.append(command)
            self._wake.notify()

    def _make_sure_of_room(self, rows: int, places: int) -> None:
        room = places + self.config.max_waiting_rows
        if rows > room:
            raise UserError(f"{rows} samples or texts are too many at once; allowed are {room}")
        beyond = self._rows + rows - room
        if beyond > 0 and self._dead is None and not self._closing:
            self._stats.refused += 1
            wait = self._rate.seconds_for(beyond)
            raise Busy(f"too many requests are waiting; try again in {math.ceil(wait)} s", wait)

    # --- the thread ---

    def _work(self) -> None:
        try:
            if self.config.max_rows is None:
                self.capacity = capacity.measured(self.loaded.model, self.capacity.length)
            self._stats.ready = True
            while self._turn():
                pass
        except BaseException as error:
            _log.exception("the engine has failed")
            with self._wake:
                self._dead = f"the engine has failed: {words(error)}"
            self._lose_all(self._dead)
            self._post.send()

    def _turn(self) -> bool:
        """Do what is due; False when there will be nothing more."""
        with self._wake:
            while not self._commands and not self._waiters:
                if self._closing:
                    return False
                self._wake.wait()
            commands, self._commands = self._commands, []
        for command in commands:
            command()
        lanes = [(weights, view) for weights in self._weights for view in weights.lanes]
        due = min(lanes, key=lambda place: place[0].lanes[place[1]].used_s, default=None)
        least = None if due is None else due[0].lanes[due[1]].used_s
        if self._scorings and (least is None or self._scoring_used_s <= least):
            self._advance_scoring()
        elif due is not None:
            self._advance(*due)
        self._tidy()
        self._post.send()
        return True

    def _tidy(self) -> None:
        """Forget empty lanes, and weights that nobody needs any more."""
        for weights in self._weights:
            for view in [view for view, lane in weights.lanes.items() if not lane.members]:
                del weights.lanes[view]
        if len(self._weights) > 1:
            self._weights = [*(weights for weights in self._weights[:-1] if weights.lanes), self._weights[-1]]

    # --- who comes and goes ---

    def _enter(self, ticket: Ticket) -> None:
        """Let a request into the lane of its length."""
        weights = self._weights[-1]
        if ticket.view not in weights.lanes:
            lane = Lane(weights.loaded.model, lambda: self.capacity.places(ticket.view), self.config.slice_calls)
            lane.used_s = self._least_used()
            weights.lanes[ticket.view] = lane
        ticket.lane = weights.lanes[ticket.view]
        ticket.lane.add(ticket)

    def _enter_scoring(self, scoring: Scoring) -> None:
        if not self._scorings:
            self._scoring_used_s = max(self._scoring_used_s, self._least_used())
        self._scorings.append(scoring)

    def _least_used(self) -> float:
        """Where who comes anew starts to count: at the seconds of who has had the fewest."""
        used = [lane.used_s for weights in self._weights for lane in weights.lanes.values() if lane.members]
        if self._scorings:
            used.append(self._scoring_used_s)
        return min(used) if used else 0.0

    def _change_weights(self, loaded: "Loaded", waiter: Waiter) -> None:
        self._weights.append(_Weights(loaded))
        moved = []
        for weights in self._weights[:-1]:
            for lane in weights.lanes.values():
                moved += [_ticket(member) for member in lane.members if not member.started]
        for ticket in sorted(moved, key=lambda ticket: ticket.first):
            assert ticket.lane is not None
            ticket.lane.drop(ticket)
            self._enter(ticket)
        self._stats.refreshes += 1
        if self._release(waiter):
            self._resolve(waiter, waiter.result, None)

    def _end(self, waiter: Waiter, result: Any) -> None:
        """Let go of a request, wherever it is. result: what it gets; an exception, or None if it has given up."""
        if not self._release(waiter):
            return  # it ended before it could give up
        if isinstance(waiter, Ticket):
            assert waiter.lane is not None
            waiter.lane.drop(waiter)
        elif isinstance(waiter, Scoring):
            self._scorings.remove(waiter)
            waiter.work.close()
        if result is None:
            self._stats.cancelled += 1
        elif isinstance(result, Lost):
            self._stats.lost += 1
        elif isinstance(result, Exception):
            self._stats.broken += 1
        else:
            self._stats.answered += 1
        if result is not None:
            self._resolve(waiter, waiter.result, result)

    def _release(self, waiter: Waiter) -> bool:
        """Take who waits off the list; False if it was not there."""
        with self._wake:
            if waiter not in self._waiters:
                return False
            self._waiters.remove(waiter)
            self._rows -= waiter.rows
            return True

    def _lose_all(self, why: str) -> None:
        """Nobody will be answered any more."""
        for waiter in list(self._waiters):
            if self._dead is None:
                self._end(waiter, Lost(why))
            elif self._release(waiter):  # what is in the lanes is not to be trusted any more
                self._stats.lost += 1
                self._resolve(waiter, waiter.result, Lost(why))

    def _resolve(self, waiter: Waiter, future: "asyncio.Future[Any]", result: Any) -> None:
        """Have a future set in its loop; whoever watches is woken."""

        def resolve() -> None:
            if not future.done():
                if isinstance(result, BaseException):
                    future.set_exception(result)
                else:
                    future.set_result(result)
            if isinstance(waiter, Ticket) and waiter.watch is not None:
                waiter.watch.changed.set()

        self._post.put(waiter.loop, future, resolve)

    # --- network calls ---

    def _advance(self, weights: _Weights, view: int) -> None:
        """One network call of a lane, and what follows from it."""
        lane, began = weights.lanes[view], perf_counter()
        changes = lane.settle()
        for member, error in changes.failed:
            self._end(_ticket(member), Broken(f"the request could not be started: {words(error)}"))
        for ticket in map(_ticket, changes.begun):
            ticket.begun_at = perf_counter()
            self._observe("queue_seconds", ticket.begun_at - ticket.arrived)
            if ticket.begun is not None:
                self._resolve(ticket, ticket.begun, weights.loaded)
        self._post.send()  # who watches learns before the call that it has begun
        if lane.owner:
            self._call(weights.loaded, view, lane)
        lane.used_s += perf_counter() - began

    def _call(self, loaded: "Loaded", view: int, lane: Lane) -> None:
        rows, before, began = sum(m.cost for m in lane.owner.values()), lane.batch.network_calls, perf_counter()
        failure: Exception | None = None
        try:
            lane.batch.advance()
        except torch.AcceleratorError:  # the device will answer nothing any more
            raise
        except Exception as error:
            failure = error.with_traceback(None)  # which would keep alive what the call has made
        if failure is not None:
            self._call_in_parts(view, lane, rows, failure)
        calls, now = 1 if failure else lane.batch.network_calls - before, perf_counter()
        lane.called()
        if calls:
            self._count_call(rows, now - began)
        for ticket in map(_ticket, dict.fromkeys(lane.owner.values())):
            ticket.calls += calls
            if calls and ticket.first_token_at is None:
                ticket.first_token_at = now
                self._observe("first_token_seconds", now - ticket.arrived)
        ended = lane.batch.leave()
        self._show(lane, ended)
        for part in ended:
            self._take_out(loaded, lane, part)

    def _call_in_parts(self, view: int, lane: Lane, rows: int, failure: Exception) -> None:
        _log.warning("a network call for %d rows failed, it is made again in parts: %s", rows, words(failure))
        self._stats.failed_calls += 1
        for number, what in advance_in_parts(lane.batch, list(lane.owner)).items():
            if number in lane.owner:  # else another row of its request has failed, too
                self._end(_ticket(lane.owner[number]), Broken(f"the network failed: {what}"))
        if out_of_memory(failure):
            self.capacity.too_large(view, rows)
            lane.shrink()

    def _advance_scoring(self) -> None:
        """One network call for the texts of one request."""
        scoring, began = self._scorings[0], perf_counter()
        self._scorings.rotate(-1)
        try:
            next(scoring.work)
        except StopIteration as end:
            self._stats.scored += scoring.rows
            self._end(scoring, end.value)
        except Broken as error:
            self._end(scoring, error)
        except torch.AcceleratorError:
            raise
        except Exception as error:
            self._end(scoring, Broken(f"the network failed: {words(error)}"))
        self._scoring_used_s += perf_counter() - began

    def _count_call(self, rows: int, seconds: float) -> None:
        self._stats.calls += 1
        self._stats.call_seconds += seconds
        self._stats.rows_of_calls += rows
        self._stats.rows_per_call[rows] = self._stats.rows_per_call.get(rows, 0) + 1
        self._observe("rows_per_call", rows)
        self._observe("call_seconds", seconds)

    def _observe(self, name: Observed, value: float) -> None:
        if self._observer is not None:
            try:
                self._observer(name, value)
            except Exception:
                _log.exception("the observer of the engine failed, it is told of nothing more")
                self._observer = None

    # --- what comes out ---

    def _show(self, lane: Lane, ended: list[Rows]) -> None:
        """Leave snapshots of watched rows, those that have just ended among them."""
        watched = {number: ticket for number, ticket in lane.owner.items() if _ticket(ticket).watch is not None}
        if not watched:
            return
        numbers = torch.tensor(list(watched), device=lane.batch.device)
        sound = [(rows, torch.isin(rows.number, numbers) & ~rows.broken) for rows in ended]
        last = [rows.select(which) for rows, which in sound if bool(which.any())]
        gone = {number for rows in last for number in rows.number.tolist()}
        for number, calls, tokens in glance([*last, *lane.batch.rows(watched.keys() - gone)]):
            ticket = _ticket(watched[number])
            assert ticket.watch is not None
            ticket.watch.put(number - ticket.first, Snapshot(calls, tokens, number in gone))
            self._post.put(ticket.loop, ticket.watch, ticket.watch.changed.set)

    def _take_out(self, loaded: "Loaded", lane: Lane, rows: Rows) -> None:
        """Rows that have left the batch go to their requests."""
        places: dict[Ticket, list[int]] = {}
        for place, number in enumerate(rows.number.tolist()):
            places.setdefault(_ticket(lane.ended(number)), []).append(place)
        broken = rows.broken.tolist()
        self._rate.add(len(broken))
        for ticket, which in places.items():
            if any(broken[place] for place in which):
                self._end(ticket, Broken("the network answered with NaN or infinity: the model is damaged"))
                continue
            own = rows if len(places) == 1 else rows.select(torch.tensor(which, device=rows.number.device))
            ticket.ended.append(own)
            ticket.left -= len(which)
            if ticket.left == 0:
                self._finish(loaded, ticket)

    def _finish(self, loaded: "Loaded", ticket: Ticket) -> None:
        now = perf_counter()
        try:
            samples = collect(loaded.model, ticket.job, ticket.ended, ticket.calls, now - ticket.begun_at)
        except Exception as error:
            _log.exception("a request's rows can't be put together")
            return self._end(ticket, Broken(f"the result could not be put together: {words(error)}"))
        self._observe("last_token_seconds", now - ticket.arrived)
        self._observe("request_calls", ticket.calls)
        first = None if ticket.first_token_at is None else ticket.first_token_at - ticket.arrived
        self._end(ticket, Outcome(loaded, samples, ticket.begun_at - ticket.arrived, first))


def _ticket(member: Member) -> Ticket:
    assert isinstance(member, Ticket)
    return member
