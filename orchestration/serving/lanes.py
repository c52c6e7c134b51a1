"""Rows that can share a network call: those of the same weights whose network input has the same length.

A lane has places, as many as a call should take rows. Requests share them fairly, between any two calls: a place goes
to the request that has the fewest rows running, the one that waits longest first, and a request that holds two more
than another that waits gives one up. So a request of 64 rows fills a lane that nobody else wants, and keeps its part of
one that others want, too. Where there are more requests than places, rows that have run for a slice of calls take turns
with those that wait. Rows that make room are parked as they stand: their tokens don't change by it.
"""

import heapq
import itertools
from collections.abc import Callable
from dataclasses import dataclass, field

from md4.objectives import MaskedDiffusion
from md4.samplers import Batch, Job

_turns = itertools.count()


@dataclass(eq=False)
class Member:
    """A request, as a lane sees it: its rows, and what it has of the lane."""

    job: Job
    first: int  # number of its first row; the others count up
    cost: int  # places that a row takes: a guided one takes two
    started: int = 0  # rows that were started, ended ones included
    running: list[int] = field(default_factory=list)  # numbers, in the order in which they got their places
    parked: list[int] = field(default_factory=list)  # numbers
    turn: int = field(default_factory=lambda: next(_turns))  # of those with equally many places the lowest is first

    @property
    def held(self) -> int:
        """Places."""
        return self.cost * len(self.running)

    @property
    def waiting(self) -> int:
        """Rows without a place."""
        return len(self.job) - self.started + len(self.parked)


@dataclass
class Changes:
    """What `settle` did."""

    begun: list[Member] = field(default_factory=list)  # whose first row was started
    failed: list[tuple[Member, Exception]] = field(default_factory=list)  # whose rows can't be started


class Lane:
    """Rows under way, and the requests whose rows wait to be.

    places: rows that a call should take, asked for whenever places are given.
    """

    def __init__(self, model: MaskedDiffusion, places: Callable[[], int], slice_calls: int):
        self.batch, self._parked = Batch(model), Batch(model)
        self.places, self.slice_calls = places, slice_calls
        self.members: list[Member] = []
        self.owner: dict[int, Member] = {}  # of running rows, by number, in the order in which they got their places
        self.used_s = 0.0  # seconds of its turns
        self._since: dict[int, int] = {}  # calls that had been made when a row got its place
        self._calls = 0
        self._settled = True
        self._serial = itertools.count()

    def add(self, member: Member) -> None:
        self.members.append(member)
        self._settled = False

    def drop(self, member: Member) -> None:
        """Forget a request and all of its rows."""
        if member.running:
            self.batch.remove(member.running)
        if member.parked:
            self._parked.remove(member.parked)
        for number in member.running:
            del self.owner[number], self._since[number]
        member.running, member.parked = [], []
        self.members.remove(member)
        self._settled = False

    def ended(self, number: int) -> Member:
        """A row has left the batch; whose it was."""
        member = self.owner.pop(number)
        del self._since[number]
        member.running.remove(number)
        self._settled = False
        return member

    def called(self) -> None:
        """The rows have had a call."""
        self._calls += 1

    def settle(self) -> Changes:
        """Give places to rows that wait, and start those that are new."""
        heap = [self._entry(member) for member in self.members if member.waiting]
        if not heap or (self._settled and not self._slice_over()):
            return Changes()
        self._settled = True
        heapq.heapify(heap)
        before = dict(self.owner)
        new: dict[Member, list[int]] = {}
        free = self.places() - sum(member.held for member in self.members)
        while heap:
            held, _, _, member = heap[0]
            if held != member.held or not member.waiting:  # it got or lost places since
                heapq.heappop(heap)
                if member.waiting:
                    heapq.heappush(heap, self._entry(member))
            elif free >= member.cost or not self.owner:
                number, fresh = self._place(member)
                if fresh:
                    new.setdefault(member, []).append(number)
                free -= member.cost
            elif (number := self._loser(member, before)) is not None:
                loser = self._park(number)
                free += loser.cost
                if loser.held:  # else it had its slice
                    heapq.heappush(heap, self._entry(loser))
            else:
                break
        return self._carry_out(before, new)

    def shrink(self) -> None:
        """Park rows until the others fit the places, of which there may be fewer than before."""
        gone = []
        while len(self.owner) > 1 and sum(member.held for member in self.members) > self.places():
            gone.append(max(self.members, key=lambda member: member.held).running[-1])
            self._park(gone[-1])
        self.batch.move(gone, self._parked)
        self._settled = False

    def _entry(self, member: Member) -> tuple[int, int, int, Member]:
        return member.held, member.turn, next(self._serial), member

    def _slice_over(self) -> bool:
        oldest = next(iter(self.owner), None)
        return oldest is not None and self._calls - self._since[oldest] >= self.slice_calls

    def _place(self, member: Member) -> tuple[int, bool]:
        """Give a row a place: its number, and whether it is new. Parked rows go first: they have tokens already."""
        fresh = not member.parked
        number = member.first + member.started if fresh else member.parked.pop(0)
        member.started += fresh
        member.running.append(number)
        self.owner[number] = member
        self._since[number] = self._calls
        return number, fresh

    def _loser(self, member: Member, before: dict[int, Member]) -> int | None:
        """The row that has to make room for one of `member`; None if there is none. Only rows of `before` move."""
        most = max((other for other in self.members if other.running), key=lambda other: other.held)
        if most.held - member.held >= 2 * max(most.cost, member.cost) and most.running[-1] in before:
            return most.running[-1]  # the last to come, so that the first ones end
        # Requests with nothing: new ones at once, those that made room when all of them may come back.
        turns = member.held == 0 and (not member.started or self._calls % self.slice_calls == 0)
        oldest = next(iter(self.owner))
        return oldest if turns and self._slice_over() and oldest in before else None

    def _park(self, number: int) -> Member:
        member = self.owner.pop(number)
        del self._since[number]
        member.running.remove(number)
        member.parked.append(number)
        member.turn = next(_turns)
        return member

    def _carry_out(self, before: dict[int, Member], new: dict[Member, list[int]]) -> Changes:
        """Let the batches follow what was decided."""
        changes, fresh = Changes(), {number for numbers in new.values() for number in numbers}
        gone = [number for number in before if number not in self.owner]
        back = [number for number in self.owner if number not in before and number not in fresh]
        if gone:
            self.batch.move(gone, self._parked)
        if back:
            self._parked.move(back, self.batch)
        for member, numbers in new.items():
            start = numbers[0] - member.first
            try:
                self.batch.join(member.job.part(start, start + len(numbers)), numbers)
            except Exception as error:  # whatever it is, it is about this request alone
                changes.failed.append((member, error))
            else:
                if start == 0:
                    changes.begun.append(member)
        return changes
