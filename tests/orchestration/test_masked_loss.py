"""The chunked loss inside a real DeepSpeed engine: every ZeRO stage trains as the plain loss does without one."""

import pytest
import torch

from md4 import masked_loss
from md4.model import ModelConfig, build
from md4.networks.transformer import TransformerConfig
from orchestration.optimizer import AdamWithEma
from orchestration.zero import EngineState, initialize

# The head has 128,000 elements: more than stage 3 keeps on every worker, so it is gathered and let go.
MODEL = ModelConfig(vocab_size=8000, length=24, network=TransformerConfig(feature_dim=8, heads=2, layers=1))


def model_of(objective: str):
    model = build(MODEL.model_copy(update={"objective": objective}), seed=1)
    with torch.no_grad():
        model.network.head.weight.normal_(std=0.3, generator=torch.Generator().manual_seed(4))
    return model


def examples(model, step: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    tokens = torch.randint(0, 8000, (8, 24), generator=torch.Generator().manual_seed(step))
    drawn = model.noise(0, step, torch.arange(8), 8, 1, 24)
    return tokens, drawn["t"], drawn["uniforms"]


@pytest.mark.parametrize(("stage", "objective"), [(2, "md4"), (3, "md4"), (3, "genmd4")])
def test_every_stage_trains_as_the_plain_loss_does(process_group, monkeypatch, stage, objective):
    monkeypatch.setattr(masked_loss, "CHUNK", 64 * 8000)
    model = model_of(objective)
    optimizer = AdamWithEma(model.parameters(), lr=1e-2, fused=True)
    engine = initialize(model, optimizer, stage=stage, micro_batch=4, accumulation=2, clip_norm=0.0)
    state = EngineState(engine, optimizer)
    losses = []
    for step in range(3):
        for part in range(2):
            tokens, t, uniforms = (values[4 * part : 4 * part + 4] for values in examples(model, step))
            loss = engine(tokens, t, uniforms)
            engine.backward(loss.optimised.mean())
            engine.step()
            losses.append(loss.bound.mean().item())
    if stage == 3:
        assert model.network.head.weight.numel() == 0  # it was let go after the backward pass
    trained = {name: tensor for name, kind, tensor in state.gather(dict.fromkeys(state.shapes, 0)) if kind == "weights"}

    monkeypatch.setattr("md4.networks.transformer.PLAIN_UP_TO", 8000)
    plain = model_of(objective)
    optimizer = AdamWithEma(plain.parameters(), lr=1e-2, fused=True)
    expected = []
    for step in range(3):
        optimizer.zero_grad()
        for part in range(2):
            loss = plain(*(values[4 * part : 4 * part + 4] for values in examples(plain, step)))
            (loss.optimised.mean() / 2).backward()
            expected.append(loss.bound.mean().item())
        optimizer.step()
    assert losses == pytest.approx(expected, rel=1e-5)
    for name, parameter in plain.named_parameters():
        # Adam divides by the gradient's own size, so that where it is almost zero its rounding errors become steps.
        difference = (trained[name] - parameter.detach()).abs()
        assert difference.mean() < 1e-5, name
