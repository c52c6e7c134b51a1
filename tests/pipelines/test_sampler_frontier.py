"""Which points are on the frontier, and what is best for a number of calls."""

import random

from pipelines.sampler_frontier import Figure, SamplerPoint, best_within, frontier_of


def point(calls: float, score: float, **settings) -> SamplerPoint:
    return SamplerPoint(
        settings={"sampler": "ancestral", **settings},
        calls=Figure(value=calls, standard_error=0),
        score=Figure(value=score, standard_error=0.1),
        figures={},
    )


def test_the_frontier_falls_and_nothing_below_it_is_left_out():
    draw = random.Random(0)
    points = frontier_of([point(draw.uniform(1, 40), draw.random()) for _ in range(60)])
    best = sorted((one for one in points if one.frontier), key=lambda one: one.calls.value)
    assert 1 < len(best) < 30
    for one in points:
        cheaper = [other for other in points if other.calls.value <= one.calls.value + 0.5]
        assert one.frontier == (one.score.value == min(other.score.value for other in cheaper))


def test_a_leftover_more_is_no_more_calls():
    points = [point(16.02, 0.3), point(15.8, 0.4), point(17, 0.1)]
    assert [one.frontier for one in frontier_of(points)] == [True, False, True]
    assert best_within(points, 16) == points[0]
    assert best_within(points, 20) == points[2]
    assert best_within(points, 8) is None


def test_a_title_says_the_setting_but_for_its_steps():
    assert point(8, 1, steps=8, grid="searched").title == "ancestral, grid=searched"
    assert point(8, 1, extrapolate=True).title == "ancestral, extrapolate"
