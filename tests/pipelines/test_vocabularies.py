import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from md4.errors import UserError
from pipelines.vocabularies import Characters, token_dtype, vocabulary
from tests.shared import shared

TEXT8 = Characters()


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Hello, World!", "hello world"),
        ("don't   stop\n\tnow", "don t stop now"),
        ("in 2004", "in two zero zero four"),
        ("x2y", "x two y"),
        ("naïve café, Ångström", "naive cafe angstrom"),
        ("Straße, Æsop, œuvre, Łódź", "strasse aesop oeuvre lodz"),
        ("İstanbul", "istanbul"),
        ("\N{LATIN SMALL LIGATURE FI}ne x²", "fine x two"),
        ("日本語 and Ω", "and"),
        ("  ...  ", ""),
        ("", ""),
    ],
)
def test_normalise(text, expected):
    assert TEXT8.normalise(text) == expected


def test_published_text8_is_already_normal():
    text = shared("data", "text8", "text8.first3010294").read_text()[:200_000].strip()
    assert TEXT8.normalise(text) == text


@given(st.text())
def test_normalised_text_survives_encoding(text):
    normal = TEXT8.normalise(text)
    assert TEXT8.normalise(normal) == normal
    assert "  " not in normal
    tokens = TEXT8.encode(normal)
    assert tokens.dtype == np.uint8
    assert len(tokens) == len(normal)
    assert TEXT8.decode(tokens) == normal


def test_token_ids_are_those_of_text8():
    assert TEXT8.size == 27
    assert TEXT8.encode("az ").tolist() == [0, 25, 26]
    assert TEXT8.encode(TEXT8.symbols).tolist() == list(range(27))
    assert TEXT8.encode("").tolist() == []


def test_the_mask_is_shown_as_a_hole():
    assert TEXT8.decode(np.array([0, 27, 26, 27, 1])) == "a_ _b"


@pytest.mark.parametrize("wrong", [28, -1])
def test_decode_refuses_other_ids(wrong):
    with pytest.raises(ValueError, match=str(wrong)):
        TEXT8.decode(np.array([0, wrong]))


def test_prompts_have_holes():
    ids = TEXT8.encode_prompt("The _ b")
    assert ids.dtype == np.int64
    assert ids.tolist() == [19, 7, 4, 26, 27, 26, 1]


@pytest.mark.parametrize(
    ("prompt", "char", "position"), [("ab3", "'3'", 2), ("a, b", "','", 1), ("İx é", "'İ'", 0), ("aé", "'é'", 1)]
)
def test_prompts_with_other_characters_are_refused(prompt, char, position):
    with pytest.raises(UserError) as caught:
        TEXT8.encode_prompt(prompt)
    message = str(caught.value)
    assert f"{char} at position {position}" in message
    assert "a-z, the space and '_'" in message


def test_text_with_a_hole_is_not_plain_text():
    with pytest.raises(UserError, match="'_' at position 1"):
        TEXT8.encode("a_b")


def test_vocabularies_by_name():
    assert vocabulary("text8").size == 27
    with pytest.raises(UserError, match=r"unknown vocabulary 'text9'.*did you mean 'text8'"):
        vocabulary("text9")


@pytest.mark.parametrize(
    ("size", "dtype"), [(27, "uint8"), (256, "uint8"), (257, "uint16"), (50257, "uint16"), (65537, "int32")]
)
def test_tokens_are_stored_small(size, dtype):
    assert token_dtype(size) == dtype
    assert np.array(size - 1).astype(token_dtype(size)) == size - 1
