"""Mixtures: each set in its own order, at its exact share, the same batches however they are cut."""

import hashlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from md4.errors import UserError
from pipelines.full_order import FullOrder
from pipelines.mixture import Mixture
from pipelines.order import Order, share
from pipelines.quotas import CYCLE, quotas


@st.composite
def mixtures(draw) -> Mixture:
    slices = draw(st.integers(1, 8))
    batch, seed = slices * draw(st.integers(1, 12)), draw(st.integers(0, 2**64 - 1))
    weights = quotas(draw(st.lists(st.floats(0.05, 1), min_size=1, max_size=4)))
    orders = []
    for number in range(len(weights)):
        rows, name = draw(st.integers(5, 500)), str(number)
        if draw(st.booleans()):
            orders.append(FullOrder(rows, batch, slices, seed, name))
        else:
            orders.append(Order(rows, batch, slices, seed, draw(st.integers(1, 60)), draw(st.integers(1, 6)), name))
    return Mixture(tuple(orders), weights)


def assert_each_set_is_in_its_own_order(mixture: Mixture, steps: int) -> None:
    """What a lane takes from a set is that lane of the set's own order, so each of its epochs has each row once."""
    sets, rows = mixture.rows_at(0, steps)
    for which, order in enumerate(mixture.orders):
        own = order.rows_at(0, steps)
        for lane in range(mixture.slices):
            taken = rows[:, lane][sets[:, lane] == which]
            assert np.array_equal(taken, own[:, lane].ravel()[: len(taken)])
    seen = [(sets == which).sum() / order.rows for which, order in enumerate(mixture.orders)]
    assert mixture.epochs(steps) == pytest.approx(seen)


def assert_every_cut_is_the_same(mixture: Mixture, start: int, steps: int, data) -> None:
    stop = start + steps
    sets, rows = mixture.rows_at(start, stop)
    world = data.draw(st.integers(1, mixture.slices), "world")
    shares = [mixture.rows_at(start, stop, *share(rank, world, mixture.slices)) for rank in range(world)]
    assert np.array_equal(np.concatenate([part for part, _ in shares], axis=1), sets)
    assert np.array_equal(np.concatenate([part for _, part in shares], axis=1), rows)
    first, last = share(world - 1, world, mixture.slices)
    slots = (last - first) * mixture.slice_size
    at_least, at_most = data.draw(st.integers(1, 20), "at least"), data.draw(st.integers(1, 30), "at most")
    found = np.full((steps, slots), -1)
    for which in range(len(mixture.orders)):
        units = list(mixture.units(which, start, stop, (first, last), at_least, at_most))
        assert [lo for lo, _ in units] == [start] + [hi for _, hi in units[:-1]]
        assert units[-1][1] == stop
        for lo, hi in units:
            part = mixture.part(which, lo, hi, first, last)
            assert (np.diff(part.places) > 0).all()
            found[lo - start : hi - start].ravel()[part.places] = part.rows
    assert np.array_equal(found, rows[:, first:last].reshape(steps, -1))


@settings(max_examples=30, deadline=None)
@given(mixtures(), st.integers(1, 80))
def test_each_set_is_in_its_own_order(mixture, steps):
    assert_each_set_is_in_its_own_order(mixture, steps)


@settings(max_examples=40, deadline=None)
@given(mixtures(), st.integers(0, 10**6), st.integers(1, 15), st.data())
def test_every_cut_gives_the_same_batches(mixture, start, steps, data):
    assert_every_cut_is_the_same(mixture, start, steps, data)


@pytest.mark.slow
@settings(max_examples=300, deadline=None)
@given(mixtures(), st.integers(1, 300))
def test_each_set_is_in_its_own_order_long(mixture, steps):
    assert_each_set_is_in_its_own_order(mixture, steps)


@pytest.mark.slow
@settings(max_examples=300, deadline=None)
@given(mixtures(), st.integers(0, 10**9), st.integers(1, 60), st.data())
def test_every_cut_gives_the_same_batches_long(mixture, start, steps, data):
    assert_every_cut_is_the_same(mixture, start, steps, data)


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.integers(1, 50), min_size=2, max_size=5), st.integers(1, 64), st.integers(1, 6), st.integers(0, 3000)
)
def test_shares_are_exact_in_every_cycle_and_near_in_every_place(weights, slices, m, start):
    """A lane's 1024 places in a row have each set its weight of times; one place of all slices is at most 1 off."""
    orders = tuple(FullOrder(1000, slices * m, slices, 0, str(number)) for number in range(len(weights)))
    mixture = Mixture(orders, quotas(weights))
    sets, _ = mixture.rows_at(start, start + CYCLE)
    for which, weight in enumerate(mixture.weights):
        mine = sets == which
        assert (mine.sum((0, 2)) == weight * m).all()
        assert (abs(mine.sum(1) - slices * weight / CYCLE) < 1 + 1e-9).all()


def test_one_order_by_itself_is_unchanged():
    order = Order(1003, 48, 8, seed=7, group=16, mixing=3)
    sets, rows = Mixture((order,)).rows_at(5, 90, 2, 7)
    assert not sets.any()
    assert np.array_equal(rows, order.rows_at(5, 90, 2, 7))


def test_the_mixture_is_the_one_of_earlier_versions():
    """A run that is resumed by a newer version must see the data that it would have seen: this may never change."""
    orders = (Order(1003, 48, 8, 7, 16, 3, "one"), FullOrder(400, 48, 8, 7, "two"))
    ids = np.stack(Mixture(orders, (700, 324)).rows_at(0, 100))
    assert (
        hashlib.sha256(ids.astype("<i8").tobytes()).hexdigest()
        == "7e3abd003452d2a6034064a55f79d382c53d4ac5ac893508c168e95e6bf285b8"
    )


def test_far_ahead_costs_what_the_start_costs():
    orders = (Order(1003, 48, 8, 7, 16, 3, "one"), FullOrder(400, 48, 8, 7, "two"))
    mixture = Mixture(orders, (1023, 1))
    far = mixture.rows_at(10**12, 10**12 + 3)
    assert np.array_equal(far, [ids[2:] for ids in mixture.rows_at(10**12 - 2, 10**12 + 3)])
    assert next(mixture.units(1, 0, 10**5, (0, 8)))[1] > 1000  # a rare set is read for many steps at once


@settings(max_examples=100)
@given(st.lists(st.floats(0.01, 1), min_size=1, max_size=8))
def test_integer_weights_are_within_one_of_the_given(weights):
    whole = quotas(weights)
    assert sum(whole) == CYCLE
    assert all(abs(n - weight / sum(weights) * CYCLE) < 1 for n, weight in zip(whole, weights, strict=True))


def test_integer_weights():
    assert quotas([3, 1]) == (768, 256)
    assert quotas([1, 1, 1]) == (342, 341, 341)
    with pytest.raises(UserError, match=r"a weight of 1 out of 5001 is too small: .* 1/1024"):
        quotas([5000, 1])


def test_what_cannot_be_mixed():
    one, two = FullOrder(10, 8, 4, 0, "one"), FullOrder(10, 8, 4, 0, "two")
    with pytest.raises(UserError, match="stands twice"):
        Mixture((one, one), (512, 512))
    with pytest.raises(ValueError, match="sum to 1024"):
        Mixture((one, two), (512, 511))
    with pytest.raises(ValueError, match="same batch size"):
        Mixture((one, FullOrder(10, 16, 4, 0, "two")), (512, 512))
