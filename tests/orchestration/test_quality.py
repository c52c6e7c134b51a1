"""`md4 quality` on small runs: from weights to reports, tables and pictures, with a real judge and a real network."""

import json
import math
import sys

import numpy as np
import pytest
import torch

from md4 import samplers
from md4.errors import UserError
from orchestration.cli import main
from orchestration.quality import Wanted, run
from orchestration.runs import load_model
from orchestration.sampling import Request, prepare
from orchestration.sampling_settings import read_changes
from pipelines.image_quality import FeatureNetwork, compare
from pipelines.images import brightness
from pipelines.judges import Judge
from pipelines.manifest import PixelFacts
from pipelines.quality import measure
from pipelines.quality_reports import QualityReport
from pipelines.shards import ShardSet
from tests.orchestration.small_run import LENGTH, write_run
from tests.orchestration.test_cli import md4
from tests.orchestration.test_pictures import write_image_run
from tests.pipelines.small import some_rows, write_set
from tests.pipelines.small_judge import Features, write_features, write_judge
from tests.pipelines.test_evaluate import write_set as write_labelled_set


@pytest.fixture
def parts(tmp_path):
    """A run, a judge and a prepared set with 12 rows for validation."""
    write_set(tmp_path / "set", [some_rows(12, LENGTH)], 4, split="validation")
    return write_run(tmp_path / "runs"), write_judge(tmp_path / "judge"), tmp_path / "set"


def quality(monkeypatch, capsys, *arguments: object) -> tuple[str, str]:
    """What the verb says, on both streams."""
    monkeypatch.setattr(sys, "argv", ["md4", "quality", *map(str, arguments)])
    main()
    return capsys.readouterr()


def test_the_whole_line(monkeypatch, capsys, parts):
    """Two temperatures at two numbers of steps: four reports and the frontier, as files and as JSON."""
    path, judge, data = parts
    said, progress = quality(
        monkeypatch, capsys, path, "top_p=0.95", "--judge", judge, "--data", data, "--count", 10, "--mauve",
        "--temperatures", "0.7,1.3", "--steps", "4,16", "--seed", 5, "--json",
    )  # fmt: skip
    found = json.loads(said)
    assert [(r["settings"]["steps"], r["settings"]["temperature"]) for r in found["reports"]] == [
        (4, 0.7), (4, 1.3), (16, 0.7), (16, 1.3)
    ]  # fmt: skip
    assert len(found["frontier"]["points"]) == 4
    assert "setting 4 of 4: 10 samples, 16 steps, temperature 1.3" in progress
    names = sorted(file.name for file in (path / "reports").iterdir())
    assert len([name for name in names if name.startswith("quality-validation-step-00000007-seed-5-")]) == 8
    assert [name.rsplit(".")[-1] for name in names if name.startswith("frontier")] == ["json", "md", "png"]

    report = QualityReport.model_validate(found["reports"][2])
    loaded = load_model(path)
    settings = loaded.config.sampling.changed({"top_p": 0.95, "steps": 16, "temperature": 0.7})
    request = Request(count=10, seed=5, settings=settings)
    (drawn,) = samplers.run(loaded.model, [prepare(loaded, request)])
    tokens = drawn.tokens.numpy()
    scores = Judge.load(str(judge)).score([loaded.vocabulary.decode(row) for row in tokens])
    expected = measure(tokens, 27, scores)
    assert report.text is not None
    assert report.text.model_dump() == pytest.approx(expected.model_dump(), rel=1e-5)
    assert report.text.perplexity == pytest.approx(math.exp(scores.nats.sum() / scores.tokens.sum()), rel=1e-5)
    assert report.data is not None
    assert report.data.entropy == pytest.approx(measure(ShardSet(data, "validation").read(IDS), 27).entropy)
    assert report.mauve is not None
    assert (report.samples, report.references, report.length, report.draws) == (10, 10, LENGTH, "exact")
    assert (report.model.step, report.split, report.settings["top_p"]) == (7, "validation", 0.95)
    assert report.calls_per_sample == pytest.approx(drawn.calls.double().mean().item())


IDS = np.arange(10) * 12 // 10  # evenly spaced


def test_without_a_judge_there_is_no_perplexity(monkeypatch, capsys, parts):
    path, _, data = parts
    said, _ = quality(monkeypatch, capsys, path, "--data", data, "--count", "4", "--temperatures", "0.5,1")
    assert "Entropy" in said
    assert "erplexity" not in said
    files = sorted((path / "reports").glob("*.json"))
    assert [file.name.split("-")[0] for file in files] == ["quality", "quality"]  # and no frontier
    reports = [QualityReport.model_validate_json(file.read_text()) for file in files]
    entropies = {r.settings["temperature"]: r.text.entropy for r in reports if r.text is not None}
    assert entropies[0.5] < entropies[1.0]


def test_samples_do_not_depend_on_batches_and_files_are_kept_apart(parts):
    path, _, data = parts
    said: list[str] = []
    one, two = (run(path, Wanted(data=data, count=5, batch_size=size), said.append).reports[0] for size in (2, 64))
    assert one.text == two.text
    assert one.name == two.name
    assert run(path, Wanted(data=data, count=6), said.append).reports[0].name != one.name
    assert run(path, Wanted(data=data, count=5, length=9), said.append).reports[0].length == 9


def test_a_run_whose_data_is_elsewhere_is_measured_without_it(tmp_path, parts):
    """Its own prepared set isn't on this machine; MAUVE can't do without."""
    path = write_run(tmp_path / "others", f"data.directory={tmp_path}/nowhere")
    said: list[str] = []
    (report,) = run(path, Wanted(judge=str(parts[1]), count=3), said.append).reports
    assert any("without the data's own figures" in line for line in said)
    assert (report.data, report.references, report.data_fingerprint) == (None, 0, "not at hand")
    assert report.text is not None
    assert report.text.perplexity is not None
    with pytest.raises(UserError, match="not a prepared set"):
        run(path, Wanted(judge=str(parts[1]), count=3, mauve=True), said.append)


def test_images(tmp_path):
    """FID and KID of the run's own samples, from pixels to the report."""
    loaded = write_image_run(tmp_path / "runs")
    rows = np.random.default_rng(0).integers(0, 17, (12, 64)).astype(np.uint8)
    facts = PixelFacts(
        shape=(8, 8, 1), levels=17, classes=None, class_names=None, independent_bits=0, histogram_bits=0,
        converted={}, rejected={}, rejected_examples=[],
    )  # fmt: skip
    write_labelled_set(tmp_path / "set", rows, vocabulary="pixels17", vocabulary_size=17, pixels=facts)
    network = write_features(tmp_path / "features.pt", Features(3), 3)
    wanted = Wanted(data=tmp_path / "set", features=network, count=6, references=8, kid_subset=6, seed=2)
    (report,) = run(loaded.path, wanted, lambda _: None).reports
    (drawn,) = samplers.run(loaded.model, [prepare(loaded, Request(count=6, seed=2, settings=loaded.config.sampling))])
    features = FeatureNetwork(network)
    real = ShardSet(tmp_path / "set", "validation").read(np.arange(8) * 12 // 8).reshape(-1, 8, 8, 1)
    pixels = [brightness(tokens, 17) for tokens in (drawn.tokens.numpy().reshape(-1, 8, 8, 1), real)]
    expected = compare(features(pixels[0]), features(pixels[1]), features, subset=6, seed=2)
    assert report.images == expected
    assert (report.text, report.judge) == (None, None)
    assert f"FID {expected.fid:.2f}" in report.headline()
    shown = (loaded.path / "reports" / f"{report.name}.md").read_text()
    assert f"| features sha256 | {expected.features_sha256} |" in shown
    for changes, message in (
        ({"kid_subset": 7}, "subset size is 7; of 6 samples and 8 real images 2 to 6"),
        ({"features": None, "kid_subset": None}, "need a network, --features FILE"),
        ({"judge": "gpt2"}, "makes images: --judge is about text"),
    ):
        with pytest.raises(UserError, match=message):
            run(loaded.path, Wanted(**(vars(wanted) | changes)), lambda _: None)


def test_classes_are_those_of_the_references(tmp_path):
    """Of a class-conditional run: the labels of the real images in turn, as the report says."""
    loaded = write_image_run(tmp_path / "runs", "model.classes=4", "model.network.feature_dim=64")
    rows = np.random.default_rng(0).integers(0, 17, (8, 64)).astype(np.uint8)
    facts = PixelFacts(
        shape=(8, 8, 1), levels=17, classes=4, class_names=None, independent_bits=0, histogram_bits=0,
        converted={}, rejected={}, rejected_examples=[],
    )  # fmt: skip
    labels = np.array([3, 1, 0, 2, 2, 1, 3, 0])
    write_labelled_set(tmp_path / "set", rows, labels, vocabulary="pixels17", vocabulary_size=17, pixels=facts)
    network = write_features(tmp_path / "features.pt", Features(1), 1)
    wanted = Wanted(data=tmp_path / "set", features=network, count=12, references=8, settings={"steps": 2})
    (report,) = run(loaded.path, wanted, lambda _: None).reports
    assert report.labels == "those of the references in turn"
    job = prepare(loaded, Request(count=12, label=0, settings=loaded.config.sampling.changed({"steps": 2})))
    order, known = ShardSet(tmp_path / "set", "validation").read_labelled(np.arange(8))
    assert known is not None
    classes = torch.from_numpy(np.resize(known, 12).astype(np.int64))
    (drawn,) = samplers.run(loaded.model, [samplers.Job(job.canvas, job.seeds, job.settings, classes)])
    features = FeatureNetwork(network)
    pixels = [brightness(np.asarray(tokens).reshape(-1, 8, 8, 1), 17) for tokens in (drawn.tokens, order)]
    assert report.images == compare(features(pixels[0]), features(pixels[1]), features)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--mauve"], "it needs --judge"),
        (["--judge", "no/such/folder"], "there is no such folder"),
        (["--features", "x.pt"], "makes text: --features is about images"),
        (["--kid-subset", "3"], "needs --features"),
        (["--count", "1"], "at least 2 samples"),
        (["--temperatures", "0.8,warm"], "--temperatures: 'warm' is not a number"),
        (["--temperatures", "1,1.0"], "names a value twice"),
        (["--temperatures", "0"], "temperature=0.0"),
        (["--steps", "2.5"], "'2.5' is not a whole number"),
        (["stepz=3"], "stepz"),
        (["steps"], "not of the form key=value"),
        (["steps=3", "--steps", "4"], "steps is given twice"),
        (["--length", "33"], "rows of 33 tokens are longer than the 32"),
        (["--data", "absent"], "not a prepared set"),
        (["--split", "tset"], "unknown split 'tset'"),
    ],
)
def test_mistakes_are_named_before_anything_is_sampled(monkeypatch, capsys, parts, arguments, expected):
    path, _, data = parts
    given = arguments if "--data" in arguments else [*arguments, "--data", data]
    with pytest.raises(SystemExit) as left:
        quality(monkeypatch, capsys, path, *given)
    said = capsys.readouterr()
    assert left.value.code == 2
    assert expected in said.err
    assert "Traceback" not in said.err
    assert "setting 1" not in said.out
    assert not (path / "reports").exists()


def test_a_name_that_the_hub_can_not_give(parts):
    """Without a network; nothing is downloaded by this test."""
    done = md4("quality", str(parts[0]), "--judge", "nobody/nothing", "--data", str(parts[2]), HF_HUB_OFFLINE="1")
    assert done.returncode == 2
    assert "neither a folder nor a model that the hub gives" in done.stderr
    assert "Traceback" not in done.stderr


def test_settings_are_typed():
    assert read_changes(["steps=3", "top_p=0.5", "grid=uniform"]) == {"steps": 3, "top_p": 0.5, "grid": "uniform"}
