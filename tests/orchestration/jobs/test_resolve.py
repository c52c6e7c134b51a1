"""A command as typed becomes a job that stands alone, or one message; nothing is sent here."""

import sys
import zipfile
from pathlib import Path

import pytest
import yaml

from md4.errors import UserError
from orchestration.cli import main
from orchestration.config import load
from orchestration.jobs import versions, wheel
from orchestration.jobs.package import pack
from orchestration.jobs.resolve import resolve
from orchestration.jobs.run import _begun, _command
from orchestration.jobs.spec import Job, make
from orchestration.search import run as run_of_search
from orchestration.search.run import make_plan

PLACE = "s3://bucket/team"


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch) -> Path:
    """Every test is in a folder of its own, with a cache of its own."""
    monkeypatch.setenv("MD4_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("MD4_PLACE", raising=False)
    folder = tmp_path / "here"
    folder.mkdir()
    monkeypatch.chdir(folder)
    return folder


def test_training_goes_with_its_resolved_settings():
    job = resolve("train", ["pydocs-tiny", "name=Mine", "train.steps=7"], place=PLACE)
    assert (job.name, job.arguments) == ("mine", ("config.yaml",))
    assert job.place == f"{PLACE}/runs/Mine"
    expected = load("pydocs-tiny", ["name=Mine", "train.steps=7", f"runs={PLACE}/runs", f"data.directory={PLACE}/data"])
    assert yaml.safe_load(job.files["config.yaml"]) == expected.model_dump(mode="json")
    assert Job.model_validate_json(job.model_dump_json()) == job


def test_a_file_laid_over_the_preset_is_part_of_them(elsewhere):
    (elsewhere / "mine.yaml").write_text("train: {steps: 9}\n")
    job = resolve("train", ["pydocs-tiny", "--config", "mine.yaml", "--resume", f"runs={PLACE}"], place=PLACE)
    assert job.arguments == ("--resume", "config.yaml")
    assert yaml.safe_load(job.files["config.yaml"])["train"]["steps"] == 9


def test_other_verbs_keep_their_options():
    typed = ["runs/mine", "--rows", "3", "--no-ema", "--zero-shot", "ptb", "--data", "s3://bucket/sets"]
    job = resolve("evaluate", typed, place=PLACE)
    assert job.name == "evaluate-mine"
    assert job.arguments == (
        "--rows", "3", "--zero-shot", "ptb", "--data", "s3://bucket/sets", "--no-ema", f"{PLACE}/runs/mine",
    )  # fmt: skip
    assert resolve("sample", [f"{PLACE}/runs/mine"]).arguments == (f"{PLACE}/runs/mine",)
    assert resolve("quality", [f"{PLACE}/runs/mine", "top_p=0.9"]).arguments == (f"{PLACE}/runs/mine", "top_p=0.9")


def test_a_place_comes_from_the_environment_too(monkeypatch):
    monkeypatch.setenv("MD4_PLACE", "/shared")
    job = resolve("prepare", ["pydocs-tiny", "name=mine"])
    assert yaml.safe_load(job.files["config.yaml"])["data"]["directory"] == "/shared/data"
    assert (job.name, job.place) == ("prepare-mine", "/shared/data")


def test_included_files_go_along(elsewhere):
    (elsewhere / "corpus").mkdir()
    (elsewhere / "corpus" / "a.txt").write_text("words")
    job = resolve(
        "train", ["pydocs-tiny", "data.source=text", "data.path=corpus", "name=x"], place=PLACE, include=["corpus"]
    )
    assert job.files["corpus/a.txt"] == "words"
    assert yaml.safe_load(job.files["config.yaml"])["data"]["path"] == "corpus"


def test_a_trained_tokenizer_goes_along(elsewhere):
    from tests.orchestration.conftest import write_corpus

    corpus = write_corpus(elsewhere / "corpus.txt", words=3000)
    from pipelines.vocabularies.training import train as learn

    learn(load("pydocs-tiny", ["data.source=text", f"data.path={corpus}"]).data, 300, Path("words"), 1, lambda _: None)
    job = resolve("train", ["pydocs-tiny", "data.vocabulary=words", "name=x"], place=PLACE)
    assert yaml.safe_load(job.files["config.yaml"])["data"]["vocabulary"] == "words/tokenizer.json"
    assert job.files["words/tokenizer.json"] == Path("words/tokenizer.json").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "pydocs-tiny"], "runs=runs would lie in the job's own folder"),
        (["evaluate", "runs/mine"], "run=runs/mine would lie in the job's own folder"),
        (["--place", "shared", "train", "pydocs-tiny"], "place 'shared' must be s3://bucket/prefix, or an absolute"),
        (["--place", PLACE, "train", "pydocs-tiny", "train.stepz=1"], "did you mean 'train.steps'"),
        (["--place", PLACE, "train", "pydocs-tiny", "train.steps=-1"], "train.steps=-1"),
        (["--place", PLACE, "train", "pydocs-tiny", "--dry-run"], "md4 submit --dry-run train"),
        (["--place", PLACE, "train", "pydocs-tiny", "data.source=text", "data.path=a.txt"], "--include a.txt"),
        (["--place", PLACE, "train", "pydocs-tiny", "WANDB_API_KEY=abc"], "WANDB_API_KEY looks like a secret"),
        (["--secret", "A=abc", "evaluate", f"{PLACE}/x"], "secret A is not a reference"),
        (["--label", "owner", "evaluate", f"{PLACE}/x"], "--label 'owner' is not of the form KEY=VALUE"),
        (["--label", "owner=a b", "evaluate", f"{PLACE}/x"], "owner=a b: at most 63 of"),
        (["--time-limit", "soon", "evaluate", f"{PLACE}/x"], "--time-limit 'soon' is not a time"),
        (["--attempts", "2000", "evaluate", f"{PLACE}/x"], "retry.attempts=2000: Input should be less than"),
        (["--name", "a/b", "evaluate", f"{PLACE}/x"], "name='a/b': at most 63 of a-z"),
        (["--include", "absent", "evaluate", f"{PLACE}/x"], "--include absent: there is no such file"),
        (["--include", "picture.png", "evaluate", f"{PLACE}/x"], "picture.png is not a text file"),
        (["--include", "pipelines", "evaluate", f"{PLACE}/x"], "would be taken for the package 'pipelines'"),
        (["serve", f"{PLACE}/x"], "md4 serve is no job for a cluster: those are train, prepare"),
        (["evaluate", f"{PLACE}/x", "--bogus"], "No such option: --bogus"),
        (["evaluate"], "Missing argument"),
        (["evaluate", f"{PLACE}/x"], "which cluster? --address http://HOST:8265"),
        (["--address", "ftp://host", "evaluate", f"{PLACE}/x"], "address 'ftp://host' must be http://HOST:PORT"),
        (["--address", "127.0.0.1:9", "evaluate", f"{PLACE}/x"], "nobody answers at 127.0.0.1:9 ("),
        (["--address", "http://127.0.0.1:9", "evaluate", f"{PLACE}/x"], "no dashboard of Ray answers at http://127"),
    ],
)
def test_mistakes_are_one_message(elsewhere, monkeypatch, capsys, arguments, message):
    (elsewhere / "a.txt").write_text("text")
    (elsewhere / "picture.png").write_bytes(b"\x89PNG\xff")
    (elsewhere / "pipelines").mkdir()
    (elsewhere / "pipelines" / "__init__.py").write_text("")
    for name in ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(sys, "argv", ["md4", "submit", *arguments])
    with pytest.raises(SystemExit) as left:
        main()
    said = capsys.readouterr().err
    assert left.value.code == (1 if "answers" in message else 2)
    assert message in said
    assert "Traceback" not in said


def test_dry_run_shows_all_that_would_be_sent(monkeypatch, capsys):
    arguments = ["--place", PLACE, "--label", "owner=anna", "--secret", "KEY=env:TEAM_KEY", "--dry-run"]
    monkeypatch.setattr(sys, "argv", ["md4", "submit", *arguments, "train", "pydocs-tiny", "name=mine"])
    main()
    said = capsys.readouterr().out
    for part in (
        f"runs: {PLACE}/runs", '"md4/label/owner": "anna"', "KEY=env:TEAM_KEY", "-py3-none-any.whl", "sha256",
        "ray job submit --address", "--submission-id mine-1", "nothing was sent",
    ):  # fmt: skip
        assert part in said


def test_the_wheel_holds_our_code_and_no_dependencies(tmp_path):
    path = wheel.build(tmp_path)
    assert wheel.build(tmp_path / "other").read_bytes() == path.read_bytes()
    with zipfile.ZipFile(path) as archive:
        names = archive.namelist()
        about = next(name for name in names if name.endswith("METADATA"))
        assert b"Requires-Dist" not in archive.read(about)
    assert {"md4/presets/pydocs-tiny.yaml", "orchestration/jobs/run.py", "orchestration/serving/page/index.html"} <= {
        *names
    }
    assert {name.split("/")[0].partition("-")[0] for name in names} == {"md4", "pipelines", "orchestration", "infra"}
    assert not [name for name in names if "__pycache__" in name or name.startswith("tests")]


def test_what_is_packed_lies_under_a_hash_of_its_content():
    facts = {"verb": "evaluate", "arguments": ("s3://bucket/x",), "name": "x"}
    first, same = pack(make(**facts), "x-1"), pack(make(**facts), "x-2")
    other = pack(make(**facts, files={"space.yaml": "{}"}), "x-1")
    assert (first.folder, first.wheel) == (same.folder, same.wheel)
    assert other.folder != first.folder
    assert sorted(path.name for path in other.folder.iterdir()) == ["environment.json", "job.json", "space.yaml"]
    assert first.metadata["md4/attempt"] == "1"


def test_packages_that_are_missing_or_too_old_are_named():
    sent = versions.describe()
    assert versions.compare(sent) == []
    with pytest.raises(
        UserError, match=r"absent-package is missing \(>=2 is needed\), pydantic is .* \(>=99 is needed\)"
    ):
        versions.compare({**sent, "requires": ["absent-package>=2", "pydantic>=99"]})
    other = {**sent, "versions": {**sent["versions"], "pydantic": "2.0"}, "python": "3.9.1"}
    python, pydantic = versions.compare(other)
    assert python.endswith("(the sender has 3.9.1)")
    assert pydantic.startswith("pydantic ")


@pytest.mark.parametrize(
    "name", ["../x", "/x", "a/../x", "md4/x.py", "orchestration.py", "infra/a", "job.json", "environment.json", ""]
)
def test_files_stay_in_the_jobs_folder_and_shadow_nothing(name):
    with pytest.raises(UserError, match="files"):
        make(verb="train", name="x", files={name: ""})


def test_a_suite_goes_along_and_its_figures_stay(elsewhere, monkeypatch):
    """The table is not in the job's own folder, whether it was named, is this machine's, or was left out."""
    (elsewhere / "nightly.yaml").write_text("likelihood: [{data: s3://bucket/set}]\nquality: [{judge: gpt2}]\n")
    job = resolve("evaluate", ["runs/mine", "--suite", "nightly.yaml"], place=PLACE)
    assert job.arguments == ("--suite", "nightly.yaml", "--results", f"{PLACE}/results", f"{PLACE}/runs/mine")
    assert "s3://bucket/set" in job.files["nightly.yaml"]
    assert job.place == f"{PLACE}/runs/mine"
    monkeypatch.setenv("MD4_RESULTS", "s3://other/table")
    assert "s3://other/table" in resolve("evaluate", ["/runs/mine", "--suite", "pydocs"]).arguments
    assert "--results" not in resolve("evaluate", ["/runs/mine"]).arguments
    job = resolve("train", ["pydocs-tiny", "evaluation.suite=nightly.yaml", "evaluation.suite_every=9"], place=PLACE)
    told = yaml.safe_load(job.files["config.yaml"])["evaluation"]
    assert (told["suite"], told["suite_results"]) == ("nightly.yaml", "s3://other/table")
    assert "nightly.yaml" in job.files
    (elsewhere / "set").mkdir()
    (elsewhere / "nightly.yaml").write_text("likelihood: [{data: set}]\n")
    with pytest.raises(UserError, match=r"nightly\.yaml: data=set lies here, where the cluster can't read it"):
        resolve("evaluate", ["/runs/mine", "--suite", "nightly.yaml"])
    monkeypatch.delenv("MD4_RESULTS")
    with pytest.raises(UserError, match="results=results would lie in the job's own folder"):
        resolve("evaluate", ["/runs/mine", "--suite", "pydocs"])


def test_a_version_of_the_registry_is_looked_up_by_the_job(monkeypatch):
    """Whatever the name stands for then; in the registry that is this machine's now."""
    job = resolve("evaluate", ["small@production", "--suite", "pydocs"], name=None, place=PLACE)
    assert job.name == "evaluate-small-production"
    assert job.arguments == (
        "--suite", "pydocs", "--results", f"{PLACE}/results", "--registry", f"{PLACE}/registry", "small@production",
    )  # fmt: skip
    monkeypatch.setenv("MD4_REGISTRY", "s3://other/models")
    assert "s3://other/models" in resolve("evaluate", ["small@3"]).arguments
    assert "--registry" not in resolve("evaluate", ["/runs/mine"]).arguments


@pytest.fixture
def searched(elsewhere) -> list[str]:
    """What is typed after `md4 submit search`: a space of one's own, overrides of the search and of its trials."""
    (elsewhere / "mine.yaml").write_text("space: {optimizer.learning_rate: [1e-3, 3e-3]}\nsearch: {budget: 5898240}\n")
    return ["pydocs-tiny", "--space", "mine.yaml", "search.rounds=3", "train.workers=1", "search.algorithm=grid"]


def test_a_search_goes_with_its_settings_as_given(searched, elsewhere, tmp_path, monkeypatch):
    """What follows from settings is each trial's own, so it is not sent; the job's command makes the same plan."""
    here = make_plan("pydocs-tiny", Path("mine.yaml"), searched[3:], None, "pydocs-tiny-mine", "/shared/studies")
    job = resolve("search", searched, place="/shared")
    assert (job.name, job.place) == ("search-pydocs-tiny-mine", "/shared/studies/pydocs-tiny-mine")
    assert job.arguments == (
        "--space", "mine.yaml", "--name", "pydocs-tiny-mine", "--studies", "/shared/studies",
        "pydocs-tiny.yaml", "search.rounds=3", "search.algorithm=grid",
    )  # fmt: skip
    tree = yaml.safe_load(job.files["pydocs-tiny.yaml"])
    assert tree["data"].pop("directory") == "/shared/data"
    assert "length" not in tree["model"]
    assert tree == here.base

    there = tmp_path / "there"
    there.mkdir()
    for name, text in job.files.items():
        (there / name).write_text(text)
    monkeypatch.chdir(there)
    plans = []
    monkeypatch.setattr(run_of_search, "run", lambda plan, resume, *_: plans.append((plan, resume)))
    monkeypatch.setattr(sys, "argv", _command(job, _begun(job, None))[2:])
    main()
    ((plan, resume),) = plans
    assert (plan.space, plan.points, plan.folder, resume) == (here.space, here.points, here.folder, False)
    assert plan.base == {**here.base, "data": {**here.base["data"], "directory": "/shared/data"}}


def test_paths_of_a_search_are_the_clusters(searched, elsewhere, monkeypatch):
    (elsewhere / "corpus").mkdir()
    (elsewhere / "corpus" / "a.txt").write_text("words")
    more = ["data.source=text", "data.path=corpus", "data.directory=sets", "--name", "mine", "--studies", "/own"]
    (elsewhere / "mine").write_text("a name is no path")
    job = resolve("search", [*searched, *more], place=PLACE, include=["corpus"])
    data = yaml.safe_load(job.files["pydocs-tiny.yaml"])["data"]
    assert (data["path"], data["directory"]) == ("corpus", f"{PLACE}/sets")
    assert set(job.files) == {"corpus/a.txt", "mine.yaml", "pydocs-tiny.yaml"}
    assert job.place == "/own/mine"
    mixed = 'data.mixture=[{name: a, source: text, path: corpus, directory: sets}, {name: b, directory: "/all"}]'
    job = resolve("search", [*searched, mixed, "--studies", "/own"], place="/shared", include=["corpus"])
    sets = yaml.safe_load(job.files["pydocs-tiny.yaml"])["data"]["mixture"]
    assert sets == [{"name": "a", "source": "text", "path": "corpus", "directory": "/shared/sets"}, {
        "name": "b", "directory": "/all"}]  # fmt: skip
    assert resolve("search", ["pydocs-tiny", "--space", "schedules"], place="/x").arguments[:2] == (
        "--space", "schedules",
    )  # fmt: skip


def test_a_study_needs_a_folder_that_all_machines_share(searched):
    message = r"studies=studies must be a folder that all machines of the cluster share, and can't lie in S3"
    for place in (PLACE, None):
        with pytest.raises(UserError, match=message):
            resolve("search", searched, place=place)
    with pytest.raises(UserError, match=r"studies=s3://bucket/studies must be a folder"):
        resolve("search", [*searched, "--studies", "s3://bucket/studies"], place="/shared")
    with pytest.raises(UserError, match=r"unknown key 'search\.rouns'; did you mean 'rounds'"):
        resolve("search", [*searched, "search.rouns=3"], place="/shared")
    with pytest.raises(UserError, match=r"--space is missing"):
        resolve("search", ["pydocs-tiny"], place="/shared")


def test_a_study_that_exists_is_resumed_by_the_next_attempt(searched, tmp_path):
    job = resolve("search", searched, place=str(tmp_path / "shared"))
    study = Path(job.place)
    assert "--resume" not in _command(job, _begun(job, None))
    study.mkdir(parents=True)
    (study / "study.yaml").write_text("")
    assert _command(job, _begun(job, None))[3:5] == ["search", "--resume"]
    asked = resolve("search", [*searched, "--resume"], place=str(tmp_path / "shared"))
    assert _command(asked, _begun(asked, None)).count("--resume") == 1
