import pytest
import torch

from md4 import inference
from md4.inference import Prediction
from md4.model import ModelConfig, build
from md4.networks.transformer import TransformerConfig


def everywhere(model, z, t, labels=None):
    """Logits `[B, L, V]`."""
    row, position = torch.ones_like(z).nonzero(as_tuple=True)
    return Prediction(model, z, t, labels).logits(row, position).unflatten(0, z.shape)


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
    together = everywhere(model, z, t)
    assert together.shape == (40, 9, 27)
    for rows in range(1, 22):
        part = slice(rows // 2, rows // 2 + rows)
        assert torch.equal(everywhere(model, z[part], t[part]), together[part])


@pytest.mark.parametrize(("length", "heads", "filled"), [(8, 2, False), (24, 6, False), (256, 4, False), (6, 2, True)])
def test_a_lone_text_is_filled_up_only_where_it_must_be(length, heads, filled, monkeypatch):
    """Bits as with all rows filled up, for 1, 2 and 3 rows; the network gets no more rows unless positions are odd."""
    network = TransformerConfig(feature_dim=16, heads=heads, layers=2)
    model = build(ModelConfig(vocab_size=27, length=length, classes=3, network=network))
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.2 * torch.randn(parameter.shape, generator=generator)
    z, t = torch.randint(0, 28, (7, length), generator=generator), torch.rand(7, generator=generator)
    labels = torch.tensor([0, 1, 2, -1, 0, 1, 2])
    with monkeypatch.context() as patch:
        patch.setattr(inference, "_rows_enough", lambda length, width: False)
        together = everywhere(model, z, t, labels)
    seen: list[int] = []
    model.network.lift.register_forward_pre_hook(lambda module, inputs: seen.append(len(inputs[0])))
    for rows in (1, 2, 3):
        for start in (0, 2, 4):
            part = slice(start, start + rows)
            assert torch.equal(everywhere(model, z[part], t[part], labels[part]), together[part])
            assert seen.pop() == (4 if filled else rows)


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
    torch.testing.assert_close(everywhere(model, z, t, labels), plain, rtol=1e-4, atol=1e-4)


def test_a_positions_logits_have_the_same_bits_in_any_company():
    """The head of a wide network asked for 1 to 21 positions, against all 120 at once."""
    network = TransformerConfig(feature_dim=48, heads=2, layers=1)
    model = build(ModelConfig(vocab_size=1000, length=30, network=network))
    with torch.no_grad():
        torch.nn.init.normal_(model.network.head.weight, generator=torch.Generator().manual_seed(1))
    z, t = torch.full((4, 30), 1000), torch.rand(4)
    prediction = Prediction(model, z, t)
    row, position = torch.ones_like(z).nonzero(as_tuple=True)
    together = prediction.logits(row, position)
    torch.testing.assert_close(together, model.logits(z, t).flatten(0, 1), rtol=1e-5, atol=1e-5)
    for count in range(1, 22):
        part = slice(3 * count, 4 * count)
        assert torch.equal(prediction.logits(row[part], position[part]), together[part])
