"""Runs whose vocabulary is a file: they keep it; what they sample, evaluate and export needs nothing else."""

import sys
from pathlib import Path

import pytest
import torch

import md4
from md4.errors import UserError
from md4.weights import TOKENIZER
from orchestration.cli import main
from orchestration.config import Config, load, validate
from orchestration.evaluation import open_subject
from orchestration.runs import Run, export, load_model
from orchestration.sampling import Request, prepare, sample
from orchestration.train import _check_vocabulary
from pipelines.manifest import Manifest
from pipelines.vocabularies import vocabulary
from tests.orchestration.small_run import LENGTH, write_run
from tests.pipelines.small import some_rows, write_set
from tests.pipelines.small_tokenizer import write_tokenizer

DOCUMENTS = ["data.packing=document", "model.attention=document"]


@pytest.fixture(scope="module")
def moved(tmp_path_factory):
    """A run of single documents whose tokenizer, and then whose own folder, has moved."""
    home = tmp_path_factory.mktemp("home")
    write_tokenizer(home / "tokenizer")
    path = write_run(home / "runs", f"data.vocabulary={home / 'tokenizer'}", *DOCUMENTS)
    (home / "tokenizer").rename(home / "gone")
    (home / "elsewhere").mkdir()
    return path.rename(home / "elsewhere" / path.name)


def with_tokenizer(tree: dict, run: Path, tokenizer: Path) -> Config:
    """The run's configuration with its vocabulary at another place."""
    model = {name: value for name, value in tree["model"].items() if name not in ("vocab_size", "end_of_text")}
    data = {**tree["data"], "vocabulary": str(tokenizer)}
    return validate({**tree, "data": data, "model": model, "name": run.name, "runs": str(run.parent)})


def test_a_run_needs_its_own_copy_alone(moved):
    run = Run(moved)
    assert run.config.data.vocabulary == str(moved / TOKENIZER)
    assert (run.config.model.vocab_size, run.config.model.end_of_text) == (270, 0)
    loaded = load_model(moved)
    assert loaded.vocabulary.decode(loaded.vocabulary.encode("the cat")) == "the cat"
    # The same vocabulary from elsewhere is no other configuration; another one is.
    tree = run.config.model_dump()
    home = moved.parents[1]
    same = with_tokenizer(tree, moved, home / "gone")
    assert Run.resume(same, print).config.data.vocabulary == str(moved / TOKENIZER)
    other = write_tokenizer(home / "other", 271)
    with pytest.raises(UserError, match=r"data.vocabulary: the run has 'bpe-270-\w+', given is 'bpe-271-\w+'"):
        Run.resume(with_tokenizer(tree, moved, other), print)


def test_samples_end_with_their_document(moved):
    loaded = load_model(moved)
    job = prepare(loaded, Request(prompt="the cat", length=10))
    assert job.stop == 0
    assert job.canvas.shape == (1, LENGTH)
    assert (job.canvas[0, 10:] == 0).all()
    assert (job.canvas[0, :10] == 270).any()
    report = sample(loaded, prompts=["the cat"], length=10, count=6, seed=1)
    assert report.stop == "<|endoftext|>"
    for one in report.samples:
        assert one.text.startswith("the cat")
        assert one.stopped == one.text.endswith("<|endoftext|>")
        assert one.text.count("<|endoftext|>") == int(bool(one.stopped))
        assert len(loaded.vocabulary.encode(one.text.removesuffix("<|endoftext|>"))) <= LENGTH
    whole = prepare(loaded, Request())
    assert (whole.canvas == 270).all()
    assert prepare(loaded, Request(stop=" cat")).stop == int(loaded.vocabulary.encode(" cat")[0])


def test_runs_of_joined_documents_do_not_stop(tmp_path):
    write_tokenizer(tmp_path / "tokenizer")
    loaded = load_model(write_run(tmp_path / "runs", f"data.vocabulary={tmp_path / 'tokenizer'}"))
    job = prepare(loaded, Request(length=10))
    assert job.stop is None
    assert job.canvas.shape == (1, 10)


def test_an_exported_model_reads_and_writes_text(moved, tmp_path):
    folder = export(moved, tmp_path / "model")
    model = md4.load(folder)
    tokens = model.tokens("the cat_ on")
    assert (tokens == 270).sum() == 1
    assert model.text(tokens[None]) == ["the cat_ on"]
    assert model.config.attention == "document"
    canvas = torch.full((LENGTH,), 270)
    canvas[: len(tokens)] = tokens
    (text,) = model.text(model.sample(1, seed=1, canvas=canvas, stop="<|endoftext|>"))
    assert text.startswith("the cat")
    assert "_" not in text
    words = open_subject(folder).vocabulary
    assert words is not None
    assert words.encode("the cat").tolist() == model.tokens("the cat").tolist()
    (folder / TOKENIZER).write_bytes((folder / TOKENIZER).read_bytes() + b" ")
    with pytest.raises(UserError, match="is missing or damaged"):
        md4.load(folder).tokens("the cat")


def test_sets_of_other_vocabularies_are_refused_before_anything_starts(moved, tmp_path):
    config = Run(moved).config
    made = write_set(tmp_path, [some_rows(20)], 10)
    with pytest.raises(UserError, match=r"holds tokens of the vocabulary text8, but .* is bpe-270-"):
        _check_vocabulary(config, tmp_path, Manifest.load(tmp_path))
    words = vocabulary(config.data.vocabulary)
    _check_vocabulary(config, tmp_path, made.model_copy(update={"vocabulary": words.name}))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["model.attention=document"], "needs a vocabulary with an end-of-text token"),
        (["model.attention=document", "data.vocabulary=gpt2", "model.end_of_text=7"], "that of gpt2 is 50256"),
        (["data.vocabulary=no/such/folder"], "can't be read"),
    ],
)
def test_what_does_not_fit(overrides, message):
    with pytest.raises(UserError, match=message):
        load("pydocs-tiny", overrides)
    assert load("pydocs-tiny", ["model.attention=document", "data.vocabulary=gpt2"]).model.end_of_text == 50256


def test_the_commands(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.txt").write_text("the cat sat on the mat and the dog sat on the log\n" * 50)

    def md4(*arguments: str) -> str:
        monkeypatch.setattr(sys, "argv", ["md4", *arguments])
        main()
        return capsys.readouterr().out

    source = ["data.source=text", "data.path=text.txt", "data.validation=0", "data.test=0"]
    said = md4("tokenizer", "train", "pydocs-tiny", *source, "--size", "270", "--out", "words")
    assert "bpe-270-" in said
    assert (tmp_path / "words" / TOKENIZER).is_file()
    shown = md4("tokenizer", "show", "words", "the mat")
    assert "'the'" in shown
    assert "tokens of bpe-270-" in shown
    assert "vocab_size: 270" in md4("config", "pydocs-tiny", "data.vocabulary=words")
