"""Exported models: what comes back is what was written, it samples in three lines, and damage is named."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import md4
from md4.errors import UserError
from md4.model import ModelConfig, build
from md4.networks.transformer import TransformerConfig
from md4.objectives import MaskedDiffusion
from md4.samplers import Job, SamplingConfig, run
from md4.weights import Pretrained, export

NETWORK = TransformerConfig(feature_dim=16, heads=2, layers=1)
TEXT = ModelConfig(vocab_size=5, length=12, schedule="cosine", network=NETWORK)
SYMBOLS = "abcd "


def model_of(config: ModelConfig) -> MaskedDiffusion:
    model = build(config, seed=3)
    draw = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            p += 0.3 * torch.randn(p.shape, generator=draw)
    return model


@pytest.fixture
def folder(tmp_path) -> Path:
    """An exported text model."""
    settings = SamplingConfig(steps=16)
    return export(tmp_path / "a" / "model", model_of(TEXT), TEXT, sampling=settings, vocabulary="x", symbols=SYMBOLS)


def test_what_comes_back_is_what_was_written(folder):
    loaded = md4.load(folder)
    model = model_of(TEXT).eval()
    assert loaded.config == TEXT
    assert loaded.card.sampling.steps == 16
    assert not loaded.model.training
    stored = loaded.model.state_dict()
    assert all(torch.equal(stored[name], tensor) for name, tensor in model.state_dict().items())
    z, t = torch.tensor([[0, 5, 5, 1] * 3]), torch.tensor([0.5])
    assert torch.equal(loaded.logits(z, t), model.logits(z, t))
    assert sorted(path.name for path in folder.parent.iterdir()) == ["model"]  # nothing is left aside
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", "model.safetensors"]


@pytest.mark.parametrize(
    "config",
    [
        TEXT.model_copy(update={"objective": "genmd4", "power_init": 2.0}),
        TEXT.model_copy(update={"classes": 3}),
        ModelConfig.model_validate(
            {"vocab_size": 4, "shape": [4, 4, 1], "network": {"kind": "unet", "feature_dim": 32, "layers": 1}}
        ),
    ],
)
def test_every_kind_of_model_comes_back(tmp_path, config):
    model = model_of(config)
    loaded = md4.load(export(tmp_path / "m", model, config))
    assert loaded.config == config
    stored = loaded.model.state_dict()
    assert stored.keys() == model.state_dict().keys()
    assert all(torch.equal(stored[name], tensor) for name, tensor in model.state_dict().items())


def test_a_loaded_model_can_be_trained_on(folder):
    model = md4.load(folder).model.train()
    drawn = model.noise(0, 0, torch.arange(4), 4, 1, 12)
    model(torch.zeros(4, 12, dtype=torch.int64), **drawn).optimised.mean().backward()
    assert all(p.grad is not None for p in model.parameters())


def test_three_lines_sample_and_the_first_imports_no_torch(folder):
    check = "; import sys; assert 'torch' not in sys.modules"
    program = (
        f"import md4{check}\nmodel = md4.load({str(folder)!r})\nprint(*model.text(model.sample(3, seed=1)), sep='|')"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    texts = done.stdout.rstrip("\n").split("|")
    assert [len(text) for text in texts] == [12, 12, 12]
    assert set("".join(texts)) <= set(SYMBOLS)


def test_samples_are_the_samplers_own(folder):
    loaded = md4.load(folder)
    canvas = torch.tensor([5, 5, 1, 5, 2, 5])
    job = Job(canvas.expand(2, -1), torch.tensor([7, 8]), SamplingConfig(steps=9))
    expected = run(loaded.model, [job])[0].tokens  # type: ignore[arg-type]
    assert torch.equal(loaded.sample(2, seed=7, canvas=canvas, steps=9), expected)
    assert torch.equal(loaded.sample(1, seed=8, canvas=canvas, steps=9), expected[1:])
    assert loaded.sample(2, length=5).shape == (2, 5)
    assert loaded.text(torch.tensor([[0, 4, 5]])) == ["a _"]


def test_images_come_as_images_of_their_class(tmp_path):
    config = ModelConfig.model_validate(
        {"vocab_size": 4, "shape": [4, 2, 1], "classes": 2, "network": {"kind": "unet", "feature_dim": 32, "layers": 1}}
    )
    loaded = md4.load(export(tmp_path / "m", model_of(config), config))
    assert loaded.sample(2, labels=[0, 1], steps=4).shape == (2, 4, 2, 1)
    with pytest.raises(UserError, match=r"labels from 0 to 1 are needed"):
        loaded.sample(2)
    with pytest.raises(UserError, match=r"length is 3; this model makes 8 tokens"):
        loaded.sample(1, length=3, labels=0)
    with pytest.raises(UserError, match=r"vocabulary None are not characters"):
        loaded.text(torch.zeros(1, 8, dtype=torch.int64))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"count": 0}, "count is 0"),
        ({"seed": -1}, "seed is -1"),
        ({"length": 13}, "rows of 13 tokens are longer than the 12 .* block=N"),
        ({"length": 0}, "length is 0"),
        ({"length": 3, "canvas": torch.tensor([5])}, "not both"),
        ({"labels": 1}, "this model has no classes"),
        ({"steps": 0}, "steps=0"),
        ({"stepz": 3}, "unknown setting 'stepz'; did you mean 'steps'"),
        ({"grid": "sine"}, "'uniform', 'cosine', or times"),
        ({"sampler": "race"}, "sampler=race is not for models of objective md4"),
        ({"guidance": 2}, "this model has no classes"),
        ({"stop": "ab"}, "stop is 'ab'; this model takes one of the symbols 'abcd '"),
        ({"stop": 5}, "the stop token is 5; tokens are 0..4"),
        ({"canvas": torch.tensor([6])}, "tokens 0..4 and the mask id 5"),
        ({"canvas": torch.zeros(2, 2, 2, dtype=torch.int64)}, "int64 .L. or .count, L."),
        ({"canvas": torch.zeros(3)}, "not float32"),
        ({"count": 3, "canvas": torch.zeros(2, 4, dtype=torch.int64)}, "count is 3, but there are 2 canvases"),
    ],
)
def test_what_cannot_be_sampled_is_refused(folder, arguments, message):
    with pytest.raises(UserError, match=message):
        md4.load(folder).sample(**{"count": 1, **arguments})


def test_every_setting_and_every_form_of_a_canvas(folder):
    """Many canvases at once, stop tokens by symbol and by number, texts longer than the model's own."""
    loaded, how = md4.load(folder), {"sampler": "first_hitting", "steps": 4, "extrapolate": True, "top_k": 3}
    canvases = torch.tensor([[5, 1, 5, 5, 0], [2, 5, 5, 5, 5], [0, 1, 2, 3, 4]])
    found = loaded.sample(canvas=canvases, seed=3, **how)
    assert found.shape == (3, 5)
    assert torch.equal(found[canvases != 5], canvases[canvases != 5])
    for row in range(3):
        assert torch.equal(loaded.sample(canvas=canvases[row], seed=3 + row, **how)[0], found[row])
    assert loaded.sample(2, canvas=canvases[:1]).shape == (2, 5)
    ended = loaded.sample(50, stop=" ")
    assert torch.equal(ended, loaded.sample(50, stop=4))
    first = (ended == 4).float().argmax(dim=1)
    assert all((row[int(begin) :] == 4).all() for row, begin in zip(ended, first, strict=True) if 4 in row)
    assert loaded.sample(2, length=30, block=5).shape == (2, 30)


def test_a_learned_schedule_is_sampled_by_its_own_samplers(tmp_path):
    config = TEXT.model_copy(update={"objective": "genmd4"})
    loaded = md4.load(export(tmp_path / "m", model_of(config), config))
    rows = loaded.sample(1, seed=4)
    (job,) = run(loaded.model, [Job(torch.full((1, 12), 5), torch.tensor([4]), SamplingConfig(sampler="thinning"))])
    assert torch.equal(rows, job.tokens)
    assert loaded.sample(2, sampler="ancestral", steps=4).max() < 5
    with pytest.raises(UserError, match="sampler=first_hitting is not for models of objective genmd4"):
        loaded.sample(sampler="first_hitting")


def test_a_taken_folder_is_not_written_to(folder, tmp_path):
    before = (folder / "config.json").read_bytes()
    with pytest.raises(UserError, match="exists already"):
        export(folder, model_of(TEXT), TEXT)
    assert (folder / "config.json").read_bytes() == before
    (tmp_path / "empty").mkdir()
    assert isinstance(md4.load(export(tmp_path / "empty", model_of(TEXT), TEXT)), Pretrained)


def edit(folder: Path, **changes) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def flip(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[-3] ^= 1
    file.write_bytes(data)


def other_network(folder: Path) -> None:
    from hashlib import sha256

    file = folder / "model.safetensors"
    tensors = load_file(str(file))
    tensors["network.head.weight"] = torch.zeros(6, 32)
    save_file(tensors, str(file))
    edit(folder, sha256=sha256(file.read_bytes()).hexdigest())


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: flip(f / "model.safetensors"), "is damaged"),
        (lambda f: (f / "model.safetensors").unlink(), "model.safetensors is missing"),
        (lambda f: (f / "config.json").unlink(), r"no config\.json"),
        (lambda f: (f / "config.json").write_text("{"), "is not JSON"),
        (lambda f: (f / "config.json").write_text('{"model_type": "gpt2"}'), "does not describe an exported model"),
        (lambda f: edit(f, version=2), "version 2; this code reads version 1"),
        (lambda f: edit(f, model={"vocab_size": 1, "length": 3}), r"model\.vocab_size is 1"),
        (other_network, r"1 tensors differ, the first is network\.head\.weight \(stored \(6, 32\), network \(5, 32\)"),
    ],
)
def test_damage_is_named(folder, damage, message):
    damage(folder)
    with pytest.raises(UserError, match=message):
        md4.load(folder)


def test_a_run_is_told_from_an_export(tmp_path):
    (tmp_path / "config.yaml").touch()
    with pytest.raises(UserError, match="is a run: `md4 export"):
        md4.load(tmp_path)


def test_a_wrong_name_is_no_part_of_md4():
    with pytest.raises(AttributeError, match="no attribute 'loda'"):
        md4.loda  # noqa: B018  # type: ignore[attr-defined]
