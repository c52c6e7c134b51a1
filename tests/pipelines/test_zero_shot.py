"""Data sets of the zero-shot evaluation: their plain text, their records, and their windows under both protocols."""

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from md4.errors import UserError
from pipelines.vocabularies import BytePairs, Characters, Pixels
from pipelines.zero_shot import (
    DATA_SETS,
    Protocol,
    find,
    lambada_detokenizer,
    lm1b_detokenizer,
    load,
    protocol,
    ptb_detokenizer,
    wikitext_detokenizer,
    windows,
)
from tests.shared import shared

END = 99  # the end-of-text token of documents made by hand


@pytest.mark.parametrize(
    ("detokenizer", "tokenised", "plain"),
    [
        (wikitext_detokenizer, " = = Early life = = \n", " == Early life ==\n"),
        (wikitext_detokenizer, " 5 @.@ 5 kg , 1 @,@ 000 m : co @-@ op ; so ? \n", " 5.5 kg, 1,000 m: co-op; so?\n"),
        (wikitext_detokenizer, ' the " big ( or not ) one " of [ 2 ] \n', ' the "big (or not) one" of [2]\n'),
        (wikitext_detokenizer, " the dog 's and the dogs ' bone at 5 ° C \n", " the dog's and the dogs' bone at 5°C\n"),
        (wikitext_detokenizer, "", ""),
        (ptb_detokenizer, "it was n't mr. x 's <unk> for $ N N N million", "it wasn't mr. x's ? for $1 1 1 million"),
        (ptb_detokenizer, "abc\\/cbs the banks ' share # N", "abc/cbs the banks' share # N"),
        (
            lm1b_detokenizer,
            "\" It 's late , \" he said ( again ) : who won 't ? See http : / / x.org now .",
            "\"It's late,\" he said (again): who won't? See http://x.org now.",
        ),
        (lm1b_detokenizer, "He paid $ 5 or £ 3 [ sic ] ; no !", "He paid $5 or £3 [sic]; no!"),
        (lambada_detokenizer, "“Well,” said she. \n", '\n"Well," said she.'),
    ],
)
def test_detokenizers(detokenizer, tokenised, plain):
    assert detokenizer(tokenised) == plain


def test_wikitext_articles_are_told_from_equations():
    first = " \n = First = \n \n Some text with \n = 1 + 2 = \n inside . \n = = Part = = \n \n More . \n \n"
    text = f"{first} = Second = \n \n X \n"
    documents = list(DATA_SETS["wikitext2"].documents(text))
    assert [document[0] for document in documents] == ["", " = Second = \n"]
    assert [len(document) for document in documents] == [10, 3]
    assert "".join(record or "\n" for document in documents for record in document).split() == text.split()


def tokens_of(*sizes: int) -> list[np.ndarray]:
    """Documents of distinct tokens from 100 on, each with its end."""
    numbers = iter(range(100, 60_000))
    return [np.array([*(next(numbers) for _ in range(size - 1)), END], np.uint16) for size in sizes]


def test_windows_of_the_protocol_md4():
    """Side by side, the last one filled up with tokens that don't count; a window belongs to its first document."""
    cut = windows(tokens_of(5, 4, 2), protocol("md4", 4), 4, END)
    assert cut.tokens.tolist() == [[100, 101, 102, 103], [END, 104, 105, 106], [END, 107, END, END]]
    assert cut.scored.tolist() == [[True] * 4, [True] * 4, [True, True, True, False]]
    assert cut.documents.tolist() == [0, 0, 1]
    dropped = windows(tokens_of(5, 4, 2), protocol("md4", 4), 4, END, drop_short=True)
    assert (len(dropped.tokens), dropped.dropped) == (2, 3)
    apart = windows(tokens_of(5, 2), protocol("md4", 4, separate=True), 4, END)
    assert apart.tokens.tolist() == [[100, 101, 102, 103], [END] * 4, [104, END, END, END]]
    assert apart.scored.sum(axis=1).tolist() == [4, 1, 2]
    assert apart.documents.tolist() == [0, 0, 1]


def test_windows_of_the_protocol_mdlm():
    """Ends around each window, that don't count; windows slide by 2 and count what is new; the last ends the text."""
    cut = windows(tokens_of(9), protocol("mdlm", 6, stride=2), 6, END)
    assert cut.tokens.tolist() == [
        [END, 100, 101, 102, 103, END],
        [END, 102, 103, 104, 105, END],
        [END, 104, 105, 106, 107, END],
        [END, 105, 106, 107, END, END],
    ]
    assert cut.scored.sum(axis=1).tolist() == [4, 2, 2, 1]
    assert cut.scored[1].tolist() == [False, False, False, True, True, False]
    assert protocol("mdlm", 1024).stride == 512


@given(
    sizes=st.lists(st.integers(1, 30), min_size=1, max_size=8),
    length=st.integers(3, 12),
    data=st.data(),
)
def test_every_token_counts_once(sizes, length, data):
    """In its own place: what is scored, read window by window, is the text; context is what comes before it."""
    documents = tokens_of(*sizes)
    stride = data.draw(st.integers(1, length - 2))
    separate = data.draw(st.booleans())
    for rule in (protocol("md4", length, separate=separate), protocol("mdlm", length, stride, separate)):
        cut = windows(documents, rule, length, END)
        assert cut.tokens[cut.scored].tolist() == np.concatenate(documents).tolist()
        assert cut.dropped == 0
        owners = np.repeat(np.arange(len(documents)), sizes)
        firsts = np.cumsum([0, *cut.scored.sum(axis=1)[:-1]])
        assert cut.documents.tolist() == owners[firsts].tolist()


def test_sliding_windows_see_the_tokens_before():
    """Every scored token but those of the first window has at least room - stride tokens of the text before it."""
    cut = windows(tokens_of(50), protocol("mdlm", 12, stride=3), 12, END)
    for row, scored in zip(cut.tokens[1:], cut.scored[1:], strict=True):
        first = int(np.flatnonzero(scored)[0])
        assert first - 1 >= 7
        assert (np.diff(row[1:11][row[1:11] != END].astype(int)) == 1).all()


@pytest.mark.parametrize(
    ("mistake", "message"),
    [
        (lambda: protocol("sedd", 8), "known are md4 and mdlm"),
        (lambda: protocol("md4", 8, stride=2), "don't overlap"),
        (lambda: protocol("mdlm", 8, stride=7), r"must be in 1\.\.6"),
        (lambda: protocol("mdlm", 8, stride=0), r"must be in 1\.\.6"),
        (lambda: protocol("mdlm", 2), "too short"),
        (lambda: windows(tokens_of(3), protocol("mdlm", 8), 8, None), "this vocabulary has none"),
        (lambda: windows(tokens_of(3), protocol("md4", 8), 8, END, drop_short=True), "too short to fill"),
        (lambda: windows([], protocol("md4", 8), 8, END), "no text"),
        (lambda: find("lamda", "."), "known are lambada"),
        (lambda: find("ptb", "absent"), "is not a folder"),
        (lambda: find("lambada", ".", "train"), "no split 'train'; it has test"),
        (lambda: find("lambada", "."), r"looked for lambada\*/lambada_test.jsonl"),
    ],
)
def test_mistakes_are_named(mistake, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=message):
        mistake()


def write_lambada(folder, lines) -> None:
    (folder / "lambada").mkdir()
    (folder / "lambada" / "lambada_test.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")


def test_a_set_in_the_vocabulary_of_text8(tmp_path):
    """Text is normalised; passages are joined by spaces, and each is a document."""
    write_lambada(tmp_path, [json.dumps({"text": text}) for text in ("“Ab, cd”", "...", "Ef 2")])
    found = load("lambada", tmp_path, Characters(), protocol("md4", 6), 6)
    shown = [
        Characters().decode(row[mark]) for row, mark in zip(found.windows.tokens, found.windows.scored, strict=True)
    ]
    assert "".join(shown) == "ab cd ef two "
    assert found.windows.documents.tolist() == [0, 1, 1]
    assert (found.split, found.detokenizer, found.vocabulary) == ("test", "lambada_detokenizer", "text8")
    assert found.characters == 11
    with pytest.raises(UserError, match="this vocabulary has none"):
        load("lambada", tmp_path, Characters(), protocol("mdlm", 6), 6)
    with pytest.raises(UserError, match="can't encode text"):
        load("lambada", tmp_path, Pixels(), protocol("md4", 6), 6)


@pytest.mark.parametrize("line", ['{"txt": "a"}', "[1]", "{torn"])
def test_a_damaged_file_is_named(tmp_path, line):
    write_lambada(tmp_path, ['{"text": "a"}', line])
    with pytest.raises(UserError, match=r"lambada_test.jsonl', line 2"):
        load("lambada", tmp_path, Characters(), protocol("md4", 6), 6)


REAL = {  # data set -> split, documents
    "lambada": ("test", 5153),
    "wikitext2": ("test", 60),
    "wikitext103": ("validation", 60),
    "ptb": ("test", 3761),
    "lm1b": ("validation", 12216),
}


@pytest.mark.parametrize("name", list(REAL))
def test_real_data(name):
    """Known counts; GPT-2's tokens spell the plain text; windows of both protocols hold all of it."""
    words = BytePairs(shared("data", "gpt2-bpe"))
    folder = shared("data")
    data_set, split, file = find(name, folder)
    documents = list(data_set.documents(file.read_text(encoding="utf-8")))
    assert (split, len(documents)) == REAL[name]
    if name == "lm1b":
        documents = documents[:3000]  # tokenising the rest adds nothing but time
    plain = [data_set.detokenizer(record) for document in documents[:500] for record in document]
    encoded = words.encode_documents(plain)
    assert words.decode(np.concatenate(encoded)) == "".join(f"{record}<|endoftext|>" for record in plain)
    for rule in (protocol("md4", 1024), protocol("mdlm", 1024)):
        cut = windows(encoded, rule, 1024, words.end_of_text)
        assert cut.scored.sum() == sum(map(len, encoded))
        assert (cut.tokens[:, 0] == words.end_of_text).all() or rule == Protocol("md4")


def test_a_whole_real_set():
    """LAMBADA in GPT-2's tokens: known length of the text, and the report's facts."""
    found = load("lambada", shared("data"), BytePairs(shared("data", "gpt2-bpe")), protocol("mdlm", 1024), 1024)
    tokens = int(found.windows.scored.sum())
    assert 3.5 < found.characters / tokens < 4.5  # English in these tokens
    assert len(found.windows.tokens) == 1 + -(-(tokens - 1022) // 512)
    assert found.windows.fingerprint == found.windows.fingerprint
