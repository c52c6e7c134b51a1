"""Vocabularies from a tokenizer.json: learned here or by others, wherever their file lies."""

import json
import pickle

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from md4.errors import UserError
from orchestration.config import load
from pipelines.config import prepared_path
from pipelines.vocabularies import Trained, keep, one_token, vocabulary
from pipelines.vocabularies.training import learn, train
from tests.pipelines.small_tokenizer import TEXTS, write_tokenizer

WORDS = Trained(learn(TEXTS * 3, 270), "here")


def changed(**parts) -> bytes:
    return json.dumps({**json.loads(WORDS.content), **parts}).encode()


@given(st.text())
def test_every_text_comes_back(text):
    text = text.encode("utf-8", "ignore").decode()
    tokens = WORDS.encode(text)
    assert tokens.dtype == np.uint16
    assert WORDS.end_of_text not in tokens
    assert WORDS.decode(tokens) == text


def test_documents_end_with_their_token_and_pairs_are_used():
    first, second = WORDS.encode_documents(["the cat", "a <|endoftext|> b"])
    assert first[-1] == second[-1] == WORDS.end_of_text == 0
    assert len(first) < len("the cat")
    assert np.count_nonzero(second == 0) == 1
    assert one_token(WORDS, "<|endoftext|>") == 0
    prompt = WORDS.encode_prompt("the_{2} sat")
    assert (prompt == WORDS.size).sum() == 2
    assert WORDS.decode(prompt) == "the__ sat"


def test_the_name_follows_the_content_alone(tmp_path):
    """Not the place, nor how the file is laid out."""
    again = Trained(json.dumps(json.loads(WORDS.content), indent=7).encode(), "elsewhere")
    assert (again.digest, again.name) == (WORDS.digest, WORDS.name)
    assert WORDS.name == f"bpe-270-{WORDS.digest[:12]}"
    assert Trained(learn(TEXTS * 3, 269), "").digest != WORDS.digest
    assert pickle.loads(pickle.dumps(WORDS)).encode("the cat").tolist() == WORDS.encode("the cat").tolist()
    keep(WORDS, tmp_path)
    assert vocabulary(WORDS.name, tmp_path).digest == WORDS.digest
    assert vocabulary(str(tmp_path)).digest == vocabulary(str(tmp_path / "tokenizer.json")).digest == WORDS.digest
    other = f"bpe-270-{'0' * 12}"
    with pytest.raises(UserError, match=f"describes the vocabulary {WORDS.name}, not {other}"):
        vocabulary(other, tmp_path)
    for beside in (None, tmp_path / "absent"):
        with pytest.raises(UserError, match=f"the file of vocabulary '{WORDS.name}' is missing"):
            vocabulary(WORDS.name, beside)


@pytest.mark.parametrize("end", ["</s>", "<eos>", "<|end_of_text|>"])
def test_files_of_others(end):
    """Another name for the end, a normaliser, and truncation and padding, which are not wanted."""
    content = WORDS.content.replace(b"<|endoftext|>", end.encode())
    tree = json.loads(content) | {
        "normalizer": {"type": "NFC"},
        "truncation": {"direction": "Right", "max_length": 3, "strategy": "LongestFirst", "stride": 0},
    }
    words = Trained(json.dumps(tree).encode(), "here")
    assert words.end_of_text == 0
    assert words.normalise("e\u0301") == "\u00e9"
    assert words.decode(words.encode("a long text is not cut")) == "a long text is not cut"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"torn", "it is not JSON"),
        (b"[]", "it describes no model"),
        (changed(model={"type": "of the future"}), "can be used"),
        (WORDS.content.replace(b"<|endoftext|>", b"<end>"), "no token for the end of a document"),
        (changed(pre_tokenizer={"type": "Whitespace"}), "can't write every text"),
        (
            changed(
                pre_tokenizer={"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True}
            ),
            "can't write every text",
        ),
    ],
)
def test_files_that_are_refused(content, message):
    with pytest.raises(UserError, match=message):
        Trained(content, "here")


def test_paths_in_a_configuration(tmp_path, monkeypatch):
    """A relative path is made absolute; the prepared set's name stays when the tokenizer moves."""
    write_tokenizer(tmp_path / "one")
    monkeypatch.chdir(tmp_path)
    config = load("pydocs-tiny", ["data.vocabulary=./one"])
    assert config.model.vocab_size == 270
    assert config.data.vocabulary == str(tmp_path / "one")
    before = prepared_path(config.data)
    (tmp_path / "one").rename(tmp_path / "two")
    assert prepared_path(load("pydocs-tiny", ["data.vocabulary=./two"]).data) == before
    write_tokenizer(tmp_path / "two", 271)
    assert prepared_path(load("pydocs-tiny", ["data.vocabulary=./two"]).data) != before
    with pytest.raises(UserError, match=r"'\./one' can't be read .*must be a tokenizer.json, or a folder with one"):
        load("pydocs-tiny", ["data.vocabulary=./one"])
    with pytest.raises(UserError, match=r"unknown vocabulary 'text9'.*did you mean 'text8'"):
        load("pydocs-tiny", ["data.vocabulary=text9"])


def test_training_reads_the_training_split_of_a_corpus(tmp_path):
    """The held-out documents, which alone have a certain word, give no tokens; two trainings give the same bytes."""
    from pipelines.parts import assign

    corpus = tmp_path / "corpus"
    corpus.mkdir()
    for number in range(60):
        text = f"document {number} of the corpus"
        if assign(text, 0.3, 0.1)[0] != "train":
            text = next(t for n in range(999) if assign(t := f"zzzz zzzz {number} {n}", 0.3, 0.1)[0] != "train")
        (corpus / f"{number}.txt").write_text(text)
    config = load(
        "pydocs-tiny",
        ["data.source=text", f"data.path={corpus}", "data.validation=0.3", "data.test=0.1"],
    ).data
    said: list[str] = []
    words = train(config, 280, tmp_path / "a", report=said.append)
    train(config, 280, tmp_path / "b", report=said.append)
    content = (tmp_path / "a" / "tokenizer.json").read_bytes()
    assert content == (tmp_path / "b" / "tokenizer.json").read_bytes() == words.content
    assert not any("zz" in words.decode(np.array([token])) for token in range(words.size))
    assert len(words.encode(" document")) < 5
    facts = json.loads((tmp_path / "a" / "training.json").read_text())
    assert facts["sha256"] == words.digest
    assert 0.5 < facts["characters_per_token"] < 2
    with pytest.raises(UserError, match="has a tokenizer"):
        train(config, 280, tmp_path / "a", report=said.append)
    with pytest.raises(UserError, match=r"have only \d+ tokens that stand there 2 times"):
        train(config, 5000, tmp_path / "c", report=said.append)
    with pytest.raises(UserError, match="at least 257"):
        train(config, 100, tmp_path / "c", report=said.append)
