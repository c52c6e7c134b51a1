"""Checkpoints exist completely or not at all, and damage is found, named and passed over."""

import json

import pytest
import torch
from safetensors.torch import load

from md4.errors import UserError
from md4.model import build
from orchestration import checkpoint_writer, checkpoints
from orchestration.checkpoint_writer import News, Retention, Writer
from orchestration.optimizer import AdamWithEma
from pipelines.storage import Folder
from tests.orchestration.zero_program import MODELS
from tests.s3 import BUCKET

MODEL = MODELS["md4"]
pytestmark = pytest.mark.usefixtures("process_group")


def make_state(stage: int = 2, model=MODEL):
    from orchestration.zero import EngineState, initialize

    network = build(model, seed=3)
    optimizer = AdamWithEma(network.parameters(), lr=1e-3, ema=0.9)
    return EngineState(
        initialize(network, optimizer, stage=stage, micro_batch=1, accumulation=1, clip_norm=0), optimizer
    )


@pytest.fixture(scope="module")
def state(process_group):
    return make_state()


def save(place, state, step: int, retention=Retention(last=2), **facts) -> News:  # noqa: B008
    """One checkpoint, waited for; what the leader was told of it."""
    writer = Writer(place, retention)
    writer.save(state, step, {"config": {}, "run": "test", **facts})
    writer.finish()
    (news,) = writer.news()
    return news


@pytest.fixture(params=["local", "s3"])
def place(request, tmp_path):
    """Where checkpoints go."""
    if request.param == "local":
        return Folder(tmp_path / "checkpoints")
    request.getfixturevalue("s3")
    return Folder(f"s3://{BUCKET}/run/checkpoints")


@pytest.fixture
def saved(state, place):
    """Checkpoints of steps 10 and 20."""
    for step in (10, 20):
        assert save(place, state, step).error is None
    return place


def test_weights_are_readable_by_safetensors_alone(saved, state):
    folder = checkpoints.committed_in(saved)[0]
    tensors = load(folder.read("weights-00000-of-00001.safetensors"))
    fresh = build(MODEL, seed=3).state_dict()
    assert tensors.keys() == fresh.keys()
    assert all(torch.equal(tensors[name], fresh[name]) for name in fresh)


def test_newest_comes_first_and_old_ones_are_retired(saved, state):
    save(saved, state, 30)
    assert [checkpoints.read(folder).step for folder in checkpoints.committed_in(saved)] == [30, 20]
    assert {path.split("/")[0][:13] for path in saved.list()} == {"step-00000030", "step-00000020", "latest.json"}
    latest = json.loads(saved.read("latest.json"))
    assert latest["step"] == 30
    assert latest["folder"] == checkpoints.committed_in(saved)[0].name


def test_what_counts_before_a_commit_decides_about_it(place, state):
    """It is done when all files are written and the checkpoint is not there yet; if it fails, there will be none."""
    found = []

    def fail() -> None:
        found.append((len(place.list()), checkpoints.committed_in(place)))
        raise OSError("no metrics")

    writer = Writer(place, Retention(), fail)
    writer.save(state, 10, {"config": {}, "run": "test"})
    writer.finish()
    assert [news.error for news in writer.news()] == ["no metrics"]
    assert found == [(5, [])]  # one file of each kind, and the note
    assert not place.list()


def test_every_nth_and_the_best_stay(place, state):
    bounds = {10: 3.0, 20: 1.0, 30: 2.0, 40: 2.5, 50: 2.6}
    for step, bound in bounds.items():
        evaluation = None if step == 30 else {"bits_per_token": bound}
        save(place, state, step, Retention(last=1, every=30, best=1), evaluation=evaluation)
    assert [checkpoints.read(folder).step for folder in checkpoints.committed_in(place)] == [50, 30, 20]


def test_a_worker_that_comes_late_does_not_turn_the_pointer_back(saved, state):
    save(saved, state, 15, Retention(last=9))
    assert json.loads(saved.read("latest.json"))["step"] == 20
    saved.write("latest.json", b"{torn")
    save(saved, state, 30, Retention(last=9))
    assert json.loads(saved.read("latest.json"))["step"] == 30


def test_a_folder_without_manifest_is_not_a_checkpoint_and_is_swept(saved, state):
    saved.write("step-00000015-abcdef/weights-00000-of-00001.safetensors", b"half")
    saved.write("step-00000035-abcdef/writer-00000.json", b"{}")  # of somebody who is further: not ours to judge
    assert len(checkpoints.committed_in(saved)) == 2
    save(saved, state, 30, Retention(last=3))
    left = {path.split("/")[0] for path in saved.list()}
    assert "step-00000015-abcdef" not in left
    assert "step-00000035-abcdef" in left


@pytest.mark.parametrize("kind", ["weights", "ema", "exp_avg", "exp_avg_sq"])
def test_one_flipped_bit_is_found_named_and_passed_over(saved, kind):
    damaged, file = checkpoints.committed_in(saved)[0], f"{kind}-00000-of-00001.safetensors"
    data = bytearray(damaged.read(file))
    data[-5] ^= 1
    damaged.write(file, bytes(data))
    for find in (checkpoints.newest, checkpoints.newest_together):
        told: list[str] = []
        found = find(saved, told.append)
        assert found is not None
        assert found.step == 10
        assert len(told) == 1
        assert file in told[0]
        assert damaged.name in told[0]


def test_what_was_loaded_is_compared_with_what_was_written(saved, state, monkeypatch):
    """A reader that gives away another tensor's numbers, which no hash of a file can notice."""
    checkpoint = checkpoints.newest(saved, print)
    assert checkpoint is not None
    checkpoints.restore(checkpoint, state)
    honest, last = checkpoints.Checkpoint.read, list(state.shapes)[-1]
    for wrong in ("weights", "ema", "exp_avg_sq"):

        def read(self, kind, wanted, wrong=wrong):
            for part, values in honest(self, kind, wanted):
                yield part, values + 1e-7 if kind == wrong and part[0] == last else values

        monkeypatch.setattr(checkpoints.Checkpoint, "read", read)
        with pytest.raises(RuntimeError, match=rf"1 tensors of the state are not .* the first is {wrong} of {last}"):
            checkpoints.restore(checkpoint, state)
    monkeypatch.undo()
    checkpoints.restore(checkpoint, state)
    monkeypatch.setattr(type(state), "_publish", lambda self: None)
    with torch.no_grad():
        state.parameters[last].add_(1)  # what ZeRO goes on with when nobody tells it that its fragments changed
    with pytest.raises(RuntimeError, match="tensors of the network are not what was written"):
        checkpoints.restore(checkpoint, state)


@pytest.mark.parametrize(
    ("spoil", "expected"),
    [
        (
            lambda folder: folder.remove("ema-00000-of-00001.safetensors"),
            "ema-00000-of-00001.safetensors is missing",
        ),
        (lambda folder: folder.write("manifest.json", b'{"format": 1'), "manifest is damaged"),
        (lambda folder: folder.write("manifest.json", b'{"format": 2}'), "its manifest lacks"),
        (lambda folder: folder.write("manifest.json", b'{"format": 99}'), "has format 99"),
        (lambda folder: folder.write("ema-00000-of-00001.safetensors", b"short"), "has 5 bytes"),
    ],
)
def test_other_damage_is_named(saved, spoil, expected):
    spoil(checkpoints.committed_in(saved)[0])
    told: list[str] = []
    found = checkpoints.newest(saved, told.append)
    assert found is not None
    assert found.step == 10
    assert expected in told[0]


def test_no_sound_checkpoint_is_none(tmp_path):
    assert checkpoints.newest(tmp_path / "absent", print) is None


def test_a_checkpoint_of_another_network_is_refused_by_name(saved):
    other = make_state(model=MODEL.model_copy(update={"vocab_size": 30}))
    checkpoint = checkpoints.newest(saved, print)
    assert checkpoint is not None
    with pytest.raises(UserError, match=r"of another network: \d+ tensors differ, the first is network\."):
        checkpoints.restore(checkpoint, other)


def test_an_unwritable_folder_fails_and_leaves_what_was_there(state, tmp_path):
    save(tmp_path, state, 20)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    (tmp_path / "file").write_text("in the way")
    news = save(tmp_path / "file" / "below", state, 30)
    assert news.step == 30
    assert news.error is not None
    assert "Not a directory" in news.error
    assert all(path.read_bytes() == data for path, data in before.items())


def test_storage_that_fails_often_only_takes_longer(s3, state):
    place = Folder(f"s3://{BUCKET}/run/checkpoints")
    s3.fails(0.4, seed=1)
    assert save(place, state, 10).error is None
    assert s3.failed.total() > 3
    found = checkpoints.newest(place, print)
    assert found is not None
    assert found.step == 10


def test_manifest_states_what_a_reader_needs(saved):
    manifest = json.loads(checkpoints.committed_in(saved)[0].read("manifest.json"))
    assert manifest["format"] == 2
    assert manifest["step"] == 20
    assert manifest["run"] == "test"
    assert {"code_version", "created", "groups", "kinds", "writers"} <= manifest.keys()
    assert manifest["groups"][0]["ema"] == 0.9
    assert set(manifest["tensors"]) == set(build(MODEL).state_dict())


def test_files_are_dealt_out_evenly_and_completely():
    shapes = {f"p{i}": torch.Size([i + 1]) for i in range(20)}
    writer_of = checkpoint_writer._deal(shapes, 3)
    load = [sum(shapes[name].numel() for name in shapes if writer_of[name] == w) for w in range(3)]
    assert writer_of.keys() == shapes.keys()
    assert max(load) - min(load) <= 2
