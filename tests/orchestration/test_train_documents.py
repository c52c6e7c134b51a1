"""Training on single documents with a trained vocabulary, under a real Ray Train."""

import math
import random
import shutil

import pytest
import torch

from md4.documents import no_padding
from md4.model import build
from orchestration.config import Config, load
from orchestration.evaluation import Evaluation
from orchestration.evaluation import run as evaluate
from orchestration.train import train
from pipelines.config import prepared_path
from pipelines.manifest import Manifest
from pipelines.plan import plan
from pipelines.shards import ShardSet
from pipelines.stream import batches
from tests.orchestration.conftest import tiny_settings
from tests.pipelines.small_tokenizer import write_tokenizer

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_cluster")]


def write_documents(folder, count: int = 400):
    """Short texts of 3 to 40 words, one a file."""
    draw = random.Random(1)
    folder.mkdir()
    for number in range(count):
        words = draw.choices(["the", "cat", "dog", "sat", "on", "a", "mat", "log"], k=draw.randint(3, 40))
        (folder / f"{number:03d}.txt").write_text(" ".join(words))
    return folder


def bits_of_first_batch(config: Config) -> float:
    """Bits per real token of global batch 0 under the fresh model, in one piece: what the first line must say."""
    folder, train = prepared_path(config.data), config.train
    order = plan(config.data, [Manifest.load(folder)], train.batch_size, train.slices, config.seed)
    stream = batches(folder, "train", order, 0, 1, 0, 1)
    batch = next(iter(stream))
    stream.close()
    tokens = torch.from_numpy(batch.tokens)
    real = no_padding(tokens, 0)
    assert 0 < real.sum() < real.numel()
    model = build(config.model, seed=config.seed)
    slots = torch.from_numpy(batch.slots)
    drawn = model.noise(config.seed, 0, slots, train.batch_size, train.slices, tokens.shape[1])
    return float(model(tokens, **drawn, real=real).bound.double().sum() / real.sum().double() / math.log(2))


def test_padded_rows_train_on_uneven_shares(tmp_path):
    """And the run evaluates and finds its data when the tokenizer that it was made with is gone."""
    corpus, tokenizer = write_documents(tmp_path / "corpus"), write_tokenizer(tmp_path / "tokenizer")
    settings = [
        *tiny_settings(corpus, tmp_path / "data", tmp_path / "runs"),
        f"data.vocabulary={tokenizer}", "data.packing=document", "model.attention=document", "data.validation=0.2",
        "train.steps=3", "train.workers=2", "train.slices=3", "train.batch_size=15", "checkpoint.every=0",
        "evaluation.every=3", "evaluation.draws=1", "evaluation.rows=15",
    ]  # fmt: skip
    run = train(load("pydocs-tiny", settings), report=lambda _: None).run
    first, *_, last = run.metrics("train")
    assert first["bits_per_token"] == pytest.approx(bits_of_first_batch(run.config), rel=1e-5)
    assert 0 < last["tokens_per_second"] * last["seconds_per_step"] < 15 * 32
    trained = run.metrics("evaluation")[-1]
    assert trained["standard_error"] > 0

    shutil.rmtree(tokenizer)
    data = ShardSet(prepared_path(run.config.data), "validation")
    assert data.manifest.packing == "document"
    (report,) = evaluate(run.path, Evaluation(draws=1), lambda _: None)
    assert 0 < report.tokens < data.rows * data.length
    assert report.vocabulary == data.vocabulary.name
