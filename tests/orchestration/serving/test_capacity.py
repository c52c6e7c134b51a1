"""How many rows a call takes: from made-up costs of which the answer is known, and of a real model."""

import pytest

from orchestration.serving.capacity import MOST, Capacity, best, measure, measured
from tests.orchestration.serving.small_model import small_model


def always(rows: int) -> bool:
    return True


@pytest.mark.parametrize(
    ("cost", "expected"),
    [
        (lambda rows: 1e-3 * rows, 1),  # company brings nothing
        (lambda rows: 1e-3, MOST),  # company costs nothing
        (lambda rows: 1e-3 * (8 + rows), 64),  # 128 rows: 6 % more a second
        (lambda rows: 0.5 * (1 + 0.001 * rows), MOST),  # slow, but never too slow
        (lambda rows: 1.5 * (1 + 0.1 * rows), 2),  # a call of four takes more than two seconds
        (lambda rows: 1e-3 * max(rows, 16), 16),
    ],
)
def test_where_more_rows_bring_nothing(cost, expected):
    asked = []

    def call(rows: int) -> float:
        asked.append(rows)
        return cost(rows)

    assert best(measure(call, always)) == expected
    assert max(asked) <= min(4 * expected, MOST)
    assert len(set(asked)) == len(asked)


def test_one_slow_measurement_is_passed_over():
    costs = {1: 1e-3, 2: 3e-3, 4: 1e-3, 8: 1e-3, 16: 2.1e-3, 32: 4e-3, 64: 9e-3}
    assert best(measure(costs.__getitem__, always)) == 8


def test_memory_bounds_it():
    def call(rows: int) -> float:
        if rows > 8:
            raise RuntimeError("out of memory")
        return 1e-3

    assert best(measure(call, always)) == 8
    assert best(measure(lambda rows: 1e-3, lambda rows: rows <= 4)) == 4
    with pytest.raises(RuntimeError, match="nothing works"):
        measure(lambda rows: (_ for _ in ()).throw(RuntimeError("nothing works")), always)


def test_other_lengths_cost_what_their_tokens_cost():
    capacity = Capacity(length=32, rows=8)
    assert [capacity.places(length) for length in (32, 16, 64, 1000, 1)] == [8, 16, 4, 1, 256]
    capacity.too_large(16, 16)
    assert [capacity.places(16), capacity.places(32)] == [8, 8]
    capacity.too_large(16, 100)  # of before: never more than it is now
    assert capacity.places(16) == 8
    for _ in range(9):
        capacity.too_large(16, 1)
    assert capacity.places(16) == 1


def test_a_real_model_is_measured():
    loaded = small_model()
    capacity = measured(loaded.model, 32)
    assert [point.rows for point in capacity.points] == [2**power for power in range(len(capacity.points))]
    assert capacity.rows in [point.rows for point in capacity.points]
    assert all(point.seconds > 0 for point in capacity.points)
