"""Settings that are kept with a model: what their names stand for when it is sampled, and what is refused."""

import json

import pytest
import torch

import md4
from md4 import samplers
from md4.errors import UserError
from md4.samplers import Job, SamplingConfig
from md4.samplers.saved import Saved, SavedSettings, check_name
from md4.weights import export
from tests.md4.oracle import Toy
from tests.md4.test_weights import SYMBOLS, TEXT, model_of

TIMES = (1.0, 0.7, 0.2, 0.0)
SEARCHED = SavedSettings(name="searched", steps=3, settings=SamplingConfig(grid=TIMES), facts={"bound": 1.5})
OTHER = SavedSettings(name="searched-fine", steps=2, settings=SamplingConfig(grid=(1.0, 0.4, 0.0)))
BEST = SavedSettings(
    name="best", steps=3, settings=SamplingConfig(sampler="remdm", grid=TIMES, eta=0.1, temperature=0.9)
)


@pytest.fixture
def model():
    model = Toy(vocabulary=3, length=6).model("linear", timed=True)
    model.saved = Saved.of([OTHER, SEARCHED, BEST])
    return model


def sample(model, **settings):
    canvas = torch.full((8, 6), model.mask_id)
    (found,) = samplers.run(model, [Job(canvas, torch.arange(8), SamplingConfig(**settings))])
    return found


@pytest.mark.parametrize(
    ("named", "plain"),
    [
        ({"grid": "searched", "steps": 3}, {"grid": TIMES}),
        ({"grid": "searched-fine", "steps": 2}, {"grid": (1.0, 0.4, 0.0)}),
        (
            {"sampler": "remdm", "grid": "searched", "steps": 3, "eta": 0.3},
            {"sampler": "remdm", "grid": TIMES, "eta": 0.3},
        ),
        ({"sampler": "best", "steps": 3}, {"sampler": "remdm", "grid": TIMES, "eta": 0.1, "temperature": 0.9}),
        (
            {"sampler": "best", "steps": 3, "temperature": 0.5, "top_k": 2},
            {"sampler": "remdm", "grid": TIMES, "eta": 0.1, "temperature": 0.5, "top_k": 2},
        ),
        # A default that is asked for is not the same as nothing.
        (
            {"sampler": "best", "steps": 3, "temperature": 1.0},
            {"sampler": "remdm", "grid": TIMES, "eta": 0.1, "temperature": 1.0},
        ),
    ],
)
def test_a_name_is_what_it_stands_for(model, named, plain):
    """The same tokens, and the result says the settings themselves: it can be had again without the model's folder."""
    found, expected = sample(model, **named), sample(model, **plain)
    assert torch.equal(found.tokens, expected.tokens)
    assert found.settings == expected.settings
    assert found.settings.grid == plain["grid"]


def test_changes_are_set_and_defaults_of_before_are_not():
    """Of a stored configuration, which states everything, only what differs from a default."""
    stored = SamplingConfig.model_validate(SamplingConfig(top_k=7).model_dump())
    changed = stored.changed({"sampler": "best", "steps": 3, "temperature": 1.0})
    assert changed.model_fields_set == {"top_k", "sampler", "steps", "temperature"}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"grid": "searched", "steps": 4}, "grid=searched with steps=4 .* best for steps=3; searched for steps=3"),
        ({"grid": "searched"}, "grid=searched with steps=256 is not kept"),
        ({"grid": "searched-odd", "steps": 3}, "grid=searched-odd with steps=3 .* searched-fine for steps=2"),
        ({"sampler": "best", "steps": 8}, "steps=8 is not kept with this model; there is best for steps=3"),
        ({"sampler": "best"}, "sampler=best needs steps, the network calls of a sample; there is best for steps=3"),
    ],
)
def test_what_is_not_kept_is_refused_with_what_there_is(model, settings, message):
    with pytest.raises(UserError, match=message):
        sample(model, **settings)


def test_a_model_without_any_says_how_to_find_them(model):
    model.saved = None
    with pytest.raises(UserError, match="there is none: `md4 grid` finds it"):
        sample(model, grid="searched", steps=3)
    with pytest.raises(UserError, match="there is none: `md4 grid --frontier --save` finds it"):
        sample(model, sampler="best", steps=3)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"sampler": "best", "steps": 3, "grid": "cosine"}, "grid=cosine is no setting of the sampler best"),
        ({"grid": "searchd"}, "allowed are 'uniform', 'cosine', or times"),
        ({"grid": "searched-"}, "allowed are 'uniform', 'cosine', or times"),
    ],
)
def test_mistaken_names_are_refused_without_a_model(settings, message):
    with pytest.raises(ValueError, match=message):
        SamplingConfig(**settings)


def test_names_of_grids():
    assert check_name("searched-fine-2") == "searched-fine-2"
    with pytest.raises(UserError, match="the name of a grid is 'Best'"):
        check_name("Best")


def test_an_exported_model_has_them_and_notices_damage(tmp_path):
    folder = export(tmp_path / "model", model_of(TEXT), TEXT, symbols=SYMBOLS, saved=[SEARCHED, BEST])
    loaded = md4.load(folder)
    assert torch.equal(loaded.sample(4, grid="searched", steps=3), loaded.sample(4, grid=TIMES))
    assert torch.equal(
        loaded.sample(4, sampler="best", steps=3),
        loaded.sample(4, sampler="remdm", grid=TIMES, eta=0.1, temperature=0.9),
    )
    assert loaded.card.grids.keys() == {BEST.file, SEARCHED.file}
    file = folder / "grids" / "searched-3.json"
    whole = file.read_bytes()
    file.write_bytes(whole.replace(b"0.7", b"0.6"))
    with pytest.raises(UserError, match=r"searched-3.json is missing or damaged \(its sha256"):
        md4.load(folder)
    file.unlink()
    with pytest.raises(UserError, match=r"searched-3.json is missing or damaged"):
        md4.load(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"steps": 4}, "a grid of 4 steps has 5 times"),
        ({"name": "mine"}, "name: String should match"),
        ({"name": "best"}, "the best settings name a sampler"),
        ({"settings": {"grid": [1, 0.5, 0.6, 0]}}, "fall strictly from 1 to 0"),
        ({"more": 1}, "more: Extra inputs"),
    ],
)
def test_damaged_files_are_named(change, message):
    content = json.dumps({**json.loads(SEARCHED.content()), **change}).encode()
    with pytest.raises(UserError, match=message) as caught:
        SavedSettings.read(f"grids/{SEARCHED.file}", content)
    assert f"grids/{SEARCHED.file}" in str(caught.value)


def test_a_file_under_another_name_is_refused():
    assert SavedSettings.read(f"grids/{SEARCHED.file}", SEARCHED.content()) == SEARCHED
    with pytest.raises(UserError, match=r"searched-5.json holds what belongs into searched-3.json"):
        SavedSettings.read("grids/searched-5.json", SEARCHED.content())
    with pytest.raises(UserError, match=r"searched-5.json is not JSON"):
        SavedSettings.read("grids/searched-5.json", b"{")
