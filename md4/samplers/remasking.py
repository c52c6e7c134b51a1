"""ReMDM: ancestral sampling in which tokens are masked again (arXiv 2503.00307).

In a step from t to s < t a token that was revealed is masked again with probability sigma, and a masked one is
revealed with probability

    (alpha_s - (1 - sigma) alpha_t) / (1 - alpha_t) = (M_t - M_s + sigma alpha_t) / M_t,    M = 1 - alpha,

which leaves the share of masked tokens at every time as it is without remasking. With
sigma_max = min(1, M_s / alpha_t), the largest sigma for which that is possible:

    cap      sigma = min(eta, sigma_max)
    rescale  sigma = eta sigma_max
    conf     sigma = eta sigma_max w, w the softmax of -psi over the row's revealed tokens, psi the probability that
             the token had when it was revealed; masked ones are revealed as if sigma were 0 (the paper's definition;
             the share of masked tokens is then somewhat larger)
    loop     as cap while the clock runs from loop[0] to loop[1], with alpha held constant; before and after it
             sigma = 0. There time runs faster than the clock, by the factor 1 / (1 - loop[0] + loop[1]), so that it
             comes from 1 to 0 all the same: alpha is held where time is loop[1] times that factor. With the paper's
             0.55 and 0.05 that is 0.1, which is its alpha_on = 0.9 with the linear schedule.

psi is the model's own probability at the row's temperature, before top-k and top-p cut. Steps follow the clock's grid;
a step belongs to the loop if it begins there. What is masked after the last step, a share eps of all, is drawn
independently from one call at t = 0. Given tokens are never masked.

Shapes: B rows, T tokens of a row, S steps.
"""

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from md4 import noise
from md4.objectives import MD4
from md4.samplers.draws import log_weights
from md4.samplers.grids import times_of
from md4.samplers.rows import Rows
from md4.samplers.sampler import Ask, Sampler, Seen, Sight
from md4.samplers.settings import SamplingConfig

if TYPE_CHECKING:
    from md4.schedules import Schedule


class Steps(NamedTuple):
    """The steps of resolved settings, and behind them the one that reveals all at t = 0; float64 `[S + 1]` each."""

    time: Tensor  # at which a step begins
    sigma: Tensor  # probability that a revealed token is masked again; for conf, that of all of them together
    reveal: Tensor  # probability that a masked one is revealed


def remasking_steps(schedule: "Schedule", settings: SamplingConfig) -> Steps:
    """The steps along the grid of resolved settings."""
    clock = times_of(settings)
    assert settings.eta is not None
    time, again = clock, torch.ones(len(clock) - 1, dtype=torch.bool)
    if settings.remask == "loop":
        assert settings.loop is not None
        begin, end = settings.loop
        rate = 1 / (1 - begin + end)
        time = torch.where(clock > begin, 1 - (1 - clock) * rate, clock.clamp(max=end) * rate)
        again = (clock[:-1] <= begin) & (clock[:-1] > end)
    alpha, masked = schedule.alpha(time[:-1]), schedule.masked(time)
    largest = (masked[1:] / alpha).clamp(max=1)
    sigma = largest.clamp(max=settings.eta) if settings.remask in ("cap", "loop") else settings.eta * largest
    sigma = torch.where(again, sigma, 0.0)
    returns = 0.0 if settings.remask == "conf" else sigma * alpha
    reveal = ((masked[:-1] - masked[1:] + returns) / masked[:-1]).clamp(max=1)
    end_of_all = torch.ones(1, dtype=torch.float64)
    return Steps(time, torch.cat([sigma, 0 * end_of_all]), torch.cat([reveal, end_of_all]))


class ReMDM(Sampler):
    """Rows that walk along their steps: one coin a step and position says whether it is revealed or masked again.

    The coins don't depend on tokens (but for conf, and then on remembered probabilities alone): a step that reveals
    nothing needs no network call.
    """

    revises = True

    def begin(self, rows: Rows, settings: SamplingConfig) -> dict[str, Tensor]:
        assert isinstance(self.model, MD4)
        device, count = rows.tokens.device, len(rows)
        steps = remasking_steps(self.model.schedule, settings)
        last = torch.full((count,), len(steps.time) - 1, device=device)
        own = {name: table.to(device).repeat(count, 1) for name, table in steps._asdict().items()}
        return own | {
            "last": last,
            "step": torch.where(rows.unknown.any(dim=1), 0, last),
            "conf": torch.full((count,), settings.remask == "conf", device=device),
            "psi": torch.zeros(rows.tokens.shape, dtype=torch.float64, device=device),
        }

    def ask(self, rows: Rows) -> Ask:
        own = rows.own
        while True:
            reveals, hides = self._moves(rows)
            idle = (own["step"] < own["last"]) & ~reveals.any(dim=1)
            if not bool(idle.any()):
                return Ask(own["time"].gather(1, own["step"][:, None])[:, 0], reveals)
            self.hide(rows, hides & idle[:, None])
            own["step"] = own["step"] + idle

    def look(self, rows: Rows, sight: Sight) -> dict[str, Tensor]:
        token = self.draw(rows, sight)
        if not bool(rows.own["conf"].any()):
            return {"token": token}
        probability = log_weights(sight.logits, rows.temperature[sight.row]).softmax(dim=1)
        return {"token": token, "psi": probability.gather(1, token[:, None])[:, 0]}

    def tell(self, rows: Rows, seen: Seen) -> None:
        own = rows.own
        reveals, hides = self._moves(rows)
        asked = reveals.any(dim=1)
        self.hide(rows, hides & asked[:, None])
        self.reveal(rows, seen.row, seen.position, seen.values["token"])
        if "psi" in seen.values:
            own["psi"][seen.row, seen.position] = seen.values["psi"]
        rows.draws.index_add_(0, seen.row, torch.ones_like(seen.row))
        own["step"] = torch.minimum(own["step"] + asked, own["last"])

    def finished(self, rows: Rows) -> Tensor:
        return (rows.own["step"] == rows.own["last"]) & ~(rows.tokens == self.mask).any(dim=1)

    def _moves(self, rows: Rows) -> tuple[Tensor, Tensor]:
        """Positions `[B, T]` (bool) that the present step reveals, and those that it masks again."""
        own, masked = rows.own, rows.tokens == self.mask
        step = own["step"][:, None]
        keys = noise.derive(noise.derive(rows.key, "remask")[:, None], step)
        coin = noise.uniform(keys, torch.arange(masked.shape[1], device=masked.device))
        revealed = rows.unknown & ~masked
        sigma = own["sigma"].gather(1, step)
        if bool(own["conf"].any()):
            # NaN where nothing is revealed, of which nothing is masked again either.
            weight = torch.where(revealed, -own["psi"], -torch.inf).softmax(dim=1)
            sigma = torch.where(own["conf"][:, None], sigma * weight, sigma)
        return masked & (coin < own["reveal"].gather(1, step)), revealed & (coin < sigma)
