"""What the samplers of GenMD4 share: powers, the clock r = -ln t, and a race of the masked positions by their hazards.

GenMD4 hides token v by t^(p_v) (arXiv 2406.04329, section 6). Backwards in time, in r, a masked position p turns into v
at the rate p_v mu_p[v](z, t), so the hazard of a position is p . mu_p: unlike MD4's it depends on the network. Shares
of eps = 1e-4 that are visible at t = 1 cancel. Nothing is masked at t = 0, so there are no leftovers; r stays exact
where t underflows, and the network is shown no time below the model's t1, the earliest that it was trained at.

Shapes: B rows, T tokens of a row, N positions, V real tokens.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from md4 import noise
from md4.genmd4 import GenMD4
from md4.objectives import MaskedDiffusion
from md4.samplers.draws import categorical
from md4.samplers.rows import Rows
from md4.samplers.sampler import Sampler, Seen, Sight
from md4.samplers.settings import SamplingConfig


class PowerSampler(Sampler):
    """Rows of a GenMD4 model. Those with a clock of their own have it in `own["clock"]` [B] float64, 0 at t = 1."""

    def __init__(self, model: MaskedDiffusion) -> None:
        super().__init__(model)
        assert isinstance(model, GenMD4)
        with torch.no_grad():
            self.powers = model.schedule().double()  # [V]
        self.most, self.least = self.powers.max(), self.powers.min()
        self.t1 = model.t1

    def begin(self, rows: Rows, settings: SamplingConfig) -> dict[str, Tensor]:
        clock = torch.zeros_like(rows.temperature)
        return {"clock": clock} | {name: torch.zeros_like(rows.calls) for name in self.counts}

    def shown(self, clock: Tensor) -> Tensor:
        """The times `[B]` that the network is shown at clocks [B]."""
        return torch.exp(-clock).clamp(min=self.t1)

    def numbers(self, rows: Rows, purpose: str) -> Tensor:
        """Noise streams `[B]` of the rows' next calls."""
        return noise.derive(noise.derive(rows.key, purpose), rows.calls)


class Winner(NamedTuple):
    """Who comes first of the masked positions of each row."""

    asked: Tensor  # [B] bool: rows that have any
    wait: Tensor  # [B] float64: until then, on the clock r; inf for rows that have none
    position: Tensor  # [B] int64
    token: Tensor  # [B] int64
    hazard: Tensor  # [B] float64: Lambda, the sum of all hazards


class HazardSampler(PowerSampler):
    """Positions race by exponential waits of rate p . mu_p; the winner's token is drawn by p_v mu_pv.

    The first of independent exponentials comes at the sum of their rates, and is each one by its share of it.
    """

    def look(self, rows: Rows, sight: Sight) -> dict[str, Tensor]:
        row, position, _ = sight
        weights = self.log_weights(rows, sight)
        # Sums go from left to right: their bits don't depend on the number of rows.
        hazard = (weights.softmax(dim=1) * self.powers).cumsum(dim=1)[:, -1]
        wait = noise.exponential(self.numbers(rows, "race")[row], position) / hazard
        # Only who may still win needs a token: the first of each row among these positions.
        first = torch.full_like(rows.temperature, torch.inf).scatter_reduce(0, row, wait, "amin")
        leads = wait == first[row]
        token = torch.full_like(row, self.mask)
        keys = self.token_keys(rows, row[leads], position[leads])
        token[leads] = categorical(weights[leads] + self.powers.log(), keys)
        return {"hazard": hazard, "wait": wait, "token": token}

    def winner(self, rows: Rows, seen: Seen) -> Winner:
        """The first position of each row, of all that were looked at."""
        place = (seen.row, seen.position)
        wait = torch.full_like(rows.tokens, torch.inf, dtype=torch.float64).index_put(place, seen.values["wait"])
        token = torch.full_like(rows.tokens, self.mask).index_put(place, seen.values["token"])
        hazard = torch.zeros_like(wait).index_put(place, seen.values["hazard"]).cumsum(dim=1)[:, -1]
        first, position = wait.min(dim=1)
        return Winner(hazard > 0, first, position, token.gather(1, position[:, None])[:, 0], hazard)

    def reveal_winner(self, rows: Rows, winner: Winner, which: Tensor) -> None:
        """Reveal the first position of the rows `which` [B] (bool)."""
        row = which.nonzero()[:, 0]
        self.reveal(rows, row, winner.position[row], winner.token[row])
