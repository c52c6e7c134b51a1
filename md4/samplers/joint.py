"""Ancestral sampling as older codes do it: whether and what in one float32 draw. To reproduce their tables.

At every step of the grid every masked position draws once from {each token v, rho mu_v; stay masked, 1 - rho}, as the
largest of weight / E with exponentials E = -ln u (the Gumbel trick, ln weight - ln E, without its second logarithm).
In exact arithmetic that is ancestral sampling. In float32 the uniforms u are multiples of 2^-24: no E lies between 0
and 2^-24, small ones are coarse, and a token whose weight is small against 2^-24 hardly ever beats "stay". Positions
are revealed too late, confident ones first, and the tail of the vocabulary is lost, the more so the finer the grid
(arXiv 2409.02908, section 4). With b bits instead of 24 and d = 2^-b,

    P(stay) = d sum_{j=1}^{1/d} prod_v (1 - d floor((1 - exp(-rho mu_v y_j)) / d)),   y_j = -ln(1 - j d) / (1 - rho).

Shapes: B rows, T tokens, N positions, V real tokens.
"""

import torch
from torch import Tensor

from md4 import noise
from md4.objectives import MD4
from md4.samplers.ancestral import reveal_probability
from md4.samplers.draws import categorical
from md4.samplers.grids import times_of
from md4.samplers.rows import Rows
from md4.samplers.sampler import Ask, Sampler, Seen, Sight
from md4.samplers.settings import SamplingConfig

_CHUNK = 1 << 18  # numbers drawn at a time: 2 MB of bits stay in the cache
_LEFTOVERS = ("exact", "independent", "argmax")


def joint_draw(mu: Tensor, rho: Tensor, keys: Tensor, digits: Tensor) -> Tensor:
    """A token or "stay masked" (V) for each position `[N]`, drawn jointly in float32.

    mu: probabilities `[N, V]`; rho: `[N]` float64, of being revealed; keys: `[N]` int64, noise streams, of which number
    v goes to token v and number V to staying; digits: `[N]` int64, bits of the uniforms, 1..24. Of equals the first
    class wins, so that a token wins against staying.
    """
    count, vocabulary = mu.shape
    drawn = torch.empty(count, dtype=torch.int64, device=mu.device)
    index = torch.arange(vocabulary + 1, device=mu.device)
    size = max(1, _CHUNK // vocabulary)
    for start in range(0, count, size):
        part = slice(start, start + size)
        chance = rho[part, None]
        weights = torch.cat([chance * mu[part], 1 - chance], dim=1).float()
        uniform = noise.lattice_uniform(keys[part, None], index, digits[part, None])
        race = weights / uniform.log_().neg_()
        # Where every uniform is 0 all are equal, but for the impossible classes.
        drawn[part] = race.masked_fill_(weights == 0, -1.0).argmax(dim=1)
    return drawn


class JointAncestral(Sampler):
    """Rows of `draws=legacy_fp32_joint`: one network call a step, whether anything is revealed or not.

    What is masked after the last step is drawn as the setting `leftovers` says, with exact draws.
    """

    def begin(self, rows: Rows, settings: SamplingConfig) -> dict[str, Tensor]:
        times, count, device = times_of(settings), len(rows), rows.tokens.device
        assert settings.uniform_bits is not None
        assert settings.leftovers is not None

        def every(value: int) -> Tensor:
            return torch.full((count,), value, device=device)

        return {
            "times": times.to(device).repeat(count, 1),
            "steps": every(len(times) - 1),
            "digits": every(settings.uniform_bits),
            "leftovers": every(_LEFTOVERS.index(settings.leftovers)),
        }

    def ask(self, rows: Rows) -> Ask:
        time, _ = self._step(rows)
        masked = rows.active(self.mask)
        one_by_one = self._ended(rows) & (rows.own["leftovers"] == _LEFTOVERS.index("exact"))
        if bool(one_by_one.any()):
            index = torch.arange(masked.shape[1], device=masked.device)
            order = noise.uniform(noise.derive(rows.key, "leftover")[:, None], index)
            first = torch.where(masked, order, -1.0).argmax(dim=1)
            masked = masked & (~one_by_one[:, None] | (index == first[:, None]))
        return Ask(time, masked)

    def look(self, rows: Rows, sight: Sight) -> dict[str, Tensor]:
        row, position, logits = sight
        weights = self.log_weights(rows, sight)
        keys = noise.derive(noise.derive(noise.derive(rows.key[row], "joint"), rows.calls[row]), position)
        rho = self._step(rows)[1][row]
        token = joint_draw(weights.softmax(dim=1), rho, keys, rows.own["digits"][row])
        ended = self._ended(rows)[row]
        if bool(ended.any()):
            left = categorical(weights[ended], self.token_keys(rows, row[ended], position[ended]))
            greedy = rows.own["leftovers"][row[ended]] == _LEFTOVERS.index("argmax")
            token[ended] = torch.where(greedy, logits[ended].argmax(dim=1), left)
        return {"token": token}

    def tell(self, rows: Rows, seen: Seen) -> None:
        flips = seen.values["token"] != self.mask
        self.reveal(rows, seen.row[flips], seen.position[flips], seen.values["token"][flips])
        rows.draws.index_add_(0, seen.row, torch.ones_like(seen.row))

    def _ended(self, rows: Rows) -> Tensor:
        """Rows `[B]` that have made all their steps: every step is a call, so their number is that of the calls."""
        return rows.calls >= rows.own["steps"]

    def _step(self, rows: Rows) -> tuple[Tensor, Tensor]:
        """The time `[B]` at which each row's next step begins, and its reveal probability `[B]`, 1 after the last."""
        assert isinstance(self.model, MD4)
        times, last = rows.own["times"], rows.own["steps"]
        begin = times.gather(1, torch.minimum(rows.calls, last)[:, None])[:, 0]
        end = times.gather(1, torch.minimum(rows.calls + 1, last)[:, None])[:, 0]
        rho = reveal_probability(self.model.schedule, begin, end)
        return begin, torch.where(self._ended(rows), 1.0, rho)
