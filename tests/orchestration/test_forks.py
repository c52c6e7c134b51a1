"""Runs that begin from another run's checkpoint."""

import pytest
import torch

from md4.errors import UserError
from orchestration import checkpoints, forks
from orchestration.audit import audit
from orchestration.config import override
from orchestration.runs import Run
from orchestration.train import check, train
from tests.orchestration.small_run import write_run


@pytest.fixture
def donor(tmp_path) -> Run:
    """A run with one checkpoint, at step 7."""
    return Run(write_run(tmp_path / "runs"))


def forked(donor: Run, **changes):
    tree = {"name": "fork", "train": {"steps": 20, "start_from": str(donor.path)}}
    for key, value in changes.items():
        part, name = key.split("__")
        tree.setdefault(part, {})[name] = value
    return override(donor.config, tree)


def test_the_checkpoint_is_found_once(donor):
    config = forks.pinned(forked(donor, optimizer__learning_rate=0.5, model__schedule="cosine"), False, print)
    newest = checkpoints.committed_in(donor.checkpoints)[0]
    assert config.train.start_from == newest.absolute().url
    assert forks.first_step(config) == 7
    assert config.optimizer.learning_rate == 0.5
    by_folder = forks.pinned(override(config, {"train": {"start_from": newest.url}}), False, print)
    assert by_folder == config
    Run.create(config)
    assert forks.pinned(override(config, {"train": {"start_from": None}}), True, print) == config
    assert forks.pinned(forked(donor), True, print).train.start_from == config.train.start_from
    with pytest.raises(UserError, match=r"train\.start_from=/elsewhere: run .*fork began from .*step-00000007"):
        forks.pinned(override(config, {"train": {"start_from": "/elsewhere"}}), True, print)
    for given in (newest.absolute().url, str(donor.path), f"{donor.path}/"):
        assert forks.pinned(override(config, {"train": {"start_from": given}}), True, print) == config
    for given in (str(donor.path)[:-2], newest.absolute().url[:-1]):
        with pytest.raises(UserError, match=rf"start_from={given}: run .*fork began from"):
            forks.pinned(override(config, {"train": {"start_from": given}}), True, print)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"train__batch_size": 64}, r"can't go on from there with\ntrain\.batch_size: it has \d+, given is 64"),
        ({"model__power_init": 2.0}, r"model\.power_init: it has 1\.0, given is 2\.0"),
        ({"train__steps": 7}, r"is at step 7: with train\.steps=7 there is nothing to train"),
        ({"train__start_from": "/nowhere"}, r"=/nowhere: neither a run's folder nor a checkpoint's lies there"),
    ],
)
def test_what_cannot_go_on_from_there_is_refused_and_leaves_nothing(donor, changes, message):
    config = forked(donor, **changes)
    with pytest.raises(UserError, match=message):
        check(config, False, print)
    assert not config.directory.exists()


def test_a_damaged_checkpoint_is_refused_by_name(donor):
    folder = checkpoints.committed_in(donor.checkpoints)[0]
    (weights,) = (path for path in folder.list() if path.startswith("weights"))
    with open(folder.path(weights), "r+b") as file:
        file.seek(-4, 2)
        file.write(b"\1\2\3\4")
    with pytest.raises(UserError, match=r"weights-.* is damaged"):
        forks.pinned(override(forked(donor), {"train": {"start_from": folder.url}}), False, print)


@pytest.mark.ray
def test_a_fork_with_nothing_changed_repeats_its_origin_to_the_bit(tiny, ray_cluster):
    """Weights, average and moments at the end, losses and ledger of its steps; its origin stands in its checkpoints."""
    settings = ["train.steps=10", "train.workers=1", "checkpoint.every=5", "evaluation.every=5"]
    first = train(tiny(*settings), report=print).run
    middle = checkpoints.committed_in(first.checkpoints)[1]
    assert checkpoints.step_of(middle) == 5
    again = train(tiny(*settings, "name=fork", f"train.start_from={middle.url}"), report=print).run
    states = []
    for run in (first, again):
        newest = checkpoints.newest(run.checkpoints, print)
        assert newest is not None
        assert newest.step == 10
        states.append({f"{kind}/{n}": t for kind in newest.kinds for n, t in newest.tensors(kind).items()})
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    rows = [[(row["step"], row["bits_per_token"]) for row in run.metrics("train")] for run in (first, again)]
    assert rows[1] == rows[0][5:]
    assert [row["step"] for row in again.metrics("evaluation")] == [10]
    assert "in all of its 10 steps" in audit(again.path)
    origin = checkpoints.newest(again.checkpoints, print).manifest["origin"]
    assert (origin["run"], origin["step"], origin["origin"]) == ("tiny", 5, None)
    assert origin["weights_hash"] == checkpoints.read(middle).weights_hash("weights")
