"""The model from its configuration: sizes of the published models, and starting weights that only the seed decides."""

import pytest
import torch
from pydantic import ValidationError

from md4.model import ModelConfig, build, count_parameters, skeleton
from md4.networks.transformer import TransformerConfig
from md4.objectives import bits_per_token

TEXT8 = {"vocab_size": 27, "length": 256}
OWT = {"vocab_size": 50257, "length": 1024}
SMALL = ModelConfig(vocab_size=27, length=12, network=TransformerConfig(feature_dim=8, heads=2, layers=2))


@pytest.mark.parametrize(
    ("shape", "network", "published"),
    [
        (TEXT8, {}, 88_734_272),
        (OWT, {"outside_embed": False}, 165_857_344),
        (OWT, {"outside_embed": False, "time_input": False}, 162_149_376),
        (OWT, {"outside_embed": False, "layers": 24, "heads": 16}, 416_240_960),
    ],
)
def test_published_models_have_their_size(shape, network, published):
    assert count_parameters(ModelConfig(**shape, network=TransformerConfig(**network))) == published


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
                bits_per_token(model(tokens, **model.noise(0, k, slots, 32, 4, SMALL.length)).bound, SMALL.length).mean()
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
    ],
)
def test_bad_configurations_are_refused(change, message):
    with pytest.raises(ValidationError, match=message):
        ModelConfig(**TEXT8 | change)
