"""The ledger: the same for the same rows whoever took them, another for any other row, slot, step or set."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pipelines.full_order import FullOrder
from pipelines.ledger import DIGITS, Ledger, digest, expected, head_at
from pipelines.mixture import Mixture
from pipelines.order import Order, share
from tests.pipelines.test_mixture import mixtures

MIXTURE = Mixture((Order(103, 24, 8, 1, 8, 3, "one"), FullOrder(60, 24, 8, 1, "two")), (700, 324))


def consume(mixture: Mixture, ledgers: list[Ledger], start: int, stop: int) -> None:
    """Workers take their shares of some steps, and settle."""
    parts = []
    for rank, ledger in enumerate(ledgers):
        first, last = share(rank, len(ledgers), mixture.slices)
        slots = np.arange(first * mixture.slice_size, last * mixture.slice_size)
        sets, rows = mixture.rows_at(start, stop, first, last)
        for nth in range(stop - start):
            ledger.add(start + nth, slots, sets[nth].ravel(), rows[nth].ravel())
        ledger.settle(lambda sums: parts.append(sums) or torch.zeros(0))  # keeps what it would send
    for ledger in ledgers:
        ledger._sums = [torch.stack(parts).sum(0)[nth] for nth in range(stop - start)]
        ledger.settle()


@settings(max_examples=40, deadline=None)
@given(mixtures(), st.integers(1, 12), st.integers(1, 12), st.data())
def test_any_workers_and_a_resume_on_others_give_what_the_order_says(mixture, before, after, data):
    one, other = (data.draw(st.integers(1, mixture.slices), name) for name in ("workers", "workers later"))
    ledgers = [Ledger(mixture) for _ in range(one)]
    consume(mixture, ledgers, 0, before)
    assert len({ledger.head for ledger in ledgers}) == 1
    resumed = [Ledger(mixture, ledgers[0].dump()) for _ in range(other)]
    consume(mixture, resumed, before, before + after)
    assert {ledger.head for ledger in resumed} == {head_at(mixture, before + after)}
    wanted = "".join(digest(value) for value in expected(mixture, 0, before + after))
    assert [ledger.take_digests() for ledger in resumed] == [wanted] * other
    assert resumed[0].take_digests() == ""
    assert len(wanted) == DIGITS * (before + after)


@pytest.mark.parametrize("what", ["slot", "set", "row", "step", "order of two rows"])
def test_every_change_is_seen(what):
    sets, rows = (ids[0].ravel() for ids in MIXTURE.rows_at(4, 5))
    slots, step = np.arange(24), 4
    assert rows[5] != rows[6]

    def head(step, slots, sets, rows) -> str:
        ledger = Ledger(MIXTURE, {"step": step, "head": "", "digests": ""})
        ledger.add(step, slots, sets, rows)
        ledger.settle()
        return ledger.head

    sound = head(step, slots, sets, rows)
    if what == "step":
        step += 1
    elif what == "slot":
        slots = slots + (slots == 23)
    elif what == "set":
        sets = np.where(slots == 5, 1 - sets, sets)
    elif what == "row":
        rows = rows + (slots == 5)
    else:
        rows = rows[[*range(5), 6, 5, *range(7, 24)]]
        sets = sets[[*range(5), 6, 5, *range(7, 24)]]
    assert head(step, slots, sets, rows) != sound


def test_the_same_rows_of_another_set_are_others():
    """So a data set that changed, whose fingerprint is then another, shows, whatever the row ids are."""
    other = Mixture((Order(103, 24, 8, 1, 8, 3, "changed"), MIXTURE.orders[1]), (700, 324))
    sets, rows = (ids[0].ravel() for ids in MIXTURE.rows_at(0, 1))
    heads = []
    for mixture in (MIXTURE, other):
        ledger = Ledger(mixture)
        ledger.add(0, np.arange(24), sets, rows)
        ledger.settle()
        heads.append(ledger.head)
    assert heads[0] != heads[1]
    assert heads[0] == head_at(MIXTURE, 1)


def test_steps_come_in_turn():
    with pytest.raises(ValueError, match="at step 0, got step 1"):
        Ledger(MIXTURE).add(1, np.arange(1), np.zeros(1, np.int64), np.zeros(1, np.int64))


def test_the_ledger_is_the_one_of_earlier_versions():
    """Checkpoints keep it."""
    assert head_at(MIXTURE, 0) == ""
    assert head_at(MIXTURE, 100) == "e7dc2c368b46cebdb8d0abe11b51071a"
