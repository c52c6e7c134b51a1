"""The report on a model's likelihood: its number, its error, its independence of the batch, and its files."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from md4 import noise
from md4.errors import UserError
from md4.model import ModelConfig, build
from md4.networks.transformer import TransformerConfig
from pipelines.evaluate import LikelihoodReport, Provenance, evaluate, write
from pipelines.shards import FORMAT, MANIFEST, VERSION, Manifest, ShardSet, SourceFacts, Split, write_shard
from tests.md4.oracle import Toy

TOY = Toy(vocabulary=3, length=4)


def rows_of_the_law(count: int) -> np.ndarray:
    """`[count, 4]` sequences drawn from TOY's law."""
    uniforms = noise.uniform(noise.key(0, "rows"), torch.arange(count))
    return TOY.sequences[torch.searchsorted(TOY.law.cumsum(0), uniforms)].numpy().astype(np.uint8)


def text_model(scale: float = 0.2):
    network = TransformerConfig(feature_dim=16, heads=2, layers=1)
    model = build(ModelConfig(vocab_size=27, length=16, network=network))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += scale * torch.randn(parameter.shape, generator=generator)
    return model


def write_set(root: Path, rows: np.ndarray) -> ShardSet:
    """A prepared set whose validation split holds `rows` in two shards."""
    half = len(rows) // 2
    shards = [
        write_shard(root, f"validation/0000{i}.parquet", part, 4) for i, part in enumerate((rows[:half], rows[half:]))
    ]
    split = Split(documents=1, characters=rows.size, tokens=rows.size, dropped_tokens=0, rows=len(rows), shards=shards)
    manifest = Manifest(
        format=FORMAT,
        version=VERSION,
        vocabulary="text8",
        vocabulary_size=27,
        length=rows.shape[1],
        rows_per_group=4,
        source=SourceFacts(kind="test", identity="test", units=1, bytes=rows.size, sha256="0"),
        config={},
        splits={"validation": split},
        ngrams=None,
        fingerprint="",
    )
    manifest = manifest.model_copy(update={"fingerprint": manifest.content_fingerprint()})
    (root / MANIFEST).write_text(manifest.model_dump_json(), encoding="utf-8")
    return ShardSet(root, "validation")


def test_a_network_that_knows_the_law_reaches_its_entropy():
    """Its bound is tight, so the report must give the entropy: within 4 standard errors (false-alarm rate 6e-5); the
    error itself is right within a tenth, by the spread of -log2 p over the law."""
    report = evaluate(TOY.model(), rows_of_the_law(4000), draws=4, progress=False)
    surprise = -TOY.law.log2() / 4
    entropy = float((TOY.law * surprise).sum())
    assert abs(report.bits_per_token - entropy) < 4 * report.standard_error
    least = math.sqrt(float((TOY.law * (surprise - entropy) ** 2).sum()) / 4000)
    assert least * 0.9 < report.standard_error < least * 2
    assert report.perplexity == pytest.approx(2**report.bits_per_token)
    assert report.perplexity_error == pytest.approx(report.perplexity * math.log(2) * report.standard_error)


def test_a_uniform_network_needs_log2_of_the_vocabulary():
    """Fresh networks predict every token alike: exactly log2 27 bits, no error."""
    model = build(ModelConfig(vocab_size=27, length=16, network=TransformerConfig(feature_dim=16, heads=2, layers=1)))
    rows = np.random.default_rng(0).integers(0, 27, (12, 16)).astype(np.uint8)
    report = evaluate(model, rows, draws=3, progress=False)
    assert report.bits_per_token == pytest.approx(math.log2(27), rel=1e-6)
    assert report.standard_error < 1e-6


@pytest.mark.parametrize("estimator", ["mask_count", "continuous"])
def test_a_split_an_array_and_any_batch_size_give_the_same(tmp_path, estimator):
    rows = np.random.default_rng(1).integers(0, 27, (21, 16)).astype(np.uint8)
    model, shards = text_model(), write_set(tmp_path, rows)
    stored = shards.read(np.arange(21))
    reports = [
        evaluate(model, data, draws=2, batch_size=size, estimator=estimator, seed=5, progress=False)
        for data, size in [(shards, 64), (shards, 1), (shards, 5), (stored, 7)]
    ]
    assert len({(r.bits_per_token, r.standard_error) for r in reports}) == 1
    assert {r.estimator for r in reports} == {estimator}
    other = evaluate(model, shards, draws=2, estimator=estimator, seed=6, progress=False)
    assert other.bits_per_token != reports[0].bits_per_token
    assert reports[0].data_fingerprint == shards.fingerprint
    assert (reports[0].split, reports[0].vocabulary, reports[0].window) == ("validation", "text8", 16)


def test_a_limit_takes_rows_from_the_whole_set():
    """10 of 100 rows: every tenth, with the noise that they have in the full evaluation."""
    rows = np.repeat(np.arange(100)[:, None] % 27, 16, axis=1).astype(np.uint8)
    model = text_model()
    seen = []

    class Watch(torch.nn.Module):
        def __init__(self, network):
            super().__init__()
            self.network = network

        def forward(self, z, t, labels=None):
            seen.append(z.clone())
            return self.network(z, t, labels)

    model.network = Watch(model.network)
    report = evaluate(model, rows, draws=1, limit=10, batch_size=10, progress=False)
    assert (report.rows, report.rows_available) == (10, 100)
    limited = seen.pop()[:10]  # without the rows that fill the batch up
    evaluate(model, rows, draws=1, batch_size=100, progress=False)
    assert torch.equal(limited, seen.pop()[:100:10])


def test_files(tmp_path):
    """The JSON reads back as the report; the Markdown states the number with its error, estimator and draws."""
    provenance = Provenance(run="demo", step=800, weights_hash="abc123")
    report = evaluate(TOY.model(), rows_of_the_law(50), draws=2, seed=3, provenance=provenance, progress=False)
    json_file, markdown_file = write(report, tmp_path / "reports")
    assert json_file.name == "likelihood-array-step-00000800-seed-3.json"
    assert LikelihoodReport.model_validate_json(json_file.read_text()) == report
    assert json.loads(json_file.read_text())["model"]["weights_hash"] == "abc123"
    text = markdown_file.read_text()
    for expected in (f"{report.bits_per_token:.4f} +- {report.standard_error:.4f}", "mask_count", "2 draws", "abc123"):
        assert expected in text


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"limit": 0}, "limit is 0"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"draws": 0}, "draws is 0"),
        ({"estimator": "best"}, "mask_count, continuous"),
    ],
)
def test_bad_options_are_named(options, message):
    with pytest.raises(UserError, match=message):
        evaluate(TOY.model(), rows_of_the_law(4), progress=False, **options)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (np.zeros((0, 4), np.uint8), "no rows"),
        (np.full((2, 4), 9, np.uint8), "token 9, the model knows 0..2"),
        (np.zeros(4, np.uint8), r"\[N, L\]"),
    ],
)
def test_bad_rows_are_named(rows, message):
    with pytest.raises(UserError, match=message):
        evaluate(TOY.model(), rows, progress=False)
