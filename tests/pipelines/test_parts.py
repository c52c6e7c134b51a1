"""Cutting documents, and dealing them out to splits."""

from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from pipelines.part_shards import assign
from pipelines.text_part import cut


@given(st.lists(st.text("abc", min_size=1, max_size=30), max_size=60).map(" ".join), st.integers(1, 50))
def test_cut_loses_nothing_but_the_spaces_it_cuts_at(text, most):
    pieces = cut(text, most)
    assert " ".join(pieces) == text
    assert all(len(piece) <= most or " " not in piece for piece in pieces)
    assert all(pieces)


def test_splits_have_their_shares():
    """20,000 documents: each share within 5 standard deviations, which chance leaves once in 10^6."""
    splits = Counter(assign(f"document {i}", 0.1, 0.2)[0] for i in range(20_000))
    for name, share in (("validation", 0.1), ("test", 0.2), ("train", 0.7)):
        assert abs(splits[name] / 20_000 - share) < 5 * (share * (1 - share) / 20_000) ** 0.5


@given(st.text(), st.floats(0, 0.4), st.floats(0, 0.4))
def test_a_larger_validation_share_leaves_the_test_split_alone(text, less, more):
    less, more = sorted((less, more))
    before, after = assign(text, less, 0.2)[0], assign(text, more, 0.2)[0]
    assert (before == "test") == (after == "test")
    assert before == after or (before, after) == ("train", "validation")
