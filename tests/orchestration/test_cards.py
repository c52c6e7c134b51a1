"""Model cards: every figure is a report's, what is absent is said, and both forms can be read without anything else."""

import json
import re
import sys
from datetime import UTC, datetime
from html.parser import HTMLParser
from pathlib import Path

import pytest
from huggingface_hub import ModelCard

import md4
from md4.errors import UserError
from md4.samplers import SamplingConfig
from md4.samplers.saved import SavedSettings
from orchestration import cards
from orchestration.cli import main
from orchestration.grids import keep
from orchestration.runs import export, load_model
from orchestration.sampling import sample
from pipelines.config import prepared_path
from pipelines.reports import LikelihoodReport, Provenance, write
from tests.orchestration.small_run import make_run, write_run
from tests.orchestration.test_pictures import write_image_run
from tests.pipelines.small import some_rows, write_set
from tests.s3 import BUCKET

TRAIN = {
    "kind": "train", "bits_per_token": 4.1, "tokens_per_second": 1234.0, "seconds_per_step": 0.5, "tflops": 0.02,
    "epochs": 1.5, "skipped_steps": 2,
}  # fmt: skip
ABOUT = "A <script>alert(1)</script> of tests & more"


def likelihood(weights_hash: str, bits: float, **changes) -> LikelihoodReport:
    return LikelihoodReport(
        **{
            "created": datetime.now(UTC), "model": Provenance(run="small", step=7, weights_hash=weights_hash),
            "data_fingerprint": "f" * 64, "split": "validation", "vocabulary": "text8", "seed": 0, "seconds": 1.0,
            "estimator": "mask_count", "draws": 4, "rows": 100, "rows_available": 200, "clusters": 50, "tokens": 3200,
            "window": 32, "bits_per_token": bits, "standard_error": 0.0123, "perplexity": 2**bits,
            "perplexity_error": 0.1, "characters_per_token": 1.0, "bits_per_character": bits,
            "bits_per_character_error": 0.0123, **changes,
        }
    )  # fmt: skip


def with_facts(path: Path) -> Path:
    """A run with a report on its weights, one on others, samples, a kept grid and two logged steps."""
    loaded = load_model(path)
    write(likelihood(loaded.weights_hash, 4.5678), path / "reports")
    write(likelihood("another", 3.2109, seed=9), path / "reports")
    (path / "reports" / "torn.json").write_text('{"kind": "likel')
    report = sample(loaded, count=2, seed=5, settings=SamplingConfig(steps=4))
    report.samples[0].text = "``` <b>not bold</b>"
    (path / "samples").mkdir(exist_ok=True)
    (path / "samples" / "step-00000007-seed-5.json").write_text(report.model_dump_json())
    (path / "samples" / "torn.json").write_text('{"weights_hash": ')
    keep(path, SavedSettings(name="searched", steps=2, settings=SamplingConfig(grid=(1.0, 0.3, 0.0))))
    rows = [{**TRAIN, "step": step} for step in (4, 7)]
    (path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def stated(folder: Path) -> list[str]:
    """Settings of a run whose data are not there."""
    about = ["card.weights_licence=apache-2.0", f"card.about={ABOUT}", "card.limits=[It was never trained.]"]
    return [*about, f"data.directory={folder / 'data'}"]


@pytest.fixture
def run(tmp_path) -> Path:
    return with_facts(write_run(tmp_path / "runs", *stated(tmp_path)))


class Page(HTMLParser):
    """What of a page would need another file, its text, and its pictures."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.outside: list[str] = []
        self.scripts, self.images, self.words = 0, 0, ""
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.scripts += tag == "script"
        self.images += tag == "img"
        self.outside += [f"{tag} {value[:40]}" for name, value in attrs if name in ("src", "href", "srcset")
                         and not value.startswith("data:image/png;base64,")]  # fmt: skip

    def handle_data(self, data):
        self.words += data


def test_a_runs_card_has_the_figures_of_its_own_weights_alone(run):
    facts = cards.of_run(run)
    assert [(figure.value, figure.standard_error) for figure in facts.figures] == [(4.5678, 0.0123)]
    for text in (cards.markdown(facts), Page(cards.html(facts)).words):
        assert "4.5678 ± 0.0123 bits per character" in text
        assert "mask_count, 100 rows, 4 draws each" in text
        assert "3.2109" not in text
        assert "1 reports of the run are on other weights" in text
        assert "It was never trained." in text
        assert "grid=searched steps=2" in text
        assert "seed 5" in text
        assert load_model(run).weights_hash in text
        assert "2 steps of its training were skipped" in text
    training = facts.training
    assert training is not None
    assert training.tokens == 7 * 128 * 32
    # 4 steps of half a second at 0.02 TFLOP/s, then 3.
    assert training.operations == pytest.approx(7 * 0.5 * 0.02e12)
    assert training.tokens_per_second == 1234


def test_what_is_not_known_is_said(run, tmp_path):
    (run / "reports" / "likelihood-validation-step-00000007-seed-0.json").unlink()
    facts = cards.of_run(run)
    said = cards.markdown(facts)
    assert facts.figures == ()
    assert "None: there is no report on these weights." in said
    assert "The likelihood of a whole split (`md4 evaluate`)" in said
    assert "The quality of its samples" in said
    assert "| training data | not stated |" in said
    assert "| fingerprint | not known |" in said  # the prepared set is not there
    assert "| precision | not known |" in said


def test_the_data_are_counted_where_they_are_at_hand(run, tmp_path):
    write_set(Path(str(prepared_path(load_model(run).config.data))), [some_rows(12, 32)], 4, split="validation")
    (data,) = cards.of_run(run).data or ()
    assert data.splits is not None
    (split,) = [each for each in data.splits if each.name == "validation"]
    assert split.rows == 12
    assert f"| validation | {split.documents:,} | {split.tokens:,} | 12 |" in cards.markdown(cards.of_run(run))
    assert data.fingerprint is not None
    assert data.fingerprint in Page(cards.html(cards.of_run(run))).words


def test_hubs_can_read_it(run, tmp_path):
    """Front matter by huggingface_hub's own reader, without a network."""
    cards.write(tmp_path, cards.of_run(run, licences=cards.Licences(data="PSF-2.0")))
    card = ModelCard.load(tmp_path / "card.md")
    assert card.data.license == "apache-2.0"
    assert card.data.pipeline_tag == "text-generation"
    (result,) = card.data.eval_results or []
    assert (result.metric_value, result.metric_type) == (4.5678, "bits per character")
    assert "| training data | PSF-2.0 |" in card.text
    own = cards.of_run(run, licences=cards.Licences(weights="For the family, only"))
    assert ModelCard(cards.markdown(own)).data.license == "other"


def test_the_page_needs_nothing_else_and_runs_nothing(run, tmp_path):
    facts = cards.of_run(run)
    files = cards.write(tmp_path, facts)
    assert [file.relative_to(tmp_path).as_posix() for file in files] == ["card/loss.png", "card.md", "card.html"]
    page = Page((tmp_path / "card.html").read_text())
    assert page.outside == []
    assert (page.scripts, page.images) == (0, 1)
    assert ABOUT in page.words
    assert "``` <b>not bold</b>" in page.words
    markdown = (tmp_path / "card.md").read_text()
    assert "````\n``` <b>not bold</b>\n````" in markdown
    for link in re.findall(r"\]\((card/[^)]+)\)", markdown):
        assert (tmp_path / link).read_bytes()[:4] == b"\x89PNG"
    assert not list(run.rglob("card-loss.png"))


def test_an_exported_model_says_what_it_holds(run, tmp_path):
    """Its reports, by either hash of the weights; of the training only where it comes from. It stays loadable."""
    folder = export(run, tmp_path / "model", report=lambda _: None)
    loaded = load_model(run)
    (folder / "evaluation").mkdir()
    write(likelihood(loaded.weights_hash, 4.25), folder / "evaluation")
    write(likelihood("another", 1.5, seed=3), folder / "evaluation")
    (folder / "lineage.json").write_text(json.dumps({"data_fingerprint": "abc", "files": {"a": 1}}))
    facts = cards.of(folder, about="small")
    assert [figure.value for figure in facts.figures] == [4.25]
    assert facts.training is None
    assert facts.data is None
    assert facts.lineage["data fingerprint"] == "abc"
    cards.write(folder, facts)
    said = (folder / "card.md").read_text()
    assert "Not known: the run is not at hand." in said
    assert "| weights | not stated |" in said
    assert md4.load(folder).card.sha256 in said
    assert cards.of(folder) == facts.model_copy(update={"about": None})


def test_images(tmp_path):
    loaded = write_image_run(tmp_path)
    facts = cards.of_run(loaded.path)
    assert (facts.model.kind, facts.model.shape) == ("images", (8, 8, 1))
    said = cards.markdown(facts)
    assert "It makes images of 8 x 8 x 1 and no others." in said
    assert "pipeline_tag: unconditional-image-generation" in said
    assert "None have been kept." in said


def test_the_command(run, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["md4", "card", str(run), "--data-licence", "PSF-2.0"])
    main()
    assert "| training data | PSF-2.0 |" in capsys.readouterr().out
    monkeypatch.setattr(sys, "argv", ["md4", "card", str(run), "--out", str(tmp_path)])
    main()
    assert f"written: {tmp_path / 'card.html'}" in capsys.readouterr().out
    for arguments, message in (
        ([str(run), "--out", str(tmp_path / "absent")], "is not a folder: a card goes into one that exists"),
        ([str(tmp_path / "absent")], "is not a run's folder"),
    ):
        monkeypatch.setattr(sys, "argv", ["md4", "card", *arguments])
        with pytest.raises(SystemExit) as left:
            main()
        assert left.value.code == 2
        assert message in capsys.readouterr().err


def test_a_run_in_s3_has_the_same_card(run, s3, tmp_path):
    """As a mirror of a training's folder has put it there."""
    remote = make_run(f"s3://{BUCKET}/runs", *stated(tmp_path))
    for folder in ("reports", "samples", "grids"):
        for file in (run / folder).rglob("*.*"):
            remote.place.write(file.relative_to(run).as_posix(), file.read_bytes())
    remote.place.write("metrics.jsonl", (run / "metrics.jsonl").read_bytes())
    ours, theirs = cards.of_run(run), cards.of(f"s3://{BUCKET}/runs/small")
    assert theirs.figures == ours.figures
    assert theirs.samples == ours.samples
    assert theirs.kept == ours.kept
    assert [one.name for one in theirs.pictures] == ["loss"]
    assert cards.markdown(theirs).replace(f"s3://{BUCKET}/runs", "PLACE") == cards.markdown(ours).replace(
        str(run.parent), "PLACE"
    )


@pytest.mark.parametrize(
    ("licence", "said"),
    [
        ("Apache-2.0", {"license": "apache-2.0"}),
        ("MIT", {"license": "mit"}),
        ("proprietary", {"license": "other", "license_name": "proprietary"}),
    ],
)
def test_licences_as_hubs_know_them(run, licence, said):
    data = ModelCard(cards.markdown(cards.of_run(run, licences=cards.Licences(weights=licence)))).data.to_dict()
    assert {name: value for name, value in data.items() if name.startswith("license")} == said


def test_a_run_that_went_on_from_another_says_so(tmp_path):
    place = "/runs/before/checkpoints/step-00000003-abcdef"
    run = write_run(tmp_path, f"train.start_from={place}")
    assert cards.of_run(run).lineage["began from"] == place
    assert f"| began from | {place} |" in cards.markdown(cards.of_run(run))


def test_a_report_that_lacks_something_is_named(run):
    file = run / "reports" / "likelihood-validation-step-00000007-seed-0.json"
    tree = json.loads(file.read_text())
    del tree["bits_per_character"], tree["bits_per_token"]
    file.write_text(json.dumps(tree))
    with pytest.raises(UserError, match=rf"{file.name} is not a whole report \('bits_per_token' is missing\)"):
        cards.of_run(run)


def test_a_damaged_lineage_is_named(run, tmp_path):
    folder = export(run, tmp_path / "model", report=lambda _: None)
    (folder / "lineage.json").write_text("{")
    with pytest.raises(UserError, match=r"lineage.json is not JSON"):
        cards.of_folder(folder)
