import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from md4.errors import UserError
from pipelines.vocabularies import BytePairs, Characters, Pixels, one_token, token_dtype, vocabulary
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


def test_holes_of_several_tokens():
    assert TEXT8.encode_prompt("a_{3}_b_{12}").tolist() == [0, *[27] * 4, 1, *[27] * 12]
    for prompt in ("a_{0}", "_{1048577}", "_{999999999}_{999999999}"):
        with pytest.raises(UserError, match=r"each has at least 1, all together 1,048,576"):
            TEXT8.encode_prompt(prompt)


@pytest.mark.parametrize(("text", "token"), [("a", 0), (" ", 26)])
def test_one_token(text, token):
    assert one_token(TEXT8, text) == token


@pytest.mark.parametrize("text", ["", "ab", "<|endoftext|>", "_", "."])
def test_what_is_not_one_token_is_refused(text):
    with pytest.raises(UserError):
        one_token(TEXT8, text)


def test_prompts_of_levels():
    """What `decode` writes comes back, with holes of any length."""
    pixels = Pixels(17)
    ids = np.array([0, 16, 17, 17, 3])
    assert pixels.encode_prompt(pixels.decode(ids)).tolist() == ids.tolist()
    assert pixels.encode_prompt("5_{3}5 _").tolist() == [5, 17, 17, 17, 5, 17]
    for wrong in ("17", "-1", "1.5", "x", "\u0663"):
        with pytest.raises(UserError, match=f"'{wrong}' at position 1 is no level of the vocabulary 'pixels17'"):
            pixels.encode_prompt(f"1 {wrong}")


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


def test_documents_end_with_a_space():
    assert [TEXT8.decode(tokens) for tokens in TEXT8.encode_documents(["ab", ""])] == ["ab ", " "]
    assert TEXT8.end_of_text is None


@pytest.fixture(scope="module")
def gpt2():
    return BytePairs(shared("data", "gpt2-bpe"))


def test_gpt2_tokens(gpt2):
    """The published example, and text that must come back as it was."""
    assert gpt2.encode("Hello world").tolist() == [15496, 995]
    assert gpt2.encode("Hello world").dtype == np.uint16
    for text in (
        "",
        " two  spaces\n\n",
        "Senj\u014d \u6226\u5834 \N{GRINNING FACE} it's 3.14",
        "<|endoftext|>",
        "a\tb",
    ):
        assert gpt2.decode(gpt2.encode(text)) == text


def test_gpt2_documents_end_with_their_token(gpt2):
    """The same letters inside a document are not the token."""
    documents = gpt2.encode_documents(["Hello world", "", "a <|endoftext|> b"])
    assert [tokens.tolist().count(50256) for tokens in documents] == [1, 1, 1]
    assert documents[0].tolist() == [15496, 995, 50256]
    assert documents[1].tolist() == [50256]
    assert documents[2][-1] == 50256


def test_gpt2_prompts_and_the_mask(gpt2):
    ids = gpt2.encode_prompt("Hello__ world_")
    assert ids.tolist() == [15496, 50257, 50257, 995, 50257]
    assert gpt2.decode(ids) == "Hello__ world_"
    assert gpt2.encode_prompt("Hello_{3} world").tolist() == [15496, 50257, 50257, 50257, 995]
    assert gpt2.decode(gpt2.encode_prompt(r"snake\_case\_{2}_")) == "snake_case_{2}_"
    assert one_token(gpt2, "<|endoftext|>") == 50256
    assert one_token(gpt2, " world") == 995
    with pytest.raises(ValueError, match="50258"):
        gpt2.decode(np.array([50258]))


def test_other_forms_of_the_vocabulary_are_the_same(gpt2, tmp_path, monkeypatch):
    """vocab.json and merges.txt, tokenizer.json (with the special token declared, as the hub has it), MD4_GPT2."""
    source = shared("data", "gpt2-bpe")
    named = tmp_path / "named"
    named.mkdir()
    (named / "vocab.json").write_bytes((source / "encoder.json").read_bytes())
    (named / "merges.txt").write_bytes((source / "vocab.bpe").read_bytes())
    single = tmp_path / "single"
    single.mkdir()
    tokenizer = BytePairs(source)._tokenizer
    tokenizer.add_special_tokens(["<|endoftext|>"])
    tokenizer.save(str(single / "tokenizer.json"))
    monkeypatch.setenv("MD4_GPT2", str(single))
    text = "It was a <|endoftext|> of a kind."
    for other in (BytePairs(named), BytePairs(single), BytePairs()):
        assert other.encode(text).tolist() == gpt2.encode(text).tolist()
        assert other.decode(other.encode(text)) == text


def test_gpt2_needs_its_files_only_for_text(tmp_path, monkeypatch):
    monkeypatch.setenv("MD4_GPT2", str(tmp_path))
    words = vocabulary("gpt2")
    assert (words.size, words.end_of_text) == (50257, 50256)
    with pytest.raises(UserError, match=r"neither encoder.json and vocab.bpe"):
        words.encode("x")
    (tmp_path / "encoder.json").write_text('{"a": 0}')
    (tmp_path / "vocab.bpe").write_text("#version: 0.2\n")
    with pytest.raises(UserError, match="it has 1 tokens, not 50257"):
        words.encode("x")
    (tmp_path / "encoder.json").write_text("torn")
    with pytest.raises(UserError, match="can't be read"):
        words.encode("x")


def test_pixels():
    """No text; the name gives the number of levels back."""
    assert (vocabulary("pixels").size, vocabulary("pixels17").size) == (256, 17)
    for levels in (2, 17, 256, 65536):
        assert vocabulary(Pixels(levels).name).size == levels
    assert vocabulary("pixels17").decode(np.array([0, 17, 16])) == "0 _ 16"
    for mistake in (lambda: vocabulary("pixels17").encode("a"), lambda: vocabulary("pixels").normalise("a")):
        with pytest.raises(UserError, match="can't encode text"):
            mistake()
    with pytest.raises(UserError, match="levels, not 1"):
        vocabulary("pixels1")


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
