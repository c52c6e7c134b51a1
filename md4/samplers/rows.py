"""Rows under way, what is asked for, and what comes out.

Shapes: B rows, T tokens of a row.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, fields

import torch
from torch import Tensor

from md4.errors import UserError
from md4.samplers.settings import SamplingConfig

KNOWN = -1  # the event of a position whose token stands from the start
PENDING = -2  # of one that is still masked


@dataclass
class Rows:
    """The state of some rows of one length and one sampler: one entry of every tensor for each row.

    Nothing of the size of the vocabulary is kept for a row, but for what an extrapolating sampler remembers.
    """

    number: Tensor  # [B] int64: names the row to the caller
    tokens: Tensor  # [B, T] int64: the mask id where still hidden
    event: Tensor  # [B, T] int64: the row's own network call that revealed a position, from 0; or KNOWN, PENDING
    key: Tensor  # [B] int64: the row's noise
    calls: Tensor  # [B] int64: network calls so far
    draws: Tensor  # [B] int64: categorical draws so far
    temperature: Tensor  # [B] float64
    top_p: Tensor  # [B] float64
    top_k: Tensor  # [B] int64: 0 = all tokens
    guidance: Tensor  # [B] float64: 1 = none
    label: Tensor  # [B] int64: class, -1 = no class in particular
    block: Tensor  # [B] int64: tokens of a block; T or more = all at once
    stop: Tensor  # [B] int64: the token that ends a text; -1 = none
    view: Tensor  # [B] int64: tokens that the network sees at once, the same for all rows
    broken: Tensor  # [B] bool: the network's answer was no prediction (NaN); the row stopped there
    own: dict[str, Tensor] = field(default_factory=dict)  # [B, ...]: what the sampler needs beside

    def __len__(self) -> int:
        return self.number.shape[0]

    @property
    def unknown(self) -> Tensor:
        """Positions `[B, T]` that were not given."""
        return self.event != KNOWN

    def active(self, mask_id: int) -> Tensor:
        """Masked positions `[B, T]` of each row's first block that has any."""
        masked = self.tokens == mask_id
        if bool((self.block >= masked.shape[1]).all()):
            return masked
        return masked & (self.block_index() == self._first_block(masked)[:, None])

    def block_index(self) -> Tensor:
        """The block of each position `[B, T]`."""
        return torch.arange(self.tokens.shape[1], device=self.tokens.device) // self.block[:, None]

    def view_start(self, mask_id: int) -> Tensor:
        """The first position `[B]` that the network sees: of long texts, the view ends where the block ends."""
        masked = self.tokens == mask_id
        length = masked.shape[1]
        if bool((self.view >= length).all()):
            return torch.zeros_like(self.view)
        end = ((self._first_block(masked) + 1) * self.block).clamp(max=length)
        return (end - self.view).clamp(min=0)

    def _first_block(self, masked: Tensor) -> Tensor:
        """Each row's first block `[B]` that is not full, or the last one."""
        length = masked.shape[1]
        first = torch.where(masked, self.block_index(), length).amin(dim=1)
        return torch.minimum(first, (length - 1) // self.block)

    def select(self, which: Tensor) -> "Rows":
        """The rows at a bool mask `[B]` or at indices, in that order."""
        shared = {name: getattr(self, name)[which] for name in _SHARED}
        return Rows(**shared, own={name: value[which] for name, value in self.own.items()})

    @staticmethod
    def join(parts: Sequence["Rows"]) -> "Rows":
        """All rows of some parts, one after the other."""
        shared = {name: torch.cat([getattr(part, name) for part in parts]) for name in _SHARED}
        return Rows(**shared, own={name: _cat([part.own[name] for part in parts]) for name in parts[0].own})


_SHARED = [f.name for f in fields(Rows) if f.name != "own"]


def _cat(parts: list[Tensor]) -> Tensor:
    """Tensors one below the other; where their second axes differ they are filled up with zeros."""
    if parts[0].ndim > 1:
        width = max(part.shape[1] for part in parts)
        parts = [
            part
            if part.shape[1] == width
            else torch.cat([part, part.new_zeros(len(part), width - part.shape[1], *part.shape[2:])], dim=1)
            for part in parts
        ]
    return torch.cat(parts)


@dataclass(frozen=True)
class Job:
    """Rows that share their settings."""

    canvas: Tensor  # [B, T] int64: known tokens, the mask id where one is wanted
    seeds: Tensor  # [B] int64: a row's tokens are a function of its canvas, its seed and the settings
    settings: SamplingConfig
    labels: Tensor | None = None  # [B] int64, for class-conditional models
    stop: int | None = None  # a token that ends the text: what follows the first one is not sampled
    window: int | None = None  # tokens that the network can see at once; longer rows need settings.block

    def __post_init__(self) -> None:
        if self.canvas.ndim != 2 or 0 in self.canvas.shape:
            raise UserError(f"a canvas has the shape [rows >= 1, length >= 1], not {list(self.canvas.shape)}")
        length, block = self.canvas.shape[1], self.settings.block
        if self.window is not None and length > self.window and (block is None or block > self.window):
            raise UserError(
                f"rows of {length} tokens are longer than the {self.window} that the network sees at once: they need "
                f"block=N with N of at most {self.window}, which writes them from left to right"
            )
        for name, values in {"seeds": self.seeds, "labels": self.labels}.items():
            if values is not None and values.shape != self.canvas.shape[:1]:
                raise UserError(f"{len(self.canvas)} rows need as many {name}, not the shape {list(values.shape)}")

    def __len__(self) -> int:
        return self.canvas.shape[0]

    def part(self, start: int, stop: int) -> "Job":
        """Rows start..stop-1, as far as there are so many."""
        labels = None if self.labels is None else self.labels[start:stop]
        return Job(self.canvas[start:stop], self.seeds[start:stop], self.settings, labels, self.stop, self.window)


@dataclass(frozen=True)
class Samples:
    """The result of a job, rows in its order."""

    tokens: Tensor  # [B, T] int64; after a stop token nothing but it
    event: Tensor  # [B, T] int64: the row's network call that revealed it, from 0; KNOWN; PENDING after a stop token
    calls: Tensor  # [B] int64: network calls that the row needed
    row_draws: Tensor  # [B] int64: categorical draws of the row
    broken: Tensor  # [B] bool: not sampled to the end, the network's answer was no prediction (NaN)
    settings: SamplingConfig  # resolved
    network_calls: int  # forward passes of the run that this job was part of
    seconds: float  # of that run
    counted: dict[str, Tensor] = field(default_factory=dict)  # [B] each: what the sampler counted beside

    @property
    def mode(self) -> str:
        """How tokens were drawn, see SamplingConfig.mode."""
        return self.settings.mode

    @property
    def draws(self) -> int:
        """Categorical draws made for these rows."""
        return int(self.row_draws.sum())
