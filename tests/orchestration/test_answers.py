"""Answers to texts with holes: those that can never come out, or always do, are refused, and no others."""

import itertools

import pytest

from md4.errors import UserError
from orchestration.suites.answers import check
from pipelines.vocabularies import Characters, Vocabulary
from tests.pipelines.test_trained_vocabularies import WORDS as PAIRS

WORDS = Characters()


def refused(text: str, answer: str, length: int | None = None, words: Vocabulary = WORDS) -> str:
    """Why; "" for an answer that is accepted."""
    prompt = words.encode_prompt(text)
    try:
        check(words, prompt, length or len(prompt), words.normalise(answer))
    except UserError as error:
        return str(error)
    return ""


@pytest.mark.parametrize(
    ("text", "answer", "length", "expected"),
    [
        ("return t_ue", "return true", None, ""),
        ("a_c_", "abcd", None, ""),
        ("a_c", "ab", None, ""),  # all holes, though not all that is given behind them
        ("a_", "abc", 8, ""),
        ("a", "ab", 3, ""),
        ("return t_ue", "return trues", None, "can never come out: it has 12 tokens, the text 11"),
        ("return t_ue", "return fake", None, "can never come out: it doesn't go with 'return t', which is given"),
        ("a_c_e", "abcdf", None, "doesn't go with 'e'"),
        ("a__d", "abde", None, "doesn't go with 'd'"),
        ("a_c_", "abc", None, "ends before the last hole"),
        ("a__", "ab", 8, "ends before the last hole"),
        ("ab_", "ab ", None, "ends before the last hole"),  # normalised: without the space
        ("ab", "ab", 3, "always comes out: the text itself begins with it"),
    ],
)
def test_reasons(text, answer, length, expected):
    assert expected in refused(text, answer, length) if expected else not refused(text, answer, length)


def test_all_short_ones():
    """Accepted is just what some fillings begin with, and says something of every hole of the text."""
    for text, length in (("a_b", 3), ("_a", 2), ("_a", 3), ("a_", 3), ("a", 2), ("_b_", 3), ("__", 2)):
        canvas = text.ljust(length, "_")
        holes = [i for i, symbol in enumerate(text) if symbol == "_"] or [len(text)]
        fillings = ["".join(found) for found in itertools.product(*("ab" if c == "_" else c for c in canvas))]
        for size in range(1, 5):
            for answer in map("".join, itertools.product("ab", repeat=size)):
                sound = size > holes[-1] and any(one.startswith(answer) for one in fillings)
                assert bool(refused(text, answer, length)) != sound, (text, length, answer)


def test_tokens_of_many_lengths():
    """A hole takes a token, however many letters that has; what is cut into other tokens is the same text."""
    text = "the cat"
    tokens = PAIRS.encode(text)
    for place in range(len(tokens)):
        left, right = PAIRS.decode(tokens[:place]), PAIRS.decode(tokens[place + 1 :])
        assert not refused(f"{left}_{right}", text, words=PAIRS)
        assert "doesn't go with" in refused(f"{left}_{right}!", text + "?", words=PAIRS)
    assert "can never come out" in refused("the_", "the cat sat on the mat", words=PAIRS)
    assert not refused("the_", "the cat sat on the mat", 64, words=PAIRS)
    assert "ends before the last hole" in refused("the_ sat_", "thex sat", words=PAIRS)
