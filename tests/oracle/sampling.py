"""Samplers put to work on toys, and faults put into samplers."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from md4 import samplers
from md4.objectives import MaskedDiffusion
from md4.samplers import Job, SamplingConfig, batch
from md4.samplers.sampler import Sampler
from tests.md4.oracle import Toy
from tests.oracle.proof import Trial

ROWS = 100_000  # under way together


@contextmanager
def replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    """With another attribute of a class or module: how mutants are made."""
    original = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, original)


@dataclass(frozen=True)
class Draws:
    """Samples of a model, all with the same settings."""

    model: MaskedDiffusion
    settings: SamplingConfig
    canvas: Tensor  # [L], the mask id where a token is wanted
    label: int | None = None
    window: int | None = None
    sampler: type[Sampler] | None = None  # a mutant in the place of the settings' own

    def but(self, **changes: Any) -> "Draws":
        return replace(self, **changes)

    def set(self, **changes: Any) -> "Draws":
        """With other settings."""
        return replace(self, settings=self.settings.changed(changes))

    def samples(self, trial: Trial, counted: str | None = None, name: str = "tokens") -> Tensor:
        """What results say of every sample, `[samples, ...]`: an attribute, or something that the sampler counted."""
        mutant = self.sampler
        with nullcontext() if mutant is None else replaced(batch, "sampler_class", lambda *_: mutant):
            parts = []
            for start in range(0, trial.samples, ROWS):
                seeds = trial.row_seeds(start, min(start + ROWS, trial.samples))
                labels = None if self.label is None else torch.full_like(seeds, self.label)
                job = Job(self.canvas.expand(len(seeds), -1), seeds, self.settings, labels, window=self.window)
                (found,) = samplers.run(self.model, [job], batch_size=ROWS)
                parts.append(getattr(found, name) if counted is None else found.counted[counted])
        return torch.cat(parts)

    def events(self, trial: Trial) -> Tensor:
        """The call that revealed each position `[samples, L]`."""
        return self.samples(trial, name="event")

    def __call__(self, trial: Trial) -> Tensor:
        """How often each sequence came `[V^L]`, the first position being the most significant digit."""
        base = self.model.vocab_size
        digits = base ** torch.arange(len(self.canvas) - 1, -1, -1)
        return torch.bincount((self.samples(trial) * digits).sum(dim=1), minlength=base ** len(self.canvas))


def draws_of(
    toy: Toy,
    sampler: str = "first_hitting",
    schedule: str = "linear",
    eps: float = 1e-4,
    timed: bool = False,
    canvas: list[int] | None = None,
    **settings: Any,
) -> Draws:
    """Samples of a toy; by default of a whole sequence."""
    start = torch.full((toy.length,), toy.mask) if canvas is None else torch.tensor(canvas)
    return Draws(toy.model(schedule, eps, timed), SamplingConfig(sampler=sampler, **settings), start)
