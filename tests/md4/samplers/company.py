"""Rows that differ in everything, and the proof that none of them minds the others; laws by enumeration."""

from itertools import product
from typing import Any

import torch
from torch import Tensor, nn

from md4 import samplers
from md4.model import ModelConfig, build
from md4.networks.transformer import TransformerConfig
from md4.objectives import MD4, MaskedDiffusion
from md4.samplers import Job, SamplingConfig
from md4.schedules import parse_schedule
from tests.md4.oracle import Toy

LENGTH, MASK = 24, 27


def transformer(objective: str = "md4", time_input: bool = True) -> MaskedDiffusion:
    """A small random text network; its head and gates start at zero, so all weights are disturbed."""
    network = TransformerConfig(feature_dim=16, heads=2, layers=2, time_input=time_input)
    config: dict[str, Any] = {"objective": objective, "vocab_size": MASK, "length": LENGTH, "network": network}
    model = build(ModelConfig(**config), seed=3)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.2 * torch.randn(parameter.shape, generator=generator)
    return model


def mixed_jobs(settings: list[dict[str, Any]], count: int = 24) -> list[Job]:
    """Rows of these settings that differ in length, prompt, seed, temperature and truncation."""
    generator = torch.Generator().manual_seed(7)
    jobs = []
    for index in range(count):
        canvas = torch.randint(0, MASK, (1 + index % 3, [LENGTH, 17][index % 5 == 4]), generator=generator)
        hidden = torch.rand(canvas.shape, generator=generator) < [1.0, 0.6, 0.2][index // 2 % 3]
        config = SamplingConfig(
            **settings[index % len(settings)],
            temperature=[1.0, 0.7, 1.3][index % 3],
            top_p=[1.0, 0.9][index // 10 % 2],
            top_k=[None, 9][index // 7 % 2],
        )
        seeds = torch.randint(0, 2**53, (len(canvas),), generator=generator)
        jobs.append(Job(torch.where(hidden, MASK, canvas), seeds, config))
    return jobs


def check_alone_and_together(model: MaskedDiffusion, settings: list[dict[str, Any]], count: int = 16) -> None:
    """Every row gets, bit by bit, the tokens, calls and draws alone that it gets among all; known tokens stand."""
    jobs = mixed_jobs(settings, count)
    alone = [samplers.run(model, [job.part(i, i + 1)])[0] for job in jobs for i in range(len(job))]
    for batch_size in (3, 64):
        together = samplers.run(model, jobs, batch_size=batch_size)
        rows = [row for samples in together for row in samples.tokens.tolist()]
        assert rows == [samples.tokens[0].tolist() for samples in alone]
        for name in ("calls", "row_draws"):
            found = torch.cat([getattr(samples, name) for samples in together])
            assert torch.equal(found, torch.cat([getattr(samples, name) for samples in alone]))
        for job, samples in zip(jobs, together, strict=True):
            known = job.canvas != MASK
            assert torch.equal(samples.tokens[known], job.canvas[known])
            assert (samples.tokens < MASK).all()
            assert torch.equal(samples.event == -1, known)
    assert len({token for samples in alone for token in samples.tokens[0].tolist()}) > MASK // 2


class Recorder(nn.Module):
    """A network, and what it was shown."""

    def __init__(self, network: nn.Module):
        super().__init__()
        self.network = network
        self.seen: list[Tensor] = []
        self.times: list[Tensor] = []

    def forward(self, z: Tensor, t: Tensor, labels: Tensor | None = None) -> Tensor:
        self.seen.append(z.clone())
        self.times.append(t.clone())
        return self.network(z, t, labels)


class _LeaveOneOut(nn.Module):
    def __init__(self, table: Tensor, toy: Toy):
        super().__init__()
        self.table, self.toy = table, toy

    def forward(self, z: Tensor, t: Tensor, labels: Tensor | None = None) -> Tensor:
        return self.table[self.toy.state_index(z)].log().float()


def leave_one_out(toy: Toy) -> tuple[MD4, Tensor]:
    """A network that predicts a visible position from the others, and its table `[S, L, V]`."""
    table = toy.posterior.clone()
    for position in range(toy.length):
        hidden = toy.states.clone()
        hidden[:, position] = toy.mask
        table[:, position] = toy.posterior[toy.state_index(hidden), position]
    return MD4(_LeaveOneOut(table, toy), parse_schedule("linear"), toy.vocabulary), table


def counts(toy: Toy, model: MD4, settings: SamplingConfig, count: int, start: Tensor | None = None) -> Tensor:
    """How often each sequence came, `[X]`, among `count` samples."""
    start = torch.full((toy.length,), toy.mask) if start is None else start
    job = Job(start.expand(count, -1), torch.arange(count), settings)
    (samples,) = samplers.run(model, [job], batch_size=count)
    return torch.bincount(toy.sequence_index(samples.tokens), minlength=len(toy.sequences))


def outcomes(mu: Tensor, positions: list[int]) -> list[tuple[tuple[int, ...], float]]:
    """Every choice of tokens for `positions` drawn independently from mu `[L, V]`, and its probability."""
    found = []
    for tokens in product(range(mu.shape[1]), repeat=len(positions)):
        chance = 1.0
        for position, token in zip(positions, tokens, strict=True):
            chance *= mu[position, token].item()
        found.append((tokens, chance))
    return found
