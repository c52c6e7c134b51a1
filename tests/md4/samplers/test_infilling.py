"""Known tokens, stop tokens and windows, over every sampler that there is."""

import pytest
import torch
from torch import Tensor

from md4 import samplers
from md4.errors import UserError
from md4.model import ModelConfig, build
from md4.networks.transformer import TransformerConfig
from md4.objectives import MaskedDiffusion
from md4.samplers import Job, SamplingConfig, registry
from md4.samplers.rows import KNOWN

LENGTH, TOKENS = 20, 9
EVERY = sorted(registry._SAMPLERS)
VARIANTS = [{"sampler": "first_hitting", "steps": 5, "extrapolate": True, "correct": True}]


@pytest.fixture(scope="module")
def models() -> dict[str, MaskedDiffusion]:
    """A disturbed transformer of each objective."""
    network = TransformerConfig(feature_dim=16, heads=2, layers=1)
    found = {}
    for objective in ("md4", "genmd4"):
        config = ModelConfig.model_validate(
            {"vocab_size": TOKENS, "length": LENGTH, "network": network, "objective": objective}
        )
        model = build(config, seed=1)
        draw = torch.Generator().manual_seed(2)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter += 0.2 * torch.randn(parameter.shape, generator=draw)
        found[objective] = model.eval()
    return found


def patterns() -> Tensor:
    """Canvases `[7, LENGTH]`: nothing known, all known, both ends, every second, single holes, at random."""
    tokens = torch.randint(0, TOKENS, (7, LENGTH), generator=torch.Generator().manual_seed(4))
    hidden = torch.rand(7, LENGTH, generator=torch.Generator().manual_seed(5)) < 0.5
    index = torch.arange(LENGTH)
    hidden[0], hidden[1], hidden[2], hidden[3] = True, False, (index > 3) & (index < 15), index % 2 == 0
    hidden[4], hidden[5] = index == 0, index == LENGTH - 1
    return torch.where(hidden, TOKENS, tokens)


CASES = [(objective, {"sampler": name}) for objective, name in EVERY] + [("md4", own) for own in VARIANTS]


@pytest.mark.parametrize(("objective", "own"), CASES)
def test_known_tokens_stand_and_holes_are_filled(models, objective, own):
    canvas = patterns()
    job = Job(canvas, torch.arange(len(canvas)), SamplingConfig.model_validate(own))
    (found,) = samplers.run(models[objective], [job], batch_size=3)
    known = canvas != TOKENS
    assert torch.equal(found.tokens[known], canvas[known])
    assert ((found.tokens >= 0) & (found.tokens < TOKENS)).all()
    assert torch.equal(found.event == KNOWN, known)
    assert found.calls[1] == 0
    assert (found.row_draws >= (~known).sum(dim=1)).all()
    assert not found.broken.any()


@pytest.mark.parametrize(("objective", "own"), CASES)
def test_a_text_ends_with_its_stop_token(models, objective, own):
    """Up to it a row is what it would be without; known tokens stand behind it, all else is the stop token."""
    canvas = patterns()[:1].expand(40, -1).clone()
    canvas[:, :5] = canvas[:, 15:] = 6
    canvas[:, 3], canvas[:, 10] = 2, 2  # a stop token that the canvas gives ends nothing
    settings = SamplingConfig.model_validate(own)
    seeds = torch.arange(40)
    (whole,) = samplers.run(models[objective], [Job(canvas, seeds, settings)])
    (cut,) = samplers.run(models[objective], [Job(canvas, seeds, settings, stop=2)])
    unknown = canvas == TOKENS
    ends = (cut.tokens == 2) & unknown
    assert 0 < ends.any(dim=1).sum() < 40  # some came, some did not (greedy orders seldom choose a rare token)
    behind = (ends.cumsum(dim=1) > 0) & unknown
    assert (cut.tokens[behind] == 2).all()
    assert torch.equal(cut.tokens[~unknown], canvas[~unknown])
    before = ends.cumsum(dim=1) == 0
    assert torch.equal(cut.tokens[before], whole.tokens[before])
    assert torch.equal(ends.any(dim=1), ((whole.tokens == 2) & unknown).any(dim=1))
    assert (cut.calls <= whole.calls).all()


@pytest.mark.parametrize("sampler", ["ancestral", "first_hitting"])
def test_a_row_that_ends_early_saves_calls(models, sampler):
    """Written in blocks, a text whose stop token comes early needs few calls."""
    canvas = torch.full((32, LENGTH), TOKENS)
    settings = SamplingConfig.model_validate({"sampler": sampler, "block": 4})
    jobs = [Job(canvas, torch.arange(32), settings, stop=stop) for stop in (None, 5)]
    whole, cut = samplers.run(models["md4"], jobs)
    assert cut.calls.float().mean() < 0.8 * whole.calls.float().mean()


@pytest.mark.parametrize("sampler", ["ancestral", "first_hitting"])
def test_texts_longer_than_the_window(models, sampler):
    """2.5 windows in blocks; known tokens stand wherever they are, and the first window is written as by itself."""
    length = 50
    canvas = torch.full((6, length), TOKENS)
    canvas[:, [0, 21, 49]] = torch.tensor([1, 2, 3])
    settings = SamplingConfig.model_validate({"sampler": sampler, "block": 10})
    (found,) = samplers.run(models["md4"], [Job(canvas, torch.arange(6), settings, window=LENGTH)])
    known = canvas != TOKENS
    assert torch.equal(found.tokens[known], canvas[known])
    assert (found.tokens < TOKENS).all()
    with pytest.raises(UserError, match=r"of 50 tokens are longer than the 20 .* need block=N with N of at most 20"):
        Job(canvas, torch.arange(6), SamplingConfig(), window=LENGTH)
    with pytest.raises(UserError, match="block=N with N of at most 20"):
        Job(canvas, torch.arange(6), SamplingConfig(block=21), window=LENGTH)
