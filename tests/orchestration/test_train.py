"""Training under a real Ray Train and DeepSpeed: the same curve on any number of workers, and after a kill."""

import json
import os
import re
import shutil
import signal
import threading
import time

import pytest
import torch

from md4.errors import UserError
from orchestration import checkpoints
from orchestration.audit import audit, compare
from orchestration.config import Config, load
from orchestration.events import Events
from orchestration.runs import Run, load_model
from orchestration.status import status
from orchestration.train import check, train
from pipelines.config import prepared_path
from pipelines.manifest import Manifest
from pipelines.row_cache import private_folder
from tests.orchestration.conftest import tiny_settings, write_corpus
from tests.s3 import BUCKET

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_cluster")]
STEPS = 50
LONG = [f"train.steps={STEPS}", "checkpoint.every=10", "evaluation.every=25", "train.workers=2", "train.zero_stage=2"]


def losses(run: Run) -> list[float]:
    rows = run.metrics("train")
    assert [row["step"] for row in rows] == list(range(1, STEPS + 1))
    return [row["bits_per_token"] for row in rows]


def final_state(run: Run) -> dict[str, torch.Tensor]:
    checkpoint = checkpoints.newest(run.checkpoints, print)
    assert checkpoint is not None
    assert checkpoint.step == STEPS
    return {f"{kind}/{name}": t for kind in checkpoint.kinds for name, t in checkpoint.tensors(kind).items()}


@pytest.fixture(scope="module")
def undisturbed(corpus, data_directory, tmp_path_factory, ray_cluster):
    """A run of 2 workers and ZeRO-2 that nothing happened to: (run, what it printed)."""
    said: list[str] = []
    overrides = [*tiny_settings(corpus, data_directory, tmp_path_factory.mktemp("runs")), *LONG]
    return train(load("pydocs-tiny", overrides), report=said.append).run, said


def test_a_run_learns_and_leaves_everything_in_its_folder(undisturbed):
    run, said = undisturbed
    curve = losses(run)
    assert sum(curve[-5:]) / 5 < sum(curve[:5]) / 5 - 0.5
    assert [row["step"] for row in run.metrics("evaluation")] == [0, 25, 50]
    before, _, after = (row["bits_per_token"] for row in run.metrics("evaluation"))
    assert before == pytest.approx(4.755, abs=0.001)  # log2(27): the head starts at zero
    assert after < before - 0.5
    assert [row["step"] for row in run.metrics("checkpoint")] == [10, 20, 30, 40, 50]
    assert any("tokens/s" in line and "left" in line for line in said)
    assert (run.path / "config.yaml").is_file()


def ledgers(run: Run) -> list[str]:
    return [row["ledger"] for row in run.metrics("train")]


def assert_same_run(run: Run, expected: Run) -> None:
    """The same loss curve to 1e-5 and, step by step, the same rows."""
    assert ledgers(run) == ledgers(expected)
    for one, two in zip(losses(run), losses(expected), strict=True):
        assert abs(one - two) <= 1e-5 * two


@pytest.mark.slow
@pytest.mark.parametrize(
    "layout",
    [
        ["train.workers=1", "train.zero_stage=0", "train.micro_batch=8"],
        ["train.workers=3", "train.micro_batch=4"],  # shares of 4, 4 and 8 rows, in 2 passes each
        ["train.workers=3", "train.zero_stage=0"],
        ["train.workers=3", "train.zero_stage=3", "train.micro_batch=2"],
        ["train.workers=4", "train.zero_stage=1"],
    ],
    ids=["1", "3", "3-stage-0", "3-stage-3", "4"],
)
def test_other_numbers_of_workers_give_the_same_curve_and_ledger(undisturbed, tiny, layout):
    assert_same_run(train(tiny(*LONG, *layout), report=print).run, undisturbed[0])


def test_the_ledger_is_that_of_the_configuration_and_the_data(undisturbed):
    run = undisturbed[0]
    assert re.search(r"agrees with configuration and data in all of its 50 steps \([0-9a-f]{32}\)$", audit(run.path))
    checkpoint = checkpoints.newest(run.checkpoints, print)
    assert checkpoint is not None
    assert checkpoint.manifest["ledger"] == {"step": STEPS, "head": ledgers(run)[-1], "digests": ""}
    rows = prepared_rows(run)
    read = [row["bytes_read"] for row in run.metrics("train")]
    assert read == sorted(read)
    # The full order decodes all rows, once, if this machine does not have them yet.
    assert 0 <= run.metrics("train")[-1]["reads_per_row"] <= max(1.0, rows / (STEPS * 16))
    assert [row["epochs"] for row in run.metrics("train")] == [step * 16 / rows for step in range(1, STEPS + 1)]


def prepared_rows(run: Run) -> int:
    return Manifest.load(prepared_path(run.config.data)).splits["train"].rows


def train_and_kill(config: Config, step: int, resume: bool = False) -> None:
    """Run until metrics have come to `step`, then kill -9 the first worker; the run must end with advice to resume."""
    done, killed = threading.Event(), threading.Event()
    former = {row["pid"] for row in Run(config.directory).metrics("start")} if resume else set()

    def kill_rank_0_after_step(step: int) -> None:
        while not done.is_set() and not killed.is_set():
            time.sleep(0.005)
            rows = Run(config.directory).metrics() if (config.directory / "metrics.jsonl").exists() else []
            pids = {row["pid"] for row in rows if row["kind"] == "start"} - former
            if pids and rows[-1]["step"] >= step:
                os.kill(pids.pop(), signal.SIGKILL)
                killed.set()

    thread = threading.Thread(target=kill_rank_0_after_step, args=(step,), daemon=True)
    thread.start()
    try:
        with pytest.raises(UserError, match="--resume"):
            train(config, resume=resume, report=print)
    finally:
        done.set()
        thread.join()
    assert killed.is_set()


def test_a_killed_run_resumes_to_the_same_bits(undisturbed, tiny):
    config = tiny(*LONG)
    train_and_kill(config, 22)
    said: list[str] = []
    with pytest.raises(UserError, match="exists already"):
        train(config, report=said.append)
    run = train(config, resume=True, report=said.append).run
    assert any("from step" in line for line in said)
    assert any("the ledger agrees with the order after" in line for line in said)
    assert ledgers(run) == ledgers(undisturbed[0])
    assert losses(run) == losses(undisturbed[0])
    resumed, expected = final_state(run), final_state(undisturbed[0])
    assert resumed.keys() == expected.keys()
    assert all(torch.equal(resumed[name], expected[name]) for name in expected)


@pytest.mark.timeout(600)
def test_a_killed_run_in_s3_resumes_on_a_machine_that_has_nothing_of_it(undisturbed, tiny, s3):
    """A tenth of the requests fail. The first worker dies when a checkpoint is written and not yet committed; what its
    machine has of the run is deleted."""
    config = tiny(*LONG, f"runs=s3://{BUCKET}/runs", "tracking.tensorboard=true")
    s3.fails(0.1, seed=4)
    uncommitted = s3.hold(r"PUT .*/step-00000030-\w+/manifest\.json")

    def kill_rank_0() -> None:
        uncommitted.came.wait()
        os.kill(Run(config.place).metrics("start")[-1]["pid"], signal.SIGKILL)
        uncommitted.release(passes=False)

    thread = threading.Thread(target=kill_rank_0, daemon=True)
    thread.start()
    with pytest.raises(UserError, match=f"continue from the last checkpoint of {config.place} with --resume"):
        train(config, report=print)
    thread.join()
    assert {row["step"] for row in Run(config.place).metrics("train")} >= set(range(1, 31))  # of before the commit
    shutil.rmtree(private_folder("runs"))
    said: list[str] = []
    run = train(config, resume=True, report=said.append).run
    assert f"continuing s3://{BUCKET}/runs/tiny from step 20" in said
    assert any(line.startswith("step 50/50") and "tokens/s" in line for line in said)
    assert ledgers(run) == ledgers(undisturbed[0])
    assert losses(run) == losses(undisturbed[0])
    resumed, expected = final_state(run), final_state(undisturbed[0])
    assert all(torch.equal(resumed[name], expected[name]) for name in expected)
    found = status(run.place)
    assert (found.state, found.step) == ("finished", STEPS)
    assert [one["workers"] for one in Events(run.place).read("workers")] == [2, 2]
    there = {path.partition("/")[0] for path in run.place.list()}
    assert there == {"checkpoints", "config.yaml", "events.jsonl", "metrics.jsonl", "progress.json", "tensorboard"}
    # The second machine's file, and the first one's if it was sent before the kill: that is done now and then.
    assert len([path for path in run.place.list() if path.startswith("tensorboard/")]) in (1, 2)
    assert sum(s3.failed.values()) > 10


def test_a_run_that_moves_between_workers_and_stages_keeps_its_curve_and_ledger(undisturbed, tiny):
    """Killed three times and each time resumed on another number of workers and in another stage of ZeRO."""
    layouts = [(1, 0), (3, 1), (2, 2), (1, 3)]
    for number, (workers, stage) in enumerate(layouts):
        config = tiny(*LONG, f"train.workers={workers}", f"train.zero_stage={stage}", "train.micro_batch=4")
        if number < len(layouts) - 1:
            train_and_kill(config, 10 * number + 12, resume=number > 0)
    run = train(config, resume=True, report=print).run
    assert [row["workers"] for row in run.metrics("start")] == [workers for workers, _ in layouts]
    assert_same_run(run, undisturbed[0])


@pytest.mark.slow
@pytest.mark.parametrize(("first", "then"), [(3, 2), (4, 3), (1, 4)])
def test_a_killed_run_resumes_on_other_workers_with_the_same_ledger(undisturbed, tiny, first, then):
    train_and_kill(tiny(*LONG, f"train.workers={first}"), 22)
    run = train(tiny(*LONG, f"train.workers={then}"), resume=True, report=print).run
    assert_same_run(run, undisturbed[0])
    assert "the same rows in the 50 steps that both have" in compare(run.path, undisturbed[0].path)


MIXED = ["train.steps=12", "checkpoint.every=6", "evaluation.every=0", "data.order=lanes", "train.log_every=4"]


@pytest.fixture(scope="module")
def mixed(corpus, data_directory, tmp_path_factory, ray_cluster):
    """A run over two corpora, 3 to 1, on three workers: (run, the settings that it was made from)."""
    other = write_corpus(tmp_path_factory.mktemp("corpus") / "other.txt", words=4000, seed=2)
    mixture = f"data.mixture=[{{path: {corpus}, weight: 3}}, {{path: {other}, weight: 1, name: other}}]"
    settings = [*tiny_settings(corpus, data_directory, tmp_path_factory.mktemp("runs")), *MIXED, mixture]
    return train(load("pydocs-tiny", [*settings, "train.workers=3"]), report=print).run, settings


def test_a_mixture_trains_and_counts_the_epochs_of_each_set(mixed):
    run, _ = mixed
    sizes = [Manifest.load(prepared_path(one)).splits["train"].rows for _, one in run.config.data.sets()]
    last = run.metrics("train")[-1]
    assert last["epochs_0"] * sizes[0] == pytest.approx(12 * 12)  # 12 steps of 16 rows, 12 and 4 of them from each
    assert last["epochs_other"] * sizes[1] == pytest.approx(12 * 4)
    assert "all of its 12 steps" in audit(run.path)


def test_what_was_consumed_is_told_from_what_should_have_been(mixed, tmp_path):
    """A copy of a run whose metrics say that step 7 had other rows, and one with another seed."""
    run, _ = mixed
    rows = [json.loads(line) for line in run.metrics_file.read_text().splitlines()]
    second = [row for row in rows if row["kind"] == "train"][1]
    second["ledger_steps"] = second["ledger_steps"][:16] + "00000000" + second["ledger_steps"][24:]
    copy = tmp_path / "copy"
    copy.mkdir()
    (copy / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (copy / "config.yaml").write_text((run.path / "config.yaml").read_text())
    with pytest.raises(UserError, match=r"copy: the rows of step 7 \(global batch 6\) are not those of its conf"):
        audit(copy)
    with pytest.raises(UserError, match=r"first differ in the rows of step 7 \(global batch 6\)"):
        compare(run.path, copy)
    (copy / "metrics.jsonl").write_text(run.metrics_file.read_text())
    (copy / "config.yaml").write_text(run.config.model_copy(update={"seed": 1}).to_yaml())
    with pytest.raises(UserError, match=r"the rows of step 1 \(global batch 0\)"):
        audit(copy)


def test_a_checkpoint_that_the_order_does_not_explain_is_refused_before_workers_start(mixed):
    """Another seed, another weight or a ledger of other rows, behind the back of the configuration that is compared."""
    run, settings = mixed
    text, newest = (run.path / "config.yaml").read_text(), checkpoints.newest(run.checkpoints, print)
    assert newest is not None
    for changes, message in [
        (["seed=5"], r"another order of the data: seed was 42, is now 5\."),
        (["data.order=full"], r"sets\.0\.order was 'lanes', is now 'full'\."),
        (["train.slices=8"], r"slices was 4, is now 8\."),
    ]:
        config = load("pydocs-tiny", [*settings, *changes])
        (run.path / "config.yaml").write_text(config.to_yaml())
        with pytest.raises(UserError, match=message):
            check(config, True, print)
    (run.path / "config.yaml").write_text(text)
    sound = newest.path.read(checkpoints.MANIFEST)
    newest.path.write(checkpoints.MANIFEST, sound.replace(newest.manifest["ledger"]["head"].encode(), b"0" * 32))
    with pytest.raises(UserError, match=r"consumed other rows than the order says: its ledger is 0{32} at step 12"):
        check(load("pydocs-tiny", settings), True, print)
    newest.path.write(checkpoints.MANIFEST, sound)
    check(load("pydocs-tiny", settings), True, print)


def test_a_trained_model_loads_with_averaged_or_last_weights(undisturbed):
    averaged, last = (load_model(undisturbed[0].path, ema=ema) for ema in (True, False))
    assert averaged.step == last.step == STEPS
    assert averaged.weights_hash != last.weights_hash
    z, t = torch.full((1, 32), 27), torch.tensor([0.9])
    assert not torch.equal(averaged.model.logits(z, t), last.model.logits(z, t))
