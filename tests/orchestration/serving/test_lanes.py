"""Who gets a place: by hand, and on random walks on which every row must end with its own tokens."""

import random

import pytest
import torch

from md4 import samplers
from md4.samplers import Job, SamplingConfig
from orchestration.serving.lanes import Lane, Member
from tests.md4.oracle import Toy

TOY = Toy(vocabulary=3, length=4)


def member(first: int, count: int, cost: int = 1, **settings) -> Member:
    canvas = torch.full((count, 4), TOY.mask)
    job = Job(canvas, first + torch.arange(count), SamplingConfig(**{"sampler": "first_hitting", **settings}))
    return Member(job=job, first=first, cost=cost)


def lane(places: int, slice_calls: int = 100) -> Lane:
    return Lane(TOY.model(timed=True), lambda: places, slice_calls)


def held(lane: Lane) -> list[int]:
    assert len(lane.batch) == len(lane.owner)
    return [len(member.running) for member in lane.members]


def test_a_lonely_request_has_all_places():
    here = lane(8)
    here.add(member(0, 64))
    assert [one.first for one in here.settle().begun] == [0]
    assert held(here) == [8]
    assert here.settle().begun == []


def test_places_are_shared_evenly_at_once():
    here = lane(8)
    here.add(member(0, 64))
    here.settle()
    here.add(member(100, 2))
    here.add(member(200, 64))
    here.settle()
    assert held(here) == [3, 2, 3]
    assert here.members[0].parked == [7, 6, 5, 4, 3]  # the last to come are the first to go
    here.drop(here.members[2])
    here.settle()
    assert held(here) == [6, 2]
    assert set(here.members[0].running) == {0, 1, 2, 7, 6, 5}  # parked rows come before new ones


def test_rows_that_cost_two_have_half_as_many():
    here = lane(8)
    here.add(member(0, 9, cost=2))
    here.add(member(100, 9))
    here.settle()
    assert held(here) == [2, 4]
    alone = lane(1)
    alone.add(member(0, 3, cost=2))
    alone.settle()
    assert held(alone) == [1]  # more than there is room for, but else it would never be its turn


def test_a_new_request_waits_for_a_slice_and_those_that_made_room_come_back():
    here = lane(2, slice_calls=3)
    for first in (0, 100):
        here.add(member(first, 1, sampler="p2", steps=50))
    here.settle()
    here.add(member(200, 1, sampler="p2", steps=50))
    for _ in range(3):
        here.settle()
        assert held(here) == [1, 1, 0]
        here.called()
    here.settle()
    assert held(here) == [0, 1, 1]
    seen = set()
    for _ in range(30):
        here.called()
        here.settle()
        seen.add(tuple(held(here)))
    assert seen == {(0, 1, 1), (1, 0, 1), (1, 1, 0)}


def test_fewer_places_than_before():
    places = [8]
    here = Lane(TOY.model(), lambda: places[0], 100)
    here.add(member(0, 8))
    here.add(member(100, 2))
    here.settle()
    assert held(here) == [6, 2]
    places[0] = 3
    here.shrink()
    assert held(here) in ([1, 2], [2, 1])
    places[0] = 1
    here.shrink()
    assert sum(held(here)) == 1


def test_a_request_that_cannot_be_started_is_named():
    here = lane(4)
    here.add(member(0, 2))
    bad = member(100, 2)
    bad.job.canvas[1, 0] = TOY.mask + 1
    here.add(bad)
    changes = here.settle()
    assert [one for one, _ in changes.failed] == [bad]
    assert "the mask id" in str(changes.failed[0][1])
    here.drop(bad)
    here.batch.advance()
    assert held(here) == [2]


@pytest.mark.parametrize("seed", range(3))
def test_on_a_random_walk_every_row_ends_with_its_own_tokens(seed):
    """Requests come and go, rows are parked, moved and taken out: those that stay get what they get alone."""
    draw = random.Random(seed)
    here, ended, dropped = lane(3, slice_calls=2), {}, set()
    requests = []
    for number in range(25):
        settings = draw.choice([{}, {"sampler": "p2", "steps": 6}, {"steps": 9, "sampler": "remdm", "eta": 0.5}])
        requests.append(member(100 * number, draw.randint(1, 6), cost=draw.choice([1, 1, 2]), **settings))
    waiting = list(requests)
    for _ in range(2000):
        if waiting and draw.random() < 0.3:
            here.add(waiting.pop())
        if here.members and draw.random() < 0.02:
            gone = draw.choice(here.members)
            dropped.add(gone.first)
            here.drop(gone)
        here.settle()
        if sum(len(one.running) > 0 for one in here.members) > 1:
            assert sum(one.held for one in here.members) <= 3
        here.batch.advance()
        here.called()
        for rows in here.batch.leave():
            for number, tokens in zip(rows.number.tolist(), rows.tokens.tolist(), strict=True):
                ended[number] = tokens
                owner = here.ended(number)
                if owner.waiting == 0 and not owner.running:
                    here.drop(owner)
    assert not waiting
    assert not here.members
    alone = samplers.run(TOY.model(timed=True), [one.job for one in requests])
    for one, samples in zip(requests, alone, strict=True):
        numbers = [one.first + row for row in range(len(one.job))]
        if one.first not in dropped:
            assert [ended[number] for number in numbers] == samples.tokens.tolist()
    assert 0 < len(dropped) < 25
