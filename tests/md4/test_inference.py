import pytest
import torch

from md4 import inference
from md4.model import ModelConfig, build
from md4.networks.transformer import TransformerConfig


@pytest.mark.parametrize("mlp", ["glu", "swiglu", "geglu"])
@pytest.mark.parametrize("time_input", [True, False])
def test_a_rows_logits_have_the_same_bits_in_any_company(mlp, time_input):
    """All batch sizes up to 21 against one batch of 40: a smallest network, where rows end inside vector registers."""
    network = TransformerConfig(feature_dim=16, heads=2, layers=1, mlp=mlp, time_input=time_input)
    model = build(ModelConfig(vocab_size=27, length=9, network=network))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.2 * torch.randn(parameter.shape, generator=generator)
    z, t = torch.randint(0, 28, (40, 9), generator=generator), torch.rand(40, generator=generator)
    together = inference.logits(model, z, t)
    assert together.shape == (40, 9, 27)
    for rows in range(1, 22):
        part = slice(rows // 2, rows // 2 + rows)
        assert torch.equal(inference.logits(model, z[part], t[part]), together[part])


def test_labels_follow_their_rows():
    """A class-conditional network: each of three rows sees its own class and time, filled up or not."""
    network = TransformerConfig(feature_dim=16, heads=2, layers=1)
    model = build(ModelConfig(vocab_size=5, length=4, classes=3, network=network))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.3
    z, t, labels = torch.full((3, 4), 5), torch.tensor([0.1, 0.5, 0.9]), torch.tensor([2, 0, 1])
    with torch.no_grad():
        plain = torch.cat([model.network(z[i : i + 1], t[i : i + 1], labels[i : i + 1]) for i in range(3)])
    torch.testing.assert_close(inference.logits(model, z, t, labels), plain, rtol=1e-4, atol=1e-4)
