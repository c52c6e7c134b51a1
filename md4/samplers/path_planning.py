"""Path planning with the model as its own planner (P2, self-planning, arXiv 2502.03540).

In each of `steps` calls a candidate is drawn for every masked position, and all unknown positions have a score:

    masked    ln p(candidate)
    revealed  eta ln p(present token), p being the prediction at the visible position

The best floor(n i / steps) of the n unknown positions stand after call i, with their candidates where they were masked;
the others are masked (again). Call `steps` reveals all. Scores are at most 0, so a larger eta masks revealed tokens
more readily, and with eta = 0 none is ever masked again: that is confidence of the drawn token, without revision. Of
equal scores a revealed token stands before a candidate, then the left one before the right one.

p is the model's own probability at the row's temperature, before top-k and top-p cut. MD4's loss does not train
predictions at visible positions: how good a planner they make depends on the network. The network is shown the time
at which as large a share of the tokens is masked. Calls that keep nothing, the first ones if there are more calls than
tokens, are not made.
"""

import torch
from torch import Tensor

from md4.samplers.draws import log_weights
from md4.samplers.orders import rounded
from md4.samplers.rows import Rows
from md4.samplers.sampler import Ask, Sampler, Seen, Sight
from md4.samplers.settings import SamplingConfig


class PathPlanning(Sampler):
    """Rows that keep their best positions after each call."""

    revises = True

    def begin(self, rows: Rows, settings: SamplingConfig) -> dict[str, Tensor]:
        assert settings.steps is not None
        unknown = rows.unknown.sum(dim=1)
        steps = torch.full_like(unknown, settings.steps)
        return {
            "steps": steps,
            "step": (steps - 1) // unknown.clamp(min=1),  # done, those that keep nothing
            "eta": torch.full_like(rows.temperature, settings.eta or 0.0),
        }

    def ask(self, rows: Rows) -> Ask:
        wanted = rows.unknown & ~self.finished(rows)[:, None]
        # Without eta the score of a revealed token is known.
        wanted &= (rows.tokens == self.mask) | (rows.own["eta"] > 0)[:, None]
        return Ask(self.time_of_share(rows), wanted)

    def look(self, rows: Rows, sight: Sight) -> dict[str, Tensor]:
        row, position, logits = sight
        token = rows.tokens[row, position]
        masked = token == self.mask
        token[masked] = self.draw(rows, Sight(row[masked], position[masked], logits[masked]))
        chances = log_weights(logits, rows.temperature[row]).log_softmax(dim=1)
        chance = chances.gather(1, token[:, None])[:, 0]
        return {"token": token, "score": rounded(torch.where(masked, 1.0, rows.own["eta"][row]) * chance)}

    def tell(self, rows: Rows, seen: Seen) -> None:
        masked = rows.tokens == self.mask
        active = rows.unknown & ~self.finished(rows)[:, None]
        score = torch.where(active, 0.0, -torch.inf).double()
        score[seen.row, seen.position] = seen.values["score"]
        rows.own["step"] = rows.own["step"] + active.any(dim=1)
        keep = active.sum(dim=1) * rows.own["step"] // rows.own["steps"]

        # Sorted by three keys, the least important one first: position, revealed before masked, score.
        order = torch.where(active, masked.long(), 2).argsort(dim=1, stable=True)
        order = order.gather(1, score.gather(1, order).argsort(dim=1, descending=True, stable=True))
        kept = order.argsort(dim=1) < keep[:, None]
        self.hide(rows, active & ~masked & ~kept)
        drawn = masked[seen.row, seen.position]
        rows.draws.index_add_(0, seen.row[drawn], torch.ones_like(seen.row[drawn]))
        new = drawn & kept[seen.row, seen.position]
        self.reveal(rows, seen.row[new], seen.position[new], seen.values["token"][new])
