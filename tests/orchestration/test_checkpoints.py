"""Checkpoints exist completely or not at all, and damage is found, named and passed over."""

import json

import pytest
import torch
from safetensors.torch import load_file

from md4.errors import UserError
from md4.model import build
from orchestration import checkpoints
from orchestration.optimizer import AdamWithEma
from tests.orchestration.zero_program import MODELS

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


@pytest.fixture
def saved(state, tmp_path):
    """Checkpoints of steps 10 and 20."""
    for step in (10, 20):
        checkpoints.save(tmp_path, state, step, {"config": {}, "run": "test"}, keep=2)
    return tmp_path


def test_weights_are_readable_by_safetensors_alone(saved, state):
    folder = checkpoints.committed_in(saved)[0]
    tensors = load_file(folder / "weights-00000-of-00001.safetensors")
    fresh = build(MODEL, seed=3).state_dict()
    assert tensors.keys() == fresh.keys()
    assert all(torch.equal(tensors[name], fresh[name]) for name in fresh)


def test_newest_comes_first_and_old_ones_are_retired(saved, state):
    checkpoints.save(saved, state, 30, {"config": {}}, keep=2)
    assert [checkpoints.read(folder).step for folder in checkpoints.committed_in(saved)] == [30, 20]
    assert len(list(saved.iterdir())) == 2


def test_a_folder_without_manifest_is_not_a_checkpoint_and_is_swept(saved, state):
    torn = saved / "step-00000015-abcdef"
    torn.mkdir()
    (torn / "weights-00000-of-00001.safetensors").write_bytes(b"half")
    assert len(checkpoints.committed_in(saved)) == 2
    checkpoints.save(saved, state, 30, {"config": {}}, keep=3)
    assert not torn.exists()


@pytest.mark.parametrize("kind", ["weights", "ema", "exp_avg", "exp_avg_sq"])
def test_one_flipped_bit_is_found_named_and_passed_over(saved, kind):
    damaged = checkpoints.committed_in(saved)[0] / f"{kind}-00000-of-00001.safetensors"
    data = bytearray(damaged.read_bytes())
    data[-5] ^= 1
    damaged.write_bytes(data)
    told: list[str] = []
    found = checkpoints.newest(saved, told.append)
    assert found is not None
    assert found.step == 10
    assert len(told) == 1
    assert damaged.name in told[0]
    assert damaged.parent.name in told[0]


@pytest.mark.parametrize(
    ("spoil", "expected"),
    [
        (
            lambda folder: (folder / "ema-00000-of-00001.safetensors").unlink(),
            "ema-00000-of-00001.safetensors is missing",
        ),
        (lambda folder: (folder / "manifest.json").write_text('{"format": 1'), "manifest is damaged"),
        (lambda folder: (folder / "manifest.json").write_text('{"format": 1}'), "its manifest lacks"),
        (lambda folder: (folder / "manifest.json").write_text('{"format": 99}'), "has format 99"),
        (lambda folder: (folder / "ema-00000-of-00001.safetensors").write_bytes(b"short"), "has 5 bytes"),
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


def test_an_unwritable_folder_fails_and_leaves_what_was_there(saved, state):
    before = {path: path.read_bytes() for path in saved.rglob("*") if path.is_file()}
    (saved / "file").write_text("in the way")
    with pytest.raises(RuntimeError, match="checkpoint of step 30 not written"):
        checkpoints.save(saved / "file" / "below", state, 30, {"config": {}}, keep=1)
    assert all(path.read_bytes() == data for path, data in before.items())


def test_manifest_states_what_a_reader_needs(saved):
    manifest = json.loads((checkpoints.committed_in(saved)[0] / "manifest.json").read_text())
    assert manifest["format"] == 1
    assert manifest["step"] == 20
    assert manifest["run"] == "test"
    assert {"code_version", "created", "groups", "kinds", "writers"} <= manifest.keys()
    assert manifest["groups"][0]["ema"] == 0.9
    assert set(manifest["tensors"]) == set(build(MODEL).state_dict())


def test_files_are_dealt_out_evenly_and_completely():
    shapes = {f"p{i}": torch.Size([i + 1]) for i in range(20)}
    writer_of = checkpoints._deal(shapes, 3)
    load = [sum(shapes[name].numel() for name in shapes if writer_of[name] == w) for w in range(3)]
    assert writer_of.keys() == shapes.keys()
    assert max(load) - min(load) <= 2
