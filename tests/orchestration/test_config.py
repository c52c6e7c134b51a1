"""Configuration: presets resolve, numbers survive YAML, and every mistake is one clear message."""

import pytest
import yaml

from md4.errors import UserError
from md4.model import count_parameters
from orchestration.config import PRESETS, load, preset_names, read_yaml, validate


@pytest.mark.parametrize("name", preset_names())
def test_every_preset_resolves_and_survives_a_round_trip(name):
    config = load(name)
    assert config.name == name
    assert validate(read_yaml(config.to_yaml(), "test")) == config
    assert validate(yaml.safe_load(config.to_yaml())) == config  # plain YAML 1.1 readers too


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("text8", 88_734_272),
        ("text8-genmd4", 88_734_299),
        ("openwebtext-small", 165_857_344),
        ("openwebtext-medium", 416_240_960),
        ("openwebtext-small-genmd4", 165_910_675 - 2 * (768 + 768 + 1)),  # without the two tokens that never occur
        ("fineweb-edu", 165_857_344),
        ("cifar10", 28_427_520),
        ("imagenet64", 204_595_712),
        ("imagenet64-best-likelihood", 198_279_680),
        ("imagenet64-class-conditional", 205_113_856),
    ],
)
def test_presets_of_published_models_have_their_size(name, parameters):
    assert count_parameters(load(name).model) == parameters
    text = (PRESETS / f"{name}.yaml").read_text()
    assert f"{parameters:,} parameters" in text
    assert "# Aim: " in text
    assert f"md4 train {name}\n" in text or f"md4 train {name} " in text


def test_vocabulary_and_length_follow_the_data():
    config = load("pydocs-tiny", ["data.length=128"])
    assert (config.model.vocab_size, config.model.length) == (27, 128)


def test_levels_and_shape_follow_the_data():
    model = load("digits-tiny").model
    assert (model.vocab_size, model.length, model.shape) == (17, 64, (8, 8, 1))
    model = load("digits-tiny", ["data.levels=4"]).model
    assert (model.vocab_size, model.length, model.shape) == (4, 64, (8, 8, 1))
    model = load("digits-tiny", ["data.source=images", "data.path=x", "data.shape=[4,6,3]"]).model
    assert (model.vocab_size, model.length, model.shape) == (256, 72, (4, 6, 3))
    flat = load("pydocs-tiny", ["data.source=digits", "data.vocabulary=pixels"]).model  # pixels one after the other
    assert (flat.vocab_size, flat.length, flat.shape) == (17, 64, None)


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["model.shape=[4,16,1]"], ["model.shape=[4, 16, 1]", "data.shape=[8, 8, 1]"]),
        (["data.length=100"], ["length=100", "64"]),
        (["data.levels=300"], ["data.levels=300", "256"]),
        (["data.source=images", "data.path=x", "data.shape=null"], ["shape must be given"]),
        (["data.vocabulary=text8"], ["vocabulary=text8", "source=digits has images"]),
        (["model.classes=10"], ["model.classes=10", "model.network.feature_dim=32", "take 64 or more"]),
    ],
)
def test_mistakes_about_images(overrides, expected):
    with pytest.raises(UserError) as caught:
        load("digits-tiny", overrides)
    for part in expected:
        assert part in str(caught.value)


def test_sets_of_a_mixture_take_from_the_whole_what_they_do_not_say():
    config = load(
        "pydocs-tiny",
        ["data.validation=0.2", "data.mixture=[{weight: 3, source: text, path: a.txt, test: 0.1}, {name: docs}]"],
    )
    assert validate(config.model_dump(mode="json")) == config
    data = config.data
    assert [(weight, one.source, one.path, one.validation, one.test) for weight, one in data.sets()] == [
        (3, "text", "a.txt", 0.2, 0.1),
        (1, "pydocs", None, 0.2, 0.05),
    ]
    assert (data.source, data.path, data.test) == ("text", "a.txt", 0.1)  # the first set is the one that is evaluated
    assert data.names() == ["0", "docs"]
    assert data.content() == data.sets()[0][1].content()  # so that both name the same prepared set
    images = load("digits-tiny", ["data.mixture=[{}, {source: images, path: x, levels: 17, shape: [8, 8, 1]}]"])
    assert (images.model.vocab_size, images.model.shape) == (17, (8, 8, 1))


@pytest.mark.parametrize("text", ["1e-4", "1E-4", "0.0001", "1.e-4", "+1e-4"])
def test_numbers_survive(text):
    assert read_yaml(f"x: {text}", "test") == {"x": 1e-4}
    assert load("pydocs-tiny", [f"optimizer.learning_rate={text}"]).optimizer.learning_rate == 1e-4


def test_words_that_yaml_1_1_takes_for_truth_values_stay_words():
    assert read_yaml("a: no\nb: on\nc: true\nd: 1:30\ne: ~\nf:", "test") == {
        "a": "no", "b": "on", "c": True, "d": "1:30", "e": None, "f": None,
    }  # fmt: skip


def test_layers_override_in_order(tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text("train: {steps: 7, workers: 4}\n")
    config = load("pydocs-tiny", ["train.steps=9"], file)
    assert (config.train.steps, config.train.workers) == (9, 4)
    assert config.train.batch_size == 128  # the preset's own


def test_a_preset_can_be_a_file(tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text("data: {length: 64}\nmodel: {}\ntrain: {steps: 1, batch_size: 8, workers: 1}\n")
    assert load(str(file)).name == "mine"


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["train.stepz=5"], ["unknown key 'train.stepz'", "did you mean 'train.steps'?"]),
        (["learning_rate=5"], ["unknown key 'learning_rate'", "did you mean 'optimizer.learning_rate'?"]),
        (["train.steps=many"], ["train.steps='many'", "valid integer"]),
        (["train.steps=0"], ["train.steps=0", "greater than or equal to 1"]),
        (["train.zero_stage=4"], ["train.zero_stage=4", "0, 1, 2 or 3"]),
        (["model.schedule=sigmoid"], ["model.schedule='sigmoid'", "linear", "cosine", "poly"]),
        (["data.vocabulary=text9"], ["text9", "text8"]),
        (["train.workers=16"], ["train.workers=16", "train.slices=8"]),
        (["train.batch_size=60"], ["train.batch_size=60", "train.slices=8"]),
        (["train.workers=4..16"], ["train.workers=4..16", "train.slices=8"]),
        (["train.workers=4..2"], ["workers='4..2'", "least..most"]),
        (["train.workers=many"], ["workers='many'", "least..most"]),
        (["data.mixture=[{}, {weihgt: 2}]"], ["unknown key 'data.mixture.1.weihgt'", "'data.mixture.weight'?"]),
        (["data.mixture=[{}, {length: 32, name: b}]"], ["the same length: '0' has 64, 'b' has 32"]),
        (["data.mixture=[{weight: 9}, {weight: 0.001}]"], ["a weight of 0.001 out of 9.001 is too small", "1/1024"]),
        (["data.mixture=[{name: a}, {name: a}]"], ["different names"]),
        (["data.order=random"], ["data.order='random'", "'auto', 'lanes' or 'full'"]),
        (["model.network.heads=0"], ["model.network.heads=0", "greater than or equal to 1"]),
        (["model.network.headz=4"], ["unknown key 'model.network.headz'", "did you mean 'model.network.heads'?"]),
        (["model.network.kind=unet"], ["model.network.heads: a network of kind unet has no such setting"]),
        (["model.network.kind=mlp"], ["model.network.kind='mlp'", "'transformer', 'unet', 'uvit'"]),
        (["model.label_dropout=0.1"], ["model: label_dropout=0.1", "classes=0"]),
        (["model.objective=genmd4"], ["evaluation.estimator=mask_count", "continuous"]),
        (["optimizer.schedule_weight_decay=0.1"], ["optimizer.schedule_weight_decay=0.1", "no learned schedule"]),
        (["sampling.draws=exact", "sampling.uniform_bits=8"], ["sampling.uniform_bits=8", "draws=legacy_fp32_joint"]),
        (["sampling={sampler: p2, grid: cosine}"], ["sampling: grid=cosine is no setting of the sampler p2"]),
        (["sampling.sampler=thinning"], ["sampling.sampler=thinning", "md4", "ancestral, first_hitting"]),
        (
            ["sampling.sampler=first_hitting", "sampling.extrapolate=true"],
            ["sampling.extrapolate needs steps"],
        ),
        (["model.length=32"], ["model.length=32", "data.length=64"]),
        (["name=../up"], ["name='../up'"]),
        (["optimizer.beta2=1.5"], ["optimizer.beta2=1.5", "less than 1"]),
        (["train.steps"], ["'train.steps'", "key=value"]),
        (["train.steps=[1"], ["value of train.steps", "not valid YAML"]),
    ],
)
def test_mistakes_name_key_value_and_what_is_allowed(overrides, expected):
    with pytest.raises(UserError) as caught:
        load("pydocs-tiny", overrides)
    for part in expected:
        assert part in str(caught.value)


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["sampling.steps=64"], ["sampling.steps=64", "no setting of the sampler thinning"]),
        (["sampling.sampler=remdm"], ["sampling.sampler=remdm", "genmd4", "thinning, adaptive_thinning, race"]),
        (["sampling.sampler=ancestral", "sampling.leftovers=argmax"], ["sampling.leftovers=argmax", "grid, steps"]),
    ],
)
def test_mistakes_about_sampling_learned_schedules(overrides, expected):
    with pytest.raises(UserError) as caught:
        load("pydocs-tiny-genmd4", overrides)
    for part in expected:
        assert part in str(caught.value)


def test_presets_name_their_sampler():
    """The demo of GenMD4 is sampled by thinning, the published models along a grid."""
    for name, sampler in {
        "pydocs-tiny": "ancestral",
        "pydocs-tiny-genmd4": "thinning",
        "text8-genmd4": "ancestral",
        "openwebtext-small-genmd4": "ancestral",
    }.items():
        config = load(name)
        assert config.sampling.resolve(config.model.objective).sampler == sampler


def test_all_mistakes_are_told_at_once():
    with pytest.raises(UserError) as caught:
        load("pydocs-tiny", ["train.stepz=5", "optimizer.ema=2"])
    assert len(str(caught.value).splitlines()) == 2


def test_unknown_preset_names_the_nearest():
    with pytest.raises(UserError, match=r"unknown preset 'pydoc-tiny'; did you mean 'pydocs-tiny'\?"):
        load("pydoc-tiny")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("train: {steps: 1}\ntrain: {steps: 2}\n", "stands twice"),
        ("- a\n- b\n", "a configuration is a mapping"),
        ("train: [1\n", "not valid YAML"),
    ],
)
def test_damaged_files_are_named(tmp_path, text, expected):
    file = tmp_path / "bad.yaml"
    file.write_text(text)
    with pytest.raises(UserError, match=expected) as caught:
        load("pydocs-tiny", file=file)
    assert "bad.yaml" in str(caught.value)


def test_missing_files_are_named(tmp_path):
    with pytest.raises(UserError, match=r"absent\.yaml"):
        load(str(tmp_path / "absent.yaml"))
    with pytest.raises(UserError, match=r"absent\.yaml"):
        load("pydocs-tiny", file=tmp_path / "absent.yaml")


def test_another_sampler_leaves_the_presets_settings_of_its_own_behind():
    sampling = load("pydocs-tiny", ["sampling.sampler=first_hitting", "sampling.steps=8"]).sampling
    assert (sampling.sampler, sampling.steps, sampling.grid) == ("first_hitting", 8, None)
    assert load("pydocs-tiny", ["sampling.temperature=0.5"]).sampling.grid == "cosine"
    assert load("pydocs-tiny", ["model.objective=genmd4", "evaluation.estimator=continuous"]).sampling.grid is None
    assert load("pydocs-tiny", ["model.objective=md4"]).sampling.grid == "cosine"
