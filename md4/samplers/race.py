"""Samplers of GenMD4 with one network call a reveal. Both take the prediction of the time before the reveal.

Latent race: every masked position draws a token x_p ~ mu_p(z, t) and a wait Exp / p_{x_p} on the clock r = -ln t, that
is a time t u^(1 / p_{x_p}); the first is revealed, the others draw again. This is what time does to a position whose
token is x_p, so it would be exact if positions were independent: an approximation otherwise.

Frozen: the next reveal comes at the rate Lambda(t) of the time before it, t' = t u^(1 / Lambda). Exact for networks
without time input, whose hazards do change at reveals alone. A true posterior of GenMD4 depends on the time: with one
that is learned well, a frozen row is far off (see tests/md4/samplers/test_genmd4_race.py).

Shapes: B rows, T tokens of a row.
"""

import torch
from torch import Tensor

from md4 import noise
from md4.samplers.hazards import HazardSampler, PowerSampler
from md4.samplers.rows import Rows
from md4.samplers.sampler import Ask, Seen


class LatentRace(PowerSampler):
    """Rows with `clock`: the time of the last reveal."""

    def next(self, rows: Rows) -> tuple[Tensor, Tensor]:
        """Exponentials `[B, T]` of the next race, and who may win it `[B, T]` (bool).

        Whatever the tokens are, the wait lies between Exp / p_max and Exp / p_min. Who can't come before the last
        moment of another needs no token, and no logits: about p_max / p_min positions are left to ask for.
        """
        masked = rows.active(self.mask)
        positions = torch.arange(masked.shape[1], device=masked.device)
        exponential = noise.exponential(self.numbers(rows, "race")[:, None], positions)
        first = torch.where(masked, exponential, torch.inf).amin(dim=1, keepdim=True)
        return exponential, masked & (exponential / self.most <= first / self.least)

    def ask(self, rows: Rows) -> Ask:
        return Ask(self.shown(rows.own["clock"]), self.next(rows)[1])

    def tell(self, rows: Rows, seen: Seen) -> None:
        exponential, _ = self.next(rows)
        row, position, token = seen.row, seen.position, seen.values["token"]
        drawn = rows.tokens.index_put((row, position), token)
        wait = torch.full_like(exponential, torch.inf)
        wait[row, position] = exponential[row, position] / self.powers[token]
        first, winner = wait.min(dim=1)
        asked = first < torch.inf
        rows.own["clock"] = torch.where(asked, rows.own["clock"] + first, rows.own["clock"])
        rows.draws.index_add_(0, row, torch.ones_like(row))
        which = asked.nonzero()[:, 0]
        self.reveal(rows, which, winner[which], drawn[which, winner[which]])


class Frozen(HazardSampler):
    """Rows with `clock`: the time of the last reveal."""

    def ask(self, rows: Rows) -> Ask:
        return Ask(self.shown(rows.own["clock"]), rows.active(self.mask))

    def tell(self, rows: Rows, seen: Seen) -> None:
        winner = self.winner(rows, seen)
        clock = rows.own["clock"]
        rows.own["clock"] = torch.where(winner.asked, clock + winner.wait, clock)
        rows.draws += winner.asked.long()
        self.reveal_winner(rows, winner, winner.asked)
