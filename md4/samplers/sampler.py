"""The interface of all samplers: which positions, when (plan), which tokens (draw), which to mask again (revise).

A sampler holds no state: the rows do, in `Rows` and in the tensors that `begin` adds to them. Before a network call
every row says what it needs of it (`ask`); the logits are made a few positions at a time and read at once (`look`), so
that no tensor [B, T, V] exists; then the rows move on (`tell`).

Shapes: B rows, T tokens of a row, N positions whose logits were asked for, V real tokens.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from md4 import noise
from md4.genmd4 import GenMD4
from md4.objectives import MD4, MaskedDiffusion
from md4.samplers.draws import categorical, filtered, log_weights
from md4.samplers.rows import PENDING, Rows
from md4.samplers.settings import SamplingConfig


@dataclass(frozen=True)
class Ask:
    """What rows need of their next network call."""

    time: Tensor  # [B] float64: the time the network is shown
    wanted: Tensor  # [B, T] bool: the positions whose logits are needed; a row without any makes no call


class Sight(NamedTuple):
    """Logits of some of the positions that were asked for."""

    row: Tensor  # [N] int64
    position: Tensor  # [N] int64
    logits: Tensor  # [N, V] float32, guided; finite or -inf


class Seen(NamedTuple):
    """What `look` took from all positions that were asked for, row by row, positions rising."""

    row: Tensor  # [N] int64
    position: Tensor  # [N] int64
    values: dict[str, Tensor]  # [N, ...] each


class Sampler(ABC):
    """How rows of one kind are sampled.

    Args:
        model: the model; its schedule says when tokens are revealed.
    """

    revises = False  # may a token that was revealed change later?
    counts: tuple[str, ...] = ()  # names of `own` tensors [B] that results tell of

    def __init__(self, model: MaskedDiffusion) -> None:
        self.model = model
        self.mask = model.mask_id

    @abstractmethod
    def begin(self, rows: Rows, settings: SamplingConfig) -> dict[str, Tensor]:
        """The tensors `[B, ...]` that rows of these (resolved) settings need beside the common ones."""

    @abstractmethod
    def ask(self, rows: Rows) -> Ask:
        """What each row needs next. May move rows over steps in which the network is not needed."""

    def look(self, rows: Rows, sight: Sight) -> dict[str, Tensor]:
        """What is kept of each position `[N, ...]`; by default a `token` drawn from the row's distribution."""
        return {"token": self.draw(rows, sight)}

    @abstractmethod
    def tell(self, rows: Rows, seen: Seen) -> None:
        """Move every row that asked for something on by this network call."""

    def finished(self, rows: Rows) -> Tensor:
        """Rows `[B]` (bool) that need nothing more."""
        return ~(rows.tokens == self.mask).any(dim=1)

    # --- what samplers share ---

    def log_weights(self, rows: Rows, sight: Sight) -> Tensor:
        """Unnormalised log-probabilities `[N, V]` float64 at each row's temperature, then top-k, then top-p."""
        row = sight.row
        return filtered(log_weights(sight.logits, rows.temperature[row]), rows.top_p[row], rows.top_k[row])

    def draw(self, rows: Rows, sight: Sight) -> Tensor:
        """Tokens `[N]`, one for each position, by the noise of (row, the row's call, position)."""
        return categorical(self.log_weights(rows, sight), self.token_keys(rows, sight.row, sight.position))

    def token_keys(self, rows: Rows, row: Tensor, position: Tensor, call: Tensor | None = None) -> Tensor:
        """Noise streams `[N]` for the tokens at these places in the rows' own `call` [N], by default their next."""
        call = rows.calls[row] if call is None else call
        return noise.derive(noise.derive(noise.derive(rows.key[row], "token"), call), position)

    def reveal(self, rows: Rows, row: Tensor, position: Tensor, token: Tensor) -> None:
        """Put tokens `[N]` where they belong, as revealed by each row's present call."""
        rows.tokens[row, position] = token
        rows.event[row, position] = rows.calls[row]

    def hide(self, rows: Rows, which: Tensor) -> None:
        """Mask the positions `[B, T]` (bool) again."""
        rows.tokens[which] = self.mask
        rows.event[which] = PENDING

    def time_of_share(self, rows: Rows) -> Tensor:
        """Times `[B]` at which as large a share would be masked as is, for samplers that have no clock of their own.

        The share is that of the unknown positions, so that the time starts at 1 and falls to 0 (as it does when
        holes are filled by a sampler with a clock); of rows sampled in blocks it is that of all positions in view.
        """
        masked = rows.tokens == self.mask
        length = masked.shape[1]
        share = masked.sum(dim=1) / rows.unknown.sum(dim=1).clamp(min=1)
        blocked = rows.block < length
        if bool(blocked.any()):
            index, start = torch.arange(length, device=masked.device), rows.view_start(self.mask)[:, None]
            inside = (index >= start) & (index < start + rows.view[:, None])
            share = torch.where(blocked, (masked & inside).sum(dim=1) / rows.view, share)
        return self.time_of(share.double())

    def time_of(self, share: Tensor) -> Tensor:
        """The time `[...]` at which a `share` [...] (float64) of the tokens is masked; of GenMD4, at power 1."""
        if isinstance(self.model, GenMD4):
            return share.clamp(min=self.model.t1)
        assert isinstance(self.model, MD4)
        return self.model.schedule.inverse_masked(share)
