"""Runs whose folder is in S3: read by url, made once, written from several processes, brought there while they grow."""

import json
import re
import shutil
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
from safetensors.torch import load_file

from md4.errors import UserError
from orchestration import events as event_files
from orchestration import progress, run_mirror
from orchestration.cli import main
from orchestration.events import Events
from orchestration.run_mirror import Mirror
from orchestration.runs import Run, load_model
from orchestration.status import status
from orchestration.train import train
from pipelines import storage
from pipelines.config import prepared_path
from pipelines.row_cache import private_folder
from pipelines.storage import Folder
from tests.orchestration.driver import wait_for
from tests.orchestration.small_run import LENGTH, make_run, write_run
from tests.pipelines.small import some_rows, write_set
from tests.pipelines.small_tokenizer import write_tokenizer
from tests.s3 import BUCKET

RUNS = f"s3://{BUCKET}/runs"
URL = f"{RUNS}/small"


def md4(monkeypatch, *arguments: str) -> None:
    monkeypatch.setattr(sys, "argv", ["md4", *arguments])
    main()


@pytest.fixture
def place(s3) -> Folder:
    """Of the run called small."""
    return Folder(URL)  # not before: with the fixture's short waits


# -- made --------------------------------------------------------------------------------------------------------------


def test_of_those_who_make_a_run_at_the_same_time_one_does(s3, tiny):
    """Equal settings, as of a job that was submitted twice; with requests that fail, and answers that are lost."""
    config, start = tiny(f"runs={RUNS}"), threading.Barrier(6)
    s3.fails(0.2, seed=3)

    def make(_: int) -> str | None:
        start.wait()
        try:
            Run.create(config)
        except UserError as error:
            return str(error)
        return None

    with ThreadPoolExecutor(6) as pool:
        found = list(pool.map(make, range(6)))
    refused = [one for one in found if one]
    assert len(refused) == 5
    assert set(refused) == {f"run {RUNS}/tiny exists already: continue it with --resume, or choose another name=..."}
    assert Run(f"{RUNS}/tiny").config == config
    assert s3.objects() == ["runs/tiny/config.yaml"]


def test_a_run_in_s3_is_resumed_only_as_what_it_is(s3, tiny):
    said: list[str] = []
    Run.create(tiny(f"runs={RUNS}", "train.steps=3"))
    again = Run.resume(tiny(f"runs={RUNS}", "train.steps=3", "train.workers=4"), said.append)
    assert said == ["resuming with changed train.workers"]
    assert Run(again.address).config.train.workers == 4
    with pytest.raises(
        UserError, match=rf"run {RUNS}/tiny can't be resumed .*\n?optimizer\.learning_rate: the run has"
    ):
        Run.resume(tiny(f"runs={RUNS}", "train.steps=3", "optimizer.learning_rate=0.5"), said.append)


def test_mistakes_are_said_before_anything_starts(s3, monkeypatch, capsys, corpus, tmp_path, place):
    data = [f"data.path={corpus}", "data.source=text", f"data.directory={tmp_path}", "name=x"]
    place.write("other", b"")
    monkeypatch.setattr("orchestration.train.cluster", lambda **_: pytest.fail("something was started"))

    def refused(*arguments: str, code: int = 2) -> str:
        with pytest.raises(SystemExit) as left:
            md4(monkeypatch, *arguments)
        assert left.value.code == code
        said = capsys.readouterr().err
        assert said.count("\n") == 1
        return said

    train = ("train", "pydocs-tiny", *data)
    assert "the bucket 'absent' does not exist" in refused(*train, "runs=s3://absent/runs")
    assert "the bucket 'absent' does not exist" in refused("status", "s3://absent/runs/x")
    assert "runs='s3:/bucket/x': 's3:/bucket/x' is neither a local path nor a url" in refused(
        *train, "runs=s3:/bucket/x"
    )
    assert f"{URL} is not a run's folder (it has no config.yaml)" in refused("sample", URL)
    s3.fails(1, ("denied",), only="PUT")
    assert "access was denied" in refused(*train, f"runs={RUNS}")  # to write: all may read
    s3.fails(0)
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    assert "the endpoint cannot be reached" in refused(*train, f"runs={RUNS}", code=1)  # it may be a moment later
    assert s3.objects() == ["runs/small/other"]


# -- read --------------------------------------------------------------------------------------------------------------


def test_the_verbs_take_a_url(s3, monkeypatch, capsys, corpus, tmp_path, place):
    """The same results as of the run on this machine, with a tenth of the requests failing."""
    data = ["data.source=text", f"data.path={corpus}", f"data.directory={tmp_path / 'data'}"]
    here = write_run(tmp_path, *data)
    run = make_run(RUNS, *data)
    url = run.address
    write_set(prepared_path(run.config.data), [some_rows(20, LENGTH)], 10, "validation")
    s3.fails(0.1, seed=2)

    def said(*arguments: str) -> str:
        capsys.readouterr()
        md4(monkeypatch, *arguments)
        return capsys.readouterr().out

    def same(*arguments: str) -> None:
        first, second = (
            re.sub(r"[0-9.]+ s\b", "", said(arguments[0], str(run), *arguments[1:])) for run in (here, url)
        )
        assert second == first.replace(str(here), url)

    same("sample", "--seed", "5", "steps=4")
    assert json.loads(place.read("samples/step-00000007-seed-5.json"))["samples"][0]["seed"] == 5
    same("evaluate", "--rows", "4", "--draws", "1")
    assert place.exists("reports/likelihood-validation-step-00000007-seed-0.md")
    written, following = said("grid", url, "--steps", "4", "--rows", "2", "--points", "8").splitlines()[-2:]
    assert following == f"next: md4 sample {url} grid=searched steps=4"
    assert place.exists("grids/searched-4.json")
    file = written.removeprefix("written: ")
    assert file.startswith(f"{url}/reports/grid-4")
    for grid in (("grid=searched", "steps=4"), (f"grid={file}",)):
        assert "written: " in said("sample", url, *grid)
    card = said("card", url)
    assert "`grid=searched steps=4`" in card
    assert "reports/likelihood-validation-step-00000007-seed-0.json" in card
    assert json.loads(said("status", url, "--json"))["checkpoint_step"] == 7
    said("export", url, str(tmp_path / "export"))
    said("export", str(here), str(tmp_path / "expected"))
    one, two = (load_file(tmp_path / name / "model.safetensors") for name in ("export", "expected"))
    assert all((one[name] == two[name]).all() for name in one | two)
    assert not any(path.startswith("s3:") for path in map(str, Path().iterdir()))


def test_a_vocabulary_that_is_a_file_comes_with_the_run(s3, tmp_path, monkeypatch):
    """To a machine that has neither the file nor a copy of it."""
    write_tokenizer(tmp_path / "tokenizer")
    url = make_run(RUNS, f"data.vocabulary={tmp_path / 'tokenizer'}").address
    shutil.rmtree(tmp_path / "tokenizer")
    (tmp_path / "other machine").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "other machine"))
    words = load_model(url).vocabulary
    assert words.decode(words.encode("the cat")) == "the cat"
    assert Run(url).config.data.vocabulary.startswith(str(tmp_path / "other machine"))


def test_a_run_in_s3_that_is_silent_for_a_while_may_be_well(place):
    make_run(RUNS)
    place.write(
        "progress.json", json.dumps({"step": 3, "time": 100.0, "moved": 100.0, "phase": "p", "spent": {}}).encode()
    )
    assert status(place, 130.0).state == "running"
    assert status(place, 140.0).state == "silent"


# -- written -----------------------------------------------------------------------------------------------------------


def test_events_of_several_processes_all_arrive_once(s3, place):
    """Each has a folder of its own, hence a thread of its own; a fifth of the requests fail."""
    s3.fails(0.2, seed=1)

    def add(number: int) -> None:
        events = Events(Folder(str(place), replace(storage.RETRIES, timeout=10 + number)), patience=60)
        for count in range(6):
            events.add("test", writer=number, count=count)

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(add, range(4)))
    found = [(one["writer"], one["count"]) for one in Events(place).read("test")]
    assert sorted(found) == [(writer, count) for writer in range(4) for count in range(6)]
    assert all([count for writer, count in found if writer == number] == list(range(6)) for number in range(4))


def test_events_outlive_an_outage_and_keep_nobody_waiting(s3, monkeypatch, place):
    monkeypatch.setattr(event_files, "_PAUSE", 0.05)
    events = Events(place, patience=0)
    s3.fails(1)
    events.add("test", count=1)
    assert not events.flush(0.2)
    events.add("test", count=2)
    s3.fails(0)
    assert events.flush(30)
    assert [one["count"] for one in events.read()] == [1, 2]


@pytest.fixture
def mirror(place, monkeypatch):
    """Makes mirrors of a run whose thread looks often; they are closed at the end."""
    monkeypatch.setattr(run_mirror, "_EVERY", 0.02)
    made: list[Mirror] = []

    def make() -> Mirror:
        made.append(Mirror(place, Events(place)))
        return made[-1]

    yield make
    for one in made:
        one.close()
        shutil.rmtree(one.folder, ignore_errors=True)


def test_what_is_written_arrives_complete(mirror, s3, place):
    one = mirror()
    (one.folder / "metrics.jsonl").write_text('{"step": 1}\n{"ste')
    (one.folder / "reports").mkdir()
    (one.folder / "reports" / "batch-3.json").write_text("{}")
    (one.folder / "reports" / ".powers.png").write_text("half of it")
    (one.folder / "reports" / "powers.md.12.tmp").write_text("half of it")
    (one.folder / "link").symlink_to(one.folder / "metrics.jsonl")
    one.close()
    assert s3.objects() == [f"runs/small/{name}" for name in ("metrics.jsonl", "reports/batch-3.json")]
    assert place.read("metrics.jsonl") == b'{"step": 1}\n'
    s3.fails(0)
    mirror().close()
    assert not [line for line in s3.asked if line.startswith("PUT")]  # what was fetched is not sent again


def test_a_worker_that_starts_has_the_metrics_of_s3_and_nothing_else(mirror):
    first = mirror()
    (first.folder / "metrics.jsonl").write_text('{"step": 1}\n')
    first.push("metrics.jsonl")
    (first.folder / "metrics.jsonl").write_text('{"step": 1}\n{"step": 2}\n')
    first._done.set()  # as if it were killed before the next look
    second = mirror()
    assert second.folder == first.folder
    assert {file.name for file in second.folder.iterdir()} == {"metrics.jsonl"}


def test_an_outage_delays_nothing_and_is_told(mirror, s3, place, monkeypatch):
    monkeypatch.setattr(run_mirror, "_BEHIND", 0.5)
    monkeypatch.setattr(event_files, "_PAUSE", 0.05)
    one, told = mirror(), Events(place)
    s3.fails(1, ("error",))
    (one.folder / "progress.json").write_text("{}")
    with pytest.raises(UserError, match="given up after 10 attempts"):
        one.push("progress.json")
    while not one.told:
        time.sleep(0.01)
    with pytest.raises(UserError, match=rf"{URL} lacks what was written last: it took more .* has it in {one.folder}"):
        one.close(0.05)
    s3.fails(0)
    one.close()
    assert place.read("progress.json") == b"{}"
    assert told.flush(30)
    (event,) = told.read("behind")
    assert "given up after 10 attempts" in event["why"]


def test_load_model_names_the_run_by_its_url(place):
    make_run(RUNS)
    assert load_model(place).path == place
    with pytest.raises(UserError, match=f"{URL} is in S3, and a folder of this machine is needed"):
        _ = Run(place).path


@pytest.mark.slow
@pytest.mark.ray
def test_a_run_goes_on_while_s3_is_away(ray_cluster, s3, tiny):
    """Every request fails from a step on, until the training has come 50 further; nothing of it is missing then."""
    config = tiny(
        f"runs={RUNS}", "train.steps=400", "train.workers=2", "checkpoint.every=0", "evaluation.every=0",
        "data.order=lanes",
    )  # fmt: skip
    place, seen = config.place, {}

    def steps() -> int:
        """As the first worker's own folder has it."""
        (folder,) = private_folder("runs").glob("tiny-*")
        return (progress.read(folder) or {"step": 0})["step"]

    def interrupt() -> None:
        wait_for(lambda: (progress.read(place) or {"step": 0})["step"] > 5, 120, "the first steps")
        s3.fails(1, ("error",))
        seen["before"] = steps()
        wait_for(lambda: steps() > seen["before"] + 50, 60, "further steps")
        seen["failed"] = sum(s3.failed.values())
        s3.fails(0)

    shutil.rmtree(private_folder("runs"))
    watcher = threading.Thread(target=interrupt, daemon=True)
    watcher.start()
    run = train(config, report=print).run
    watcher.join()
    assert seen["failed"] > 0
    assert seen["before"] + 50 < 400
    assert [row["step"] for row in run.metrics("train")] == list(range(1, 401))
    assert status(place).state == "finished"
