"""Padding that costs nothing, and attention within documents, against rows that hold nothing else."""

from typing import Any

import pytest
import torch

from md4 import documents, noise
from md4.inference import Prediction
from md4.likelihood import nelbo
from md4.model import ModelConfig, build
from md4.samplers.grid_costs import estimate_costs

V, END, B = 11, 3, 4
N, L = 12, 20  # tokens of a document and of its row
T = torch.tensor([0.2, 0.45, 0.7, 0.9])


def model(objective: str = "md4", compute=torch.float32, **more):
    """A small network that depends on everything, told to see documents alone."""
    config = ModelConfig.model_validate(
        {
            "objective": objective, "vocab_size": V, "length": L, "attention": "document", "end_of_text": END,
            "network": {"feature_dim": 16, "heads": 2, "layers": 2}, **more,
        }
    )  # fmt: skip
    made = build(config, compute)
    with torch.no_grad():
        for name, p in made.named_parameters():
            values = noise.uniform(noise.key(1, name), torch.arange(p.numel())).view(p.shape)
            p.add_((0.3 * (2 * values - 1)).float())
    return made.eval()


def documents_of(length: int, seed: int = 0) -> torch.Tensor:
    """Tokens `[B, length]`, none of them an end."""
    draw = noise.uniform(noise.key(seed, "tokens"), torch.arange(B * length)).view(B, length)
    tokens = (draw * (V - 1)).long()
    return tokens + (tokens >= END)


def padded() -> tuple[torch.Tensor, torch.Tensor]:
    """Documents `[B, N]` that end, and the same in rows `[B, L]`."""
    short = documents_of(N)
    short[:, -1] = END
    return short, torch.cat([short, torch.full((B, L - N), END)], dim=1)


def test_what_is_padding():
    rows = torch.tensor([[1, 2, END, END], [END, END, END, END], [1, 2, 4, 5], [1, END, 2, END]])
    assert documents.no_padding(rows, END).int().tolist() == [[1, 1, 1, 0], [1, 0, 0, 0], [1] * 4, [1, 1, 0, 0]]
    assert documents.segments(rows, END)[3].tolist() == [0, 0, 1, 1]
    assert documents.segments(rows, END)[0].tolist() == [0, 0, 0, 1]


@pytest.mark.parametrize("time", ["continuous", "discrete"])
@pytest.mark.parametrize("objective", ["md4", "genmd4"])
def test_a_padded_document_has_the_loss_and_gradient_of_the_document_alone(objective, time):
    if (objective, time) == ("genmd4", "discrete"):
        return
    made = model(objective, time=time)
    short, rows = padded()
    shape = (B, 2, L) if objective == "genmd4" else (B, L)
    uniforms = noise.uniform(noise.key(5), torch.arange(B * 2 * L)[: torch.tensor(shape).prod()]).view(shape)
    found = []
    for tokens, real in [(short, None), (rows, documents.no_padding(rows, END))]:
        loss = made(tokens, T.double(), uniforms[..., : tokens.shape[1]], real=real)
        gradient = torch.autograd.grad(loss.optimised.sum(), list(made.parameters()))
        found.append((loss.bound, torch.cat([g.flatten() for g in gradient])))
    (bound, gradient), (bound_padded, gradient_padded) = found
    torch.testing.assert_close(bound_padded, bound, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(gradient_padded, gradient, rtol=1e-4, atol=1e-4 * float(gradient.abs().max()))
    whole = made(rows, T.double(), uniforms).bound
    assert (whole - bound).abs().min() > 1e-3


def test_everything_real_changes_no_bit():
    short, _ = padded()
    for objective in ("md4", "genmd4"):
        made = model(objective)
        drawn = made.noise(1, 2, torch.arange(B), B, 1, N)
        plain = made(short, **drawn)
        same = made(short, **drawn, real=torch.ones(B, N, dtype=torch.bool))
        assert torch.equal(plain.bound, same.bound)
        assert torch.equal(plain.optimised, same.optimised)


@pytest.mark.parametrize(
    ("objective", "estimator"),
    [("md4", "mask_count"), ("md4", "continuous"), ("md4", "discrete"), ("genmd4", "continuous")],
)
def test_a_padded_document_has_the_likelihood_of_the_document_alone(objective, estimator):
    made = model(objective)
    short, rows = padded()
    asked = {"draws": 3, "seed": 1, "ids": torch.arange(B), "estimator": estimator}
    alone = nelbo(made, short, **asked)
    in_rows = nelbo(made, rows, **asked, real=documents.no_padding(rows, END))
    torch.testing.assert_close(in_rows, alone, rtol=1e-5, atol=1e-5)
    assert (nelbo(made, rows, **asked) - alone).abs().max() > 1e-2


def test_grids_are_searched_without_padding():
    made = model()
    short, rows = padded()
    times = torch.tensor([1.0, 0.5, 0.0], dtype=torch.float64)
    alone = estimate_costs(made, short, times, draws=2, seed=0)
    in_rows = estimate_costs(made, rows, times, draws=2, seed=0, real=documents.no_padding(rows, END))
    torch.testing.assert_close(in_rows.nats, alone.nats, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(in_rows.bound([1.0, 0.0]), alone.bound([1.0, 0.0]), rtol=1e-5, atol=1e-5)
    assert in_rows.tokens is not None
    assert in_rows.tokens.tolist() == [N] * B


@pytest.mark.parametrize("compute", [torch.float32, torch.bfloat16])
def test_a_position_sees_its_own_document_alone(compute):
    """Not the others, whatever they hold; and they see it from where it stands: as if it stood alone, but for the
    rotary positions, of which only differences enter."""
    network = model(compute=compute).network
    first, second, other = documents_of(6, 1), documents_of(9, 2), documents_of(6, 3)
    end = torch.full((B, 1), END)
    row, changed = (torch.cat([one, end, second, end, end], dim=1) for one in (first, other))
    z = row.clone()
    z[:, 8:11] = V  # some of the second are hidden
    z_changed = torch.where(z == V, V, changed)
    with torch.no_grad():
        logits, after = network(z, T), network(z_changed, T)
        assert torch.equal(logits[:, 7:], after[:, 7:])
        assert not torch.equal(logits[:, :6], after[:, :6])
        alone = network(z[:, 7:17], T)
    atol = 1e-4 if compute == torch.float32 else 0.15
    torch.testing.assert_close(logits[:, 7:17], alone, rtol=0, atol=atol)


@pytest.mark.parametrize("plain_up_to", [1024, 1])
def test_hidden_ends_part_documents_in_training_and_visible_ones_in_sampling(plain_up_to, monkeypatch):
    """By both forms of the loss, with all logits and without."""
    monkeypatch.setattr("md4.networks.transformer.PLAIN_UP_TO", plain_up_to)
    made = model()
    row = torch.cat([documents_of(6, 1), torch.full((B, 1), END), documents_of(7, 2)], dim=1)
    z = torch.full_like(row, V)
    network: Any = made.network
    told = made.scores(row, z, T).log_likelihood
    with torch.no_grad():
        one = network.body(z, T)
        two = network.body(z, T, segments=documents.segments(row, END))
    assert not torch.allclose(one, two)
    targets = torch.log_softmax(network.head(two), -1).gather(2, row[..., None])[..., 0]
    torch.testing.assert_close(told, targets)


def test_a_row_of_several_documents_answers_the_same_in_any_company():
    made = model()
    row = torch.cat([documents_of(7, 1), torch.full((B, 1), END), documents_of(8, 2)], dim=1)
    row[:, 3:12:4] = V
    index = torch.arange(row.shape[1])
    together = Prediction(made, row, T)
    for number in range(B):
        alone = Prediction(made, row[number : number + 1], T[number : number + 1])
        got = alone.logits(torch.zeros_like(index), index)
        assert torch.equal(got, together.logits(torch.full_like(index, number), index))


def test_recomputed_activations_see_the_same():
    short, rows = padded()
    drawn = {"t": T.double(), "uniforms": noise.uniform(noise.key(5), torch.arange(B * L)).view(B, L)}
    network = {"feature_dim": 16, "heads": 2, "layers": 2}
    gradients = []
    for recompute in (False, True):
        made = model(network={**network, "checkpoint_activations": recompute})
        made(rows, **drawn).optimised.sum().backward()
        gradients.append(torch.cat([p.grad.flatten() for p in made.parameters() if p.grad is not None]))
    torch.testing.assert_close(gradients[0], gradients[1])
    assert len(short) == B


def test_what_attention_needs():
    tree = {"vocab_size": V, "length": L, "attention": "document"}
    for wrong in ({}, {"end_of_text": V}):
        with pytest.raises(ValueError, match="needs a vocabulary with an end-of-text token"):
            ModelConfig.model_validate(tree | wrong)
    image = {"shape": (4, 4, 1), "length": 16, "end_of_text": 1, "network": {"kind": "unet"}}
    with pytest.raises(ValueError, match="attention=document is for text"):
        ModelConfig.model_validate(tree | image)
    assert ModelConfig.model_validate({"vocab_size": V, "length": L}).attention == "full"
