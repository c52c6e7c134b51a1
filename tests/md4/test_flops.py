"""Operations counted at the functions that Python calls are those of torch's own counter."""

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from md4.flops import PassFlops
from md4.model import ModelConfig, build
from md4.networks.transformer import TransformerConfig
from md4.networks.unet import UNetConfig
from md4.networks.uvit import UViTConfig

TEXT = TransformerConfig(feature_dim=16, heads=2, layers=2)
CONFIGS = {
    "text": ModelConfig(vocab_size=27, length=16, network=TEXT),
    "genmd4": ModelConfig(objective="genmd4", vocab_size=27, length=16, network=TEXT),
    "unet": ModelConfig(vocab_size=9, length=128, shape=(8, 8, 2), network=UNetConfig(feature_dim=64, layers=1)),
    "uvit": ModelConfig(vocab_size=9, length=128, shape=(8, 8, 2), network=UViTConfig(feature_dim=64)),
}


def count(config: ModelConfig, rows: int) -> tuple[int, PassFlops, float]:
    """Forward operations by torch's counter and by ours, and the hidden positions of the pass."""
    model = build(config)
    tokens = torch.randint(config.vocab_size, (rows, config.length), generator=torch.Generator().manual_seed(1))
    drawn = model.noise(0, 0, torch.arange(rows), rows, 1, config.length)
    theirs, ours = FlopCounterMode(display=False), PassFlops(model.network)
    # Its fused attention on CPUs is a kernel that torch's counter does not know.
    with sdpa_kernel(SDPBackend.MATH), theirs, ours:
        loss = model(tokens, **drawn)
    return theirs.get_total_flops(), ours, float(loss.hidden.sum()) * model.masks_per_example


@pytest.mark.parametrize("name", CONFIGS)
def test_a_pass_costs_what_torch_counts(name):
    theirs, ours, hidden = count(CONFIGS[name], rows=4)
    assert theirs > 10_000
    assert ours.of_training(4, 4, hidden) == 3 * theirs
    assert ours.of_training(4, 40, 10 * hidden) == 30 * theirs


def test_of_a_large_vocabulary_only_hidden_positions_count():
    theirs, ours, hidden = count(ModelConfig(vocab_size=2000, length=64, network=TEXT), rows=4)
    width = TEXT.width
    assert 0 < hidden < 4 * 64
    rounded = -(-hidden // 64) * 64  # what the loss really projects
    assert ours.of_training(4, 4, rounded) == 3 * theirs
    assert ours.of_training(4, 4, 0) == 3 * (theirs - 2 * rounded * width * 2000)
