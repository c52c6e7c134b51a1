"""Training on single documents with a trained vocabulary, under a real Ray Train: the same on any number of workers."""

import random
import shutil

import pytest

from orchestration.config import load
from orchestration.evaluation import Evaluation
from orchestration.evaluation import run as evaluate
from orchestration.train import train
from pipelines.config import prepared_path
from pipelines.shards import ShardSet
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


def test_padded_rows_train_alike_on_one_worker_and_on_uneven_shares_of_three(tmp_path):
    """And the run goes on, evaluates and finds its data when the tokenizer that it was made with is gone."""
    corpus, tokenizer = write_documents(tmp_path / "corpus"), write_tokenizer(tmp_path / "tokenizer")
    settings = [
        *tiny_settings(corpus, tmp_path / "data", tmp_path / "runs"),
        f"data.vocabulary={tokenizer}", "data.packing=document", "model.attention=document",
        "data.validation=0.2", "train.steps=4", "checkpoint.every=0", "evaluation.every=4",
    ]  # fmt: skip
    curves, evaluations = {}, {}
    for workers in (1, 3):
        config = load("pydocs-tiny", [*settings, f"name=on-{workers}", f"train.workers={workers}"])
        run = train(config, report=lambda _: None).run
        curves[workers] = [row["bits_per_token"] for row in run.metrics("train")]
        evaluations[workers] = run.metrics("evaluation")[-1]
    assert len(curves[1]) == 4
    assert curves[3] == pytest.approx(curves[1], rel=1e-4)
    assert curves[1][0] == pytest.approx(8.077, rel=0.5)  # log2(270): a few draws
    for figure in ("bits_per_token", "standard_error"):
        assert evaluations[3][figure] == pytest.approx(evaluations[1][figure], rel=1e-3)

    shutil.rmtree(tokenizer)
    data = ShardSet(prepared_path(run.config.data), "validation")
    assert data.manifest.packing == "document"
    (report,) = evaluate(run.path, Evaluation(draws=1), lambda _: None)
    assert 0 < report.tokens < data.rows * data.length
    assert report.vocabulary == data.vocabulary.name
