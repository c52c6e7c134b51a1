"""The model from its configuration: sizes of the published models, and starting weights that only the seed decides."""

import pytest
import torch
from pydantic import ValidationError

from md4.genmd4 import GenMD4
from md4.model import ModelConfig, build, count_parameters, drop_labels, skeleton
from md4.networks.transformer import TransformerConfig
from md4.objectives import bits_per_token

TEXT8 = {"vocab_size": 27, "length": 256}
OWT = {"vocab_size": 50257, "length": 1024}
SMALL = ModelConfig(vocab_size=27, length=12, network=TransformerConfig(feature_dim=8, heads=2, layers=2))


GENMD4 = {"objective": "genmd4"}
IMAGENET = {"vocab_size": 256, "shape": (64, 64, 3)}
WIDE = {"outside_embed": False}


@pytest.mark.parametrize(
    ("settings", "network", "published"),
    [
        pytest.param(TEXT8, {}, 88_734_272, id="text8"),
        pytest.param(TEXT8 | GENMD4, {}, 88_734_299, id="text8, GenMD4"),
        pytest.param(OWT, WIDE, 165_857_344, id="openwebtext small"),
        pytest.param(OWT, WIDE | {"time_input": False}, 162_149_376, id="openwebtext small without time"),
        pytest.param(OWT, WIDE | {"layers": 24, "heads": 16}, 416_240_960, id="openwebtext medium"),
        pytest.param(OWT | GENMD4 | {"vocab_size": 50259}, WIDE, 165_910_675, id="openwebtext small, GenMD4"),
        pytest.param({"vocab_size": 256, "shape": (32, 32, 3)}, {"kind": "unet"}, 28_427_520, id="cifar10"),
        pytest.param(IMAGENET, {"kind": "uvit"}, 204_595_712, id="imagenet64"),
        pytest.param(
            IMAGENET, {"kind": "uvit", "layers": 24, "dit_layers": 12}, 198_279_680, id="imagenet64 best likelihood"
        ),
        pytest.param(IMAGENET | {"classes": 1000}, {"kind": "uvit"}, 205_113_856, id="imagenet64 class-conditional"),
    ],
)
def test_published_models_have_their_size(settings, network, published):
    assert count_parameters(ModelConfig.model_validate({**settings, "network": network})) == published


def test_a_skeleton_takes_no_memory():
    assert {p.device.type for p in skeleton(SMALL).parameters()} == {"meta"}


def test_weights_depend_on_the_seed_alone():
    torch.manual_seed(0)
    first = build(SMALL, seed=7)
    torch.manual_seed(1)
    state = torch.get_rng_state()
    again, other = build(SMALL, compute=torch.bfloat16, seed=7), build(SMALL, seed=8)
    assert torch.equal(state, torch.get_rng_state())
    for name, p in first.named_parameters():
        assert p.dtype == torch.float32
        assert torch.equal(p, again.get_parameter(name)), name
    assert not torch.equal(first.network.embed.weight, other.network.embed.weight)


def test_an_untrained_model_codes_a_token_in_log2_v_bits():
    """Logits start at 0, so the mean loss over stratified times is log2 V, up to the masks' noise.

    The number hidden is a binomial at each time; 64 batches of 32 examples, 5 standard errors, fixed seed.
    """
    model = build(SMALL)
    slots = torch.arange(32)
    tokens = torch.zeros(32, SMALL.length, dtype=torch.int64)
    with torch.no_grad():
        bits = torch.stack(
            [
                bits_per_token(model(tokens, **model.noise(0, k, slots, 32, 4, 12)).bound, SMALL.length).mean()
                for k in range(64)
            ]
        )
    expected = torch.tensor(27.0).log2()
    assert (bits.mean() - expected).abs() < 5 * bits.std() / 8


def test_configuration_reaches_the_model():
    config = ModelConfig(
        vocab_size=9, length=4, classes=3, schedule="poly2.0", time="discrete", timesteps=50, network=SMALL.network
    )
    assert config.schedule == "poly2"
    model = build(config)
    assert model.mask_id == model.vocab_size == 9
    assert str(model.schedule) == "poly2"
    assert not model.continuous
    assert model.timesteps == 50
    assert model.network.conditioning.class_embed.weight.shape == (3, 8)
    z = torch.full((2, 4), 9)
    assert model.logits(z, torch.tensor([0.2, 0.9]), torch.tensor([0, 2])).shape == (2, 4, 9)


IMAGE = {
    "vocab_size": 5,
    "shape": (4, 8, 2),
    "network": {"kind": "uvit", "feature_dim": 32, "layers": 1, "dit_layers": 1, "dit_heads": 2, "dit_width": 16},
}


def test_an_image_model_takes_flat_tokens():
    """The stream, the samplers and the likelihood know of no shape."""
    config = ModelConfig.model_validate(IMAGE)
    assert config.length == 64
    assert ModelConfig.model_validate(config.model_dump(mode="json")) == config
    model = build(config)
    assert model.shape == (4, 8, 2)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.rand(p.shape, generator=torch.Generator().manual_seed(p.numel())))
        z = torch.arange(2 * 64).view(2, 64) * 7 % 6
        t = torch.tensor([0.2, 0.9])
        logits = model.eval().logits(z, t)
        assert logits.shape == (2, 64, 5)
        assert torch.equal(logits, model.network(z.view(2, 4, 8, 2), t).view(2, 64, 5))  # no copy
    draws = model.noise(0, 0, torch.arange(2), 2, 1, 64)
    loss = model(z.clamp(max=4), **draws)
    assert loss.optimised.shape == loss.bound.shape == (2,)
    loss.optimised.sum().backward()
    assert all(p.grad is not None for p in model.parameters())


def test_a_network_without_a_kind_is_a_transformer():
    assert ModelConfig(**TEXT8, network={"layers": 3}).network == TransformerConfig(layers=3)
    assert ModelConfig(**TEXT8).network == TransformerConfig()


def test_genmd4_starts_at_its_power():
    config = ModelConfig(**TEXT8, objective="genmd4", power_init=2.0, network=SMALL.network)
    model = build(config)
    assert isinstance(model, GenMD4)
    assert torch.allclose(model.schedule(), torch.full((27,), 2.0))
    assert torch.equal(model.schedule.w, build(config, seed=1).schedule.w)


# --- label dropout ---


def test_dropped_labels_are_a_function_of_seed_step_and_slot():
    labels, slots = torch.arange(64) % 3, torch.arange(64)
    dropped = drop_labels(labels, 0.4, 5, 7, slots)
    assert ((dropped == labels) | (dropped == -1)).all()
    order = torch.arange(64).flip(0)
    assert torch.equal(drop_labels(labels[order], 0.4, 5, 7, slots[order]), dropped[order])
    assert torch.equal(drop_labels(labels[:8], 0.4, 5, 7, slots[:8]), dropped[:8])
    assert not torch.equal(drop_labels(labels, 0.4, 5, 8, slots), dropped)
    assert not torch.equal(drop_labels(labels, 0.4, 6, 7, slots), dropped)
    assert torch.equal(drop_labels(labels, 0.0, 5, 7, slots), labels)
    assert (drop_labels(labels, 1.0, 5, 7, slots) == -1).all()


def test_the_stated_share_of_labels_is_dropped():
    """10,000 labels, 5 standard deviations, fixed seed."""
    dropped = drop_labels(torch.zeros(10_000, dtype=torch.int64), 0.1, 0, 0, torch.arange(10_000)) == -1
    assert abs(dropped.double().mean().item() - 0.1) < 5 * (0.09 / 10_000) ** 0.5


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"vocab_size": 1}, "greater than or equal to 2"),
        ({"length": 0}, "greater than or equal to 1"),
        ({"schedule": "sine"}, "unknown schedule 'sine'"),
        ({"time": "both"}, "'continuous' or 'discrete'"),
        ({"timesteps": 0}, "greater than or equal to 1"),
        ({"colour": 1}, "Extra inputs are not permitted"),
        ({"network": {"heads": 0}}, "greater than or equal to 1"),
        ({"network": {"kind": "mlp"}}, "'transformer', 'unet', 'uvit'"),
        ({"network": {"kind": "unet", "heads": 3}}, "Extra inputs are not permitted"),
        ({"network": {"kind": "unet"}}, "network.kind=unet is for images: shape must give"),
        ({"shape": (16, 16, 1)}, "network.kind=transformer is for text: shape must be null"),
        ({"shape": (8, 8, 3), "network": {"kind": "unet"}}, "length=256 must be height .* = 192"),
        ({"shape": (-16, -16, 1), "network": {"kind": "unet"}}, r"shape=\[-16, -16, 1\] must be positive"),
        ({"shape": (256, 1, 1), "network": {"kind": "uvit"}}, "height and width in multiples of 2"),
        (
            {"shape": (4, 64, 1), "network": {"kind": "uvit", "multipliers": [1, 1, 1]}},
            "height and width in multiples of 8",
        ),
        ({"label_dropout": 0.1}, "label_dropout=0.1 hides classes, but classes=0"),
        ({"label_dropout": 1.1, "classes": 2}, "less than or equal to 1"),
        ({"objective": "genmd4", "time": "discrete"}, "genmd4 has continuous time alone"),
        ({"objective": "sedd"}, "'md4' or 'genmd4'"),
        ({"power_init": 0}, "greater than 0"),
    ],
)
def test_bad_configurations_are_refused(change, message):
    with pytest.raises(ValidationError, match=message):
        ModelConfig(**TEXT8 | change)
