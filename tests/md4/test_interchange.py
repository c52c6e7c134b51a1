"""Reference parameters: every name and layout, and a clear word about each one that does not fit."""

import json

import numpy as np
import pytest
import torch

from md4.errors import UserError
from md4.interchange import (
    from_reference,
    load_reference,
    read_arrays,
    reference_config,
    reference_names,
    reference_shape,
)
from md4.model import ModelConfig, build
from md4.networks.transformer import TransformerConfig
from md4.networks.unet import UNetConfig
from md4.networks.uvit import UViTConfig
from md4.objectives import MaskedDiffusion
from tests.golden import VECTORS

TEXT = {"vocab_size": 11, "length": 12}
IMAGE = {"vocab_size": 11, "shape": (8, 4, 2)}
TRANSFORMER = {"kind": "transformer", "feature_dim": 8, "heads": 2, "layers": 2}
UNET = {"kind": "unet", "feature_dim": 32, "layers": 2}
UVIT = {
    "kind": "uvit", "feature_dim": 32, "layers": 1, "multipliers": (1, 2), "dit_layers": 2, "dit_heads": 2,
    "dit_width": 16,
}  # fmt: skip
NO_TIME = {"time_input": False}
VARIANTS = {
    "time": {**TEXT, "network": TRANSFORMER},
    "neither": {**TEXT, "network": TRANSFORMER | NO_TIME},
    "classes": {**TEXT, "classes": 3, "network": TRANSFORMER | NO_TIME},
    "time and classes": {**TEXT, "classes": 3, "network": TRANSFORMER},
    "wide": {**TEXT, "network": TRANSFORMER | {"outside_embed": False}},
    "wide, neither": {**TEXT, "network": TRANSFORMER | {"outside_embed": False} | NO_TIME},
    "genmd4": {**TEXT, "objective": "genmd4", "network": TRANSFORMER},
    "unet": {**IMAGE, "network": UNET},
    "unet, neither": {**IMAGE, "network": UNET | NO_TIME},
    "unet, time and classes": {**IMAGE, "classes": 3, "network": UNET},
    "uvit": {**IMAGE, "network": UVIT},
    "uvit, neither": {**IMAGE, "network": UVIT | NO_TIME},
    "uvit, classes": {**IMAGE, "classes": 3, "network": UVIT | NO_TIME},
}


def config_of(variant: str) -> ModelConfig:
    return ModelConfig.model_validate(VARIANTS[variant])


def stirred(config: ModelConfig) -> MaskedDiffusion:
    """A model in which every parameter differs."""
    model = build(config).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape, generator=generator) * 0.3)
    return model


def as_reference(model: MaskedDiffusion, config: ModelConfig) -> dict[str, np.ndarray]:
    """The model's parameters as the reference would store them."""
    arrays = {}
    for name, path in reference_names(config).items():
        array = model.state_dict()[name].numpy().copy()
        if path.endswith("/kernel"):
            array = array.transpose(1, 0) if array.ndim == 2 else array.transpose(2, 3, 1, 0)
        if "MultiHead" in path or ("ResBlock" in path and "/Dense_" in path):  # an axis of heads; no axes of pixels
            array = array.reshape(reference_shape(path, tuple(model.state_dict()[name].shape)))
        arrays[path] = array
    return arrays


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_parameter_goes_there_and_back(variant, tmp_path):
    config = config_of(variant)
    model = stirred(config)
    arrays = as_reference(model, config)
    assert len(arrays) == len(model.state_dict())
    np.savez(tmp_path / "weights.npz", **{f"ema/{path}": a for path, a in arrays.items()}, step=np.array(3))
    loaded = load_reference(tmp_path / "weights.npz", config, prefix="ema/")
    assert not loaded.training
    for name, p in model.named_parameters():
        assert torch.equal(p, loaded.get_parameter(name)), name


@pytest.mark.parametrize(
    ("path", "ours", "theirs"),
    [
        ("a/Dense_0/kernel", (4, 3), (3, 4)),
        ("a/Dense_0/bias", (4,), (4,)),
        ("a/Conv_0/kernel", (5, 4, 3, 2), (3, 2, 4, 5)),
        ("a/ResBlock_0/Dense_1/kernel", (4, 3, 1, 1), (3, 4)),
        ("a/MultiHeadDotProductAttention_0/query/kernel", (4, 3), (3, 1, 4)),
        ("a/MultiHeadDotProductAttention_0/value/bias", (4,), (1, 4)),
        ("a/MultiHeadDotProductAttention_0/out/kernel", (4, 3), (1, 3, 4)),
        ("a/MultiHeadDotProductAttention_0/out/bias", (4,), (4,)),
        ("a/Embed_0/embedding", (7, 3), (7, 3)),
    ],
)
def test_shapes_in_the_reference(path, ours, theirs):
    assert reference_shape(path, ours) == theirs


def test_a_real_file_of_the_reference_is_read():
    file = read_arrays(VECTORS / "backbone_text_time.npz")
    meta = json.loads(str(file["meta_json"]))
    config = reference_config(meta)
    assert config.network.width == meta["feature_dim"] * meta["num_heads"]
    model = load_reference(VECTORS / "backbone_text_time.npz", config, prefix="param:")
    kernel = file["param:classifier/Transformer_0/TransformerBlock_1/feed_forward/w1/kernel"]
    assert np.array_equal(model.network.blocks[1].mlp.w1.weight.detach().numpy(), kernel.T)
    assert kernel.shape[0] != kernel.shape[1]


def test_misfits_are_named():
    config = config_of("time")
    arrays = as_reference(build(config), config)
    embedding, bias = "classifier/Embed_0/embedding", "classifier/Transformer_0/Dense_0/bias"
    kernel = "classifier/Transformer_0/TransformerBlock_0/feed_forward/w1/kernel"
    del arrays[embedding]
    arrays["classifier/Embed_1/embedding"] = np.zeros(3)
    arrays[bias] = np.zeros(16, dtype=np.int32)
    arrays[kernel] = arrays[kernel].T
    with pytest.raises(UserError) as error:
        from_reference(arrays, config)
    message = str(error.value)
    assert f"missing: {embedding}" in message
    assert "unexpected: classifier/Embed_1/embedding" in message
    assert f"{kernel} has shape [64, 16], expected [16, 64]" in message
    assert f"{bias} holds int32, not real numbers" in message


def test_weights_of_another_configuration_are_refused_briefly():
    arrays = as_reference(build(config_of("time")), config_of("time"))
    with pytest.raises(UserError, match=r"missing: .*; unexpected: .* and \d+ more") as error:
        from_reference(arrays, config_of("neither"))
    assert len(str(error.value)) < 1500


META = {
    "data_shape": [32], "cont_time": False, "timesteps": 16, "feature_dim": 16, "num_heads": 4, "n_layers": 2,
    "vocab_size": 27, "noise_schedule_type": "cosine", "dropout_rate": 0.1, "mlp_type": "geglu", "cond_type": "adaln",
    "depth_scaled_init": False, "outside_embed": False, "time_features": "none", "classes": 5,
}  # fmt: skip


def test_the_reference_configuration_is_understood():
    config = reference_config(META)
    assert config == ModelConfig(
        vocab_size=27,
        length=32,
        classes=5,
        schedule="cosine",
        time="discrete",
        timesteps=16,
        network=TransformerConfig(
            feature_dim=16,
            heads=4,
            layers=2,
            mlp="geglu",
            conditioning="adaln",
            depth_scaled_init=False,
            outside_embed=False,
            time_input=False,
            dropout=0.1,
        ),
    )
    assert reference_config(META | {"classes": -1}).classes == 0
    assert reference_config(META | {"noise_schedule": "poly2"}).schedule == "poly2"


IMAGE_META = META | {
    "data_shape": [8, 8, 3], "n_dit_layers": 0, "dit_num_heads": 2, "dit_hidden_size": 16, "ch_mult": [1, 2],
    "feature_dim": 32,
}  # fmt: skip


def test_the_reference_configuration_of_images_is_understood():
    common = {"vocab_size": 27, "classes": 5, "schedule": "cosine", "time": "discrete", "timesteps": 16}
    both = {"feature_dim": 32, "layers": 2, "time_input": False, "dropout": 0.1}
    assert reference_config(IMAGE_META) == ModelConfig(
        length=192, shape=(8, 8, 3), network=UNetConfig(**both), **common
    )
    uvit = UViTConfig(multipliers=(1, 2), dit_layers=3, dit_heads=2, dit_width=16, **both)
    assert reference_config(IMAGE_META | {"n_dit_layers": 3}).network == uvit


def test_the_reference_configuration_of_genmd4_is_understood():
    meta = META | {"model_type": "genmd4", "noise_schedule": "poly", "power_init": 1.5, "cont_time": True}
    config = reference_config(meta)
    assert (config.objective, config.power_init, config.time) == ("genmd4", 1.5, "continuous")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"data_shape": [8, 8]}, r"data_shape is \[8, 8\]: one axis \(text\) or three"),
        ({"model_type": "sedd"}, "model_type is 'sedd': only 'md4' and 'genmd4'"),
        ({"model_type": "genmd4"}, "noise_schedule is 'cosine': genmd4 has 'poly' alone"),
        ({"model_type": "genmd4", "noise_schedule": "poly", "power_init": 1.0}, "genmd4 has continuous time alone"),
        ({"mlp_type": "relu"}, "network.transformer.mlp is 'relu'"),
        ({"noise_schedule": "sine"}, "schedule is 'sine'"),
        ({"data_shape": [8, 8, 3]}, "lacks 'n_dit_layers'"),
    ],
)
def test_other_models_of_the_reference_are_refused(change, message):
    with pytest.raises(UserError, match=message):
        reference_config(META | change)


def test_a_missing_setting_is_named():
    with pytest.raises(UserError, match="lacks 'num_heads'"):
        reference_config({key: value for key, value in META.items() if key != "num_heads"})


def test_unreadable_files_are_refused(tmp_path):
    with pytest.raises(UserError, match="there is no file"):
        read_arrays(tmp_path / "absent.npz")
    good = tmp_path / "good.npz"
    np.savez(good, a=np.arange(1000.0))
    contents = good.read_bytes()
    damages = {
        "empty.npz": b"",
        "text.npz": b"not an archive",
        "cut.npz": contents[: len(contents) // 2],
        "flipped.npz": contents[:500] + bytes([contents[500] ^ 255]) + contents[501:],
    }
    for name, damaged in damages.items():
        (tmp_path / name).write_bytes(damaged)
    np.save(tmp_path / "single.npy", np.arange(3.0))
    (tmp_path / "single.npy").rename(tmp_path / "single.npz")
    np.savez(tmp_path / "pickled.npz", a=np.array([{"code": 1}], dtype=object))
    for name in [*damages, "single.npz", "pickled.npz"]:
        with pytest.raises(UserError, match=f"{name} is not a readable .npz file"):
            read_arrays(tmp_path / name)
