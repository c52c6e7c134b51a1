"""Text that grows from left to right while tokens come in any order."""

import random

import pytest

from orchestration.serving.events import Step
from orchestration.serving.prefix import Prefix, cut


def step(positions, pieces, hidden=()):
    return Step(sample=0, call=0, positions=list(positions), pieces=list(pieces), levels=None, hidden=list(hidden))


@pytest.mark.parametrize("stops", [[], ["ab"], ["abc", "cd"], ["z", "aab"]])
def test_any_order_gives_the_text_before_the_first_stop(stops):
    draw = random.Random(0)
    for _ in range(200):
        pieces = draw.choices(["a", "b", "ab", "c", "d", ""], k=8)
        prefix = Prefix(["p", *[None] * 8, "s"], 1, 9, stops)
        told = prefix.grown()
        wanted, stopped = cut("".join(pieces), stops)
        for place in draw.sample(range(8), 8):
            told += prefix.show(step([place + 1], [pieces[place]]))
            assert wanted.startswith(told)
        rest, ended = prefix.rest("".join(pieces))
        assert (told + rest, ended) == (wanted, stopped)


def test_nothing_is_held_back_without_a_reason():
    prefix = Prefix([None] * 4, 0, 4, ["xyz"])
    assert prefix.show(step([1], ["b"])) == ""
    assert prefix.show(step([0], ["a"])) == "ab"
    assert prefix.show(step([2], ["x"])) == ""
    assert prefix.show(step([3], ["!"])) == "x!"


def test_parts_of_characters_and_ends_of_text_wait_for_the_end():
    prefix = Prefix([None] * 3, 0, 3, [])
    assert prefix.show(step([0, 1, 2], ["a", "\ufffd", "\ufffd"])) == "a"
    assert prefix.rest("aü") == ("ü", False)
    prefix = Prefix([None] * 3, 0, 3, [])
    assert prefix.show(step([0, 1, 2], ["a", "<|endoftext|>", "b"])) == "a"
    assert prefix.rest("a") == ("", False)


def test_what_may_be_taken_back_is_not_told():
    prefix = Prefix([None] * 2, 0, 2, [], revises=True)
    assert prefix.show(step([0], ["a"])) == ""
    assert prefix.show(step([1], ["c"], hidden=[0])) == ""
    assert prefix.rest("bc") == ("bc", False)


def test_the_prompt_may_be_part_of_it():
    prefix = Prefix(["x", "y", None], 2, 3, [], echo=True)
    assert prefix.grown() == "xy"
    assert prefix.show(step([2], ["z"])) == "z"


def test_stop_strings_of_the_prompt_end_nothing():
    """Nor does one that begins in it."""
    prefix = Prefix(["x", "y", None, None], 2, 4, ["x", "yz"], echo=True)
    assert prefix.grown() == "xy"
    assert prefix.show(step([2], ["z"])) == "z"
    assert prefix.show(step([3], ["x"])) == ""
    assert prefix.rest("xyzx", 2) == ("", True)
