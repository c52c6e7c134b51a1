"""Exact sampling of GenMD4 in continuous time: candidates at a rate that is high enough, of which some are rejected.

Plain thinning: a masked position turns into v at the rate p_v mu_pv <= p_max mu_pv on the clock r = -ln t. So
candidates come at the rate n p_max for n masked positions, at a position that is uniform among them, with a token
v ~ mu_p(z, t) of that time; one is accepted with probability p_v / p_max, else the row goes on from the same time.
When and where the next candidate is does not depend on the network: one position's logits are all that a call is asked
for. Exact for any network, the time-conditioned ones included, as the limit of ancestral sampling on ever finer grids.
Expected calls a reveal are at most p_max / p_min.

Adaptive thinning: candidates come at the rate B, and one at time t is accepted with Lambda(t) / B, Lambda the sum of
all hazards p . mu_p; then the position is drawn by its hazard and the token by p_v mu_pv. A true posterior, which is
proportional to p(x) t^S with S the sum of x's powers at masked positions, has Lambda = E[S], which falls on the clock
at the rate Var[S] as long as nothing is revealed. So after a rejection B = min(n p_max, Lambda of that call). A reveal
can raise Lambda even of a true posterior (a token may tell of fast ones elsewhere): after it, B = n p_max again. Other
networks may raise Lambda without a reveal: these violations, in which reveals come too seldom, are counted.
"""

import torch
from torch import Tensor

from md4 import noise
from md4.samplers.hazards import HazardSampler, PowerSampler
from md4.samplers.rows import Rows
from md4.samplers.sampler import Ask, Seen
from md4.samplers.settings import SamplingConfig

_ROUNDING = 1e-6  # of float32 logits: no violation


class Thinning(PowerSampler):
    """Rows with `clock`: the time of the last candidate, accepted or not."""

    counts = ("rejected",)

    def next(self, rows: Rows) -> tuple[Tensor, Tensor]:
        """Each row's next candidate: when, on the clock `[B]`, and where `[B, T]` (bool, one position or none)."""
        masked = rows.active(self.mask)
        count, key = masked.sum(dim=1), self.numbers(rows, "candidate")
        wait = noise.exponential(key, torch.zeros_like(count)) / (count.clamp(min=1) * self.most)
        # The product may round up to the count itself.
        rank = torch.minimum((noise.uniform(key, torch.ones_like(count)) * count).long(), count - 1)
        return rows.own["clock"] + wait, masked & (masked.cumsum(dim=1) == rank[:, None] + 1)

    def ask(self, rows: Rows) -> Ask:
        clock, where = self.next(rows)
        return Ask(self.shown(clock), where)

    def tell(self, rows: Rows, seen: Seen) -> None:
        clock, _ = self.next(rows)
        row, position, token = seen.row, seen.position, seen.values["token"]
        coin = noise.uniform(self.numbers(rows, "accept")[row], torch.zeros_like(row))
        accepted = coin * self.most < self.powers[token]
        rows.own["clock"][row] = clock[row]
        rows.own["rejected"][row] += (~accepted).long()
        rows.draws[row] += 1
        self.reveal(rows, row[accepted], position[accepted], token[accepted])


class AdaptiveThinning(HazardSampler):
    """Rows with `clock` as in `Thinning` and `bound`: Lambda of the last call, inf after a reveal."""

    counts = ("rejected", "violations")

    def begin(self, rows: Rows, settings: SamplingConfig) -> dict[str, Tensor]:
        own = super().begin(rows, settings)
        return own | {"bound": torch.full_like(own["clock"], torch.inf)}

    def next(self, rows: Rows) -> tuple[Tensor, Tensor]:
        """The rate B of each row's candidates `[B]` and when the next one is, on the clock `[B]`."""
        count = rows.active(self.mask).sum(dim=1)
        rate = torch.minimum(count.clamp(min=1) * self.most, rows.own["bound"])
        wait = noise.exponential(self.numbers(rows, "candidate"), torch.zeros_like(count))
        return rate, rows.own["clock"] + wait / rate

    def ask(self, rows: Rows) -> Ask:
        return Ask(self.shown(self.next(rows)[1]), rows.active(self.mask))

    def tell(self, rows: Rows, seen: Seen) -> None:
        rate, clock = self.next(rows)
        winner = self.winner(rows, seen)
        asked, hazard, own = winner.asked, winner.hazard, rows.own
        coin = noise.uniform(self.numbers(rows, "accept"), torch.zeros_like(rows.calls))
        accepted = asked & (coin * rate < hazard)
        own["clock"] = torch.where(asked, clock, own["clock"])
        own["rejected"] += (asked & ~accepted).long()
        own["violations"] += (asked & (hazard > rate * (1 + _ROUNDING))).long()
        own["bound"] = torch.where(asked & ~accepted, hazard, torch.inf)
        rows.draws += asked.long()
        self.reveal_winner(rows, winner, accepted)
