"""Uneven shares: the same number of passes of the same size on every worker, and the gradient of the global batch."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from md4.documents import no_padding
from md4.genmd4 import GenMD4
from md4.objectives import MD4, bits_per_token
from md4.schedules import parse_schedule
from orchestration.passes import Passes
from pipelines.order import share

BATCH, SLICES, LENGTH, V = 12, 6, 8, 11


@given(st.integers(1, 40), st.integers(1, 40), st.integers(1, 6), st.data())
def test_every_row_counts_once_and_all_workers_make_the_same_passes(slices, world, m, data):
    world = min(world, slices)
    places = Passes(slices * m, slices, world).places
    size = data.draw(st.integers(1, places + 1))
    passes = Passes(slices * m, slices, world, size)
    counted = 0
    for rank in range(world):
        first, last = share(rank, world, slices)
        parts = list(passes.parts((last - first) * m))
        assert [len(part) for part, _ in parts] == [size] * passes.count
        real = torch.cat([part[:count] for part, count in parts])
        assert real.tolist() == list(range((last - first) * m))
        counted += len(real)
    assert counted == slices * m


class Small(torch.nn.Module):
    """Logits `[B, L, V]` that depend on all of z and on t."""

    def __init__(self):
        super().__init__()
        self.embed = torch.nn.Embedding(V + 1, 4)
        self.inside = torch.nn.Linear(4 * LENGTH + 1, 16)
        self.outside = torch.nn.Linear(16, LENGTH * V)

    def forward(self, z: torch.Tensor, t: torch.Tensor, labels: None) -> torch.Tensor:
        x = torch.cat([self.embed(z).flatten(1), t[:, None]], dim=1)
        return self.outside(torch.tanh(self.inside(x))).unflatten(1, (LENGTH, V))


@pytest.mark.parametrize("objective", [lambda: MD4(Small(), parse_schedule("linear"), V), lambda: GenMD4(Small(), V)])
def test_the_gradient_is_that_of_the_global_batch_on_any_number_of_workers(objective):
    """float64: the engine's mean over workers and passes of what `loss` gives, against the mean over all rows."""
    torch.manual_seed(0)
    model = objective().double()
    tokens = torch.randint(0, V, (BATCH, LENGTH), generator=torch.Generator().manual_seed(0))
    drawn = model.noise(3, 5, torch.arange(BATCH), BATCH, SLICES, LENGTH)

    def gradient(of: torch.Tensor) -> torch.Tensor:
        return torch.cat([g.flatten() for g in torch.autograd.grad(of, list(model.parameters()))])

    def bits(rows: torch.Tensor) -> torch.Tensor:
        loss = model(tokens[rows], **{name: values[rows] for name, values in drawn.items()})
        return bits_per_token(loss.optimised, LENGTH)

    whole = gradient(bits(torch.arange(BATCH)).mean())
    assert whole.dtype == torch.float64
    for world, size in [(1, 4), (2, None), (3, 2), (4, None), (4, 1), (5, 2), (6, None)]:
        passes = Passes(BATCH, SLICES, world, size)
        total = torch.zeros_like(whole)
        for rank in range(world):
            first, last = share(rank, world, SLICES)
            for part, real in passes.parts((last - first) * 2):
                total += gradient(passes.loss(bits(first * 2 + part), real))
        mean = total / (world * passes.count)
        assert (mean - whole).norm() <= 1e-12 * whole.norm()


@pytest.mark.parametrize("objective", [lambda: MD4(Small(), parse_schedule("linear"), V), lambda: GenMD4(Small(), V)])
def test_padded_rows_count_by_their_tokens_on_any_number_of_workers(objective):
    """The gradient of all bits of the global batch over all its real tokens, whoever has the long rows."""
    torch.manual_seed(0)
    model = objective().double()
    tokens = torch.randint(1, V, (BATCH, LENGTH), generator=torch.Generator().manual_seed(0))
    for row in range(BATCH):
        tokens[row, row % LENGTH :] = 0  # 1 to 8 tokens, the long rows not evenly spread
    real = no_padding(tokens, 0)
    assert real.sum(1).tolist() == [row % LENGTH + 1 for row in range(BATCH)]
    drawn = model.noise(3, 5, torch.arange(BATCH), BATCH, SLICES, LENGTH)

    def gradient(of: torch.Tensor) -> torch.Tensor:
        return torch.cat([g.flatten() for g in torch.autograd.grad(of, list(model.parameters()))])

    def nats(rows: torch.Tensor) -> torch.Tensor:
        return model(tokens[rows], **{name: values[rows] for name, values in drawn.items()}, real=real[rows]).optimised

    whole = gradient(nats(torch.arange(BATCH)).sum() / (real.sum().double() * math.log(2)))
    for world, size in [(1, 4), (2, None), (3, 2), (4, None), (5, 2), (6, None)]:
        passes = Passes(BATCH, SLICES, world, size)
        shares = [share(rank, world, SLICES) for rank in range(world)]
        counts = [real[first * 2 : last * 2].sum() for first, last in shares]
        of_a_row = torch.stack(counts).sum().double() / BATCH  # what the workers sum up, see `_tokens_of_a_row`
        total = torch.zeros_like(whole)
        for first, last in shares:
            for part, counted in passes.parts((last - first) * 2):
                total += gradient(passes.loss(bits_per_token(nats(first * 2 + part), of_a_row), counted))
        assert (total / (world * passes.count) - whole).norm() <= 1e-12 * whole.norm()
