"""The report on a model's likelihood: its number, its error, its independence of the batch, and its files."""

import dataclasses
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
from pipelines.evaluate import _collect, _open, _Options, _Scorer, evaluate
from pipelines.manifest import FORMAT, MANIFEST, VERSION, Manifest, PixelFacts, SourceFacts, Split
from pipelines.reports import LikelihoodReport, Provenance, write
from pipelines.shards import ShardSet, write_shard
from pipelines.zero_shot import Protocol, ZeroShotSet, protocol, windows
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


def write_images(root: Path, rows: np.ndarray, labels: list[int]) -> ShardSet:
    """A prepared set of labelled "images" of 4 x 4 x 1 pixels and 27 levels."""
    facts = PixelFacts(
        shape=(4, 4, 1),
        levels=27,
        classes=4,
        class_names=None,
        independent_bits=0.0,
        histogram_bits=0.0,
        converted={},
        rejected={},
        rejected_examples=[],
    )
    return write_set(root, rows, np.array(labels), vocabulary="pixels27", pixels=facts)


def write_set(root: Path, rows: np.ndarray, labels: np.ndarray | None = None, **facts) -> ShardSet:
    """A prepared set whose validation split holds `rows` in two shards."""
    half = len(rows) // 2
    shards = [
        write_shard(root, f"validation/0000{i}.parquet", rows[part], 4, None if labels is None else labels[part])
        for i, part in enumerate((slice(half), slice(half, None)))
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
    manifest = manifest.model_copy(update=facts)
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


def same_but_for_the_time(one: LikelihoodReport, other: LikelihoodReport) -> bool:
    return one.model_dump(exclude={"created", "seconds"}) == other.model_dump(exclude={"created", "seconds"})


@pytest.mark.ray
@pytest.mark.slow
def test_actors_give_the_same_as_one_process(tmp_path, ray_cluster):
    """Bit by bit: two actors that load the model themselves, and other batches."""
    rows = np.random.default_rng(1).integers(0, 27, (21, 16)).astype(np.uint8)
    model, shards = text_model(), write_set(tmp_path, rows)
    alone = evaluate(model, shards, draws=2, seed=5, batch_size=64, progress=False)
    shared = evaluate(model, shards, draws=2, seed=5, batch_size=4, workers=2, load=text_model, progress=False)
    assert same_but_for_the_time(shared, alone)


@pytest.mark.ray
@pytest.mark.slow
def test_any_number_of_actors_gives_the_same(tmp_path, ray_cluster):
    """The model is sent; a zero-shot set too; a mistake in an actor is one message."""
    model, found = text_model(), zero_shot_set([30, 7, 40], protocol("mdlm", 16))
    options = {"draws": 2, "seed": 5, "estimator": "continuous", "progress": False}
    alone = evaluate(model, found, **options)
    for workers, batch_size in ((1, 64), (2, 3), (3, 1)):
        assert same_but_for_the_time(evaluate(model, found, workers=workers, batch_size=batch_size, **options), alone)
    with pytest.raises(UserError, match=r"^the set holds token 9, the model knows 0\.\.2$"):
        evaluate(TOY.model(), np.full((2, 4), 9, np.uint8), workers=1, progress=False)


def test_a_mistake_of_an_actor_is_an_answer():
    """What it answers reaches the user as one message, from any process."""

    def damaged():
        raise UserError("no such weights")

    scorer = _Scorer(damaged, lambda: _open(rows_of_the_law(4), ""), _Options(4, 1, 0, "mask_count", None))
    answer = scorer({"start": np.array([1]), "stop": np.array([3])})
    assert answer["error"].tolist() == ["no such weights"] * 2
    with pytest.raises(UserError, match=r"^no such weights$"):
        _collect([answer], 4, progress=False)
    with pytest.raises(RuntimeError, match="4 of 4 rows"):
        _collect([], 4, progress=False)


def zero_shot_set(sizes: list[int], rule: Protocol, length: int = 16) -> ZeroShotSet:
    """Documents of these sizes in the 27 symbols, laid out by a rule; the space serves as end of text."""
    generator = np.random.default_rng(2)
    documents = [generator.integers(0, 26, size).astype(np.uint8) for size in sizes]
    cut = windows(documents, rule, length, 26)
    return ZeroShotSet("ptb", "test", "ptb_detokenizer", rule, cut, characters=4 * sum(sizes), vocabulary="gpt2")


@pytest.mark.parametrize("name", ["md4", "mdlm"])
def test_zero_shot_reports_say_how(tmp_path, name):
    """A uniform network pays log2 27 bits for each scored token, once; nothing for context, ends and padding."""
    model = build(ModelConfig(vocab_size=27, length=16, network=TransformerConfig(feature_dim=16, heads=2, layers=1)))
    found = zero_shot_set([30, 7, 40], protocol(name, 16))
    report = evaluate(model, found, draws=2, progress=False)
    assert report.bits_per_token == pytest.approx(math.log2(27), rel=1e-6)
    assert report.tokens == 77
    assert report.bits_per_character == pytest.approx(report.bits_per_token / 4)
    assert report.clusters == len(np.unique(found.windows.documents)) < report.rows
    assert report.zero_shot is not None
    assert (report.zero_shot.protocol, report.zero_shot.stride) == (name, 8 if name == "mdlm" else None)
    json_file, markdown_file = write(report, tmp_path)
    assert json_file.stem == f"likelihood-test-seed-0-ptb-{name}" + ("-stride-8" if name == "mdlm" else "")
    assert LikelihoodReport.model_validate_json(json_file.read_text()) == report
    text = markdown_file.read_text()
    for expected in (
        f"protocol {name}",
        "| detokenizer | ptb_detokenizer |",
        "| vocabulary | gpt2 |",
        "| window | 16 |",
    ):
        assert expected in text


def test_the_error_is_that_of_documents():
    """Windows of one document stand or fall together: the same windows as one document each have a smaller error."""
    model, rule = text_model(), protocol("md4", 16)
    together = zero_shot_set([160] * 12, rule)
    apart = dataclasses.replace(together.windows, documents=np.arange(120))
    clustered = evaluate(model, together, draws=2, progress=False)
    naive = evaluate(model, dataclasses.replace(together, windows=apart), draws=2, progress=False)
    assert clustered.bits_per_token == naive.bits_per_token
    assert (clustered.clusters, naive.clusters) == (12, 120)
    assert clustered.standard_error != naive.standard_error


def test_genmd4_has_its_own_estimator_and_whole_windows():
    network = TransformerConfig(feature_dim=16, heads=2, layers=1)
    model = build(ModelConfig(vocab_size=27, length=16, objective="genmd4", network=network))
    found = zero_shot_set([30, 7], protocol("md4", 16))
    with pytest.raises(UserError, match="use continuous"):
        evaluate(model, found, progress=False)
    with pytest.raises(UserError, match="whole examples only"):
        evaluate(model, found, estimator="continuous", progress=False)
    whole = dataclasses.replace(found.windows, tokens=found.windows.tokens[:2], scored=found.windows.scored[:2])
    report = evaluate(model, dataclasses.replace(found, windows=whole), estimator="continuous", progress=False)
    assert report.estimator == "continuous, GenMD4"
    assert report.name.endswith("-continuous-genmd4")


def test_discrete_time_is_named_with_its_steps():
    report = evaluate(TOY.model(), rows_of_the_law(20), estimator="discrete", timesteps=7, progress=False)
    assert report.estimator == "discrete, T = 7"
    assert report.name == "likelihood-array-seed-0-discrete-t7"


def test_labels_are_told_to_a_model_with_classes(tmp_path):
    """Rows of images with their labels; another label gives another number."""
    network = TransformerConfig(feature_dim=16, heads=2, layers=1)
    model = build(ModelConfig(vocab_size=27, length=16, classes=3, network=network))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.2 * torch.randn(parameter.shape, generator=generator)
    rows = np.random.default_rng(1).integers(0, 27, (6, 16)).astype(np.uint8)

    def report(labels: list[int]) -> LikelihoodReport:
        return evaluate(model, write_images(tmp_path / str(labels[0]), rows, labels), draws=2, progress=False)

    first, second, null = report([0, 1, 2, 0, 1, 2]), report([1, 1, 2, 0, 1, 2]), report([-1, 1, 2, 0, 1, 2])
    assert len({r.bits_per_token for r in (first, second, null)}) == 3
    assert first.bits_per_dimension == first.bits_per_token
    assert "bits per dimension" in first.headline()
    assert first.bits_per_character is None
    with pytest.raises(UserError, match=r"label 3, the model knows 0\.\.2"):
        report([3, 1, 2, 0, 1, 2])
    with pytest.raises(UserError, match="no labels"):
        evaluate(model, rows, progress=False)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"limit": 0}, "limit is 0"),
        ({"workers": -1}, "workers is -1"),
        ({"timesteps": 3}, "timesteps=3 is a setting of the estimator discrete"),
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
