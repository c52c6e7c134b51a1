"""First hitting: the continuous-time limit of ancestral sampling without a time grid (arXiv 2409.02908).

The rate at which a position is revealed, summed over tokens, does not depend on the network. So the hitting times of
all positions are independent and can be drawn at once: M at position p is (1 - eps) U_p, and the times are the inverse
of the masked share, the largest M first. Exact for any network, the time-conditioned ones included, with one network
call a token. With fewer calls (`steps`), each reveals the next positions of the order from one prediction:

    parallel      all from P_j, the prediction at the state and time of the call's first reveal
    extrapolated  from max(0, (1 + r) P_j - r P_{j-1}), r = (t_j - tau) / (t_{j-1} - t_j) but at most 1
    corrected     after the next call, token i again from (1 - l) P_j + l G, with the same random number,
                  l = (t_j - tau) / (t_j - t_{j+1}), G the next call's prediction at the then visible position

The last two are heuristics against the dependence between tokens that are revealed together. G asks the network for
something that MD4's loss does not train, the prediction at a visible position: off unless asked for. The tokens of the
last call are not corrected, for that would be one call more.

Shapes: B rows, T tokens, N positions, V tokens of the vocabulary, W the most positions of one call.
"""

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from md4 import noise
from md4.objectives import MD4
from md4.samplers.draws import categorical, filtered, log_weights
from md4.samplers.plans import NEVER, Plan, Planned
from md4.samplers.rows import KNOWN, Rows
from md4.samplers.sampler import Ask, Seen, Sight
from md4.samplers.settings import SamplingConfig

if TYPE_CHECKING:
    from md4.schedules import Schedule

_GAP = 1e-12  # calls closer in time than this are not extrapolated from


def first_hitting_plan(
    schedule: "Schedule", unknown: Tensor, keys: Tensor, settings: SamplingConfig, block: Tensor | None = None
) -> tuple[Plan, Tensor]:
    """The order and hitting times of all unknown positions, and who is left over.

    unknown: `[B, T]` bool; keys: the rows' noise streams `[B]`; block: `[B, T]`, the block of each position, if blocks
    are filled one after the other: they share the calls by their sizes. Returns the plan, in which an event is a call,
    and the times `[B, T]` of the single positions (tau), 0 for those that no time above 0 reveals. These leftovers are
    revealed in their order at t = 0 (`exact`), or all together in a last event of their own.
    """
    positions = torch.arange(unknown.shape[1], device=unknown.device)
    level = schedule.masked(1.0) * noise.uniform(noise.derive(keys, "reveal")[:, None], positions)
    together = unknown & (level < schedule.masked(0.0)) & (settings.leftovers != "exact")
    # Levels lie within (0, 1): later blocks come behind all of an earlier one.
    late = level if block is None else level - 2 * block
    late = torch.where(unknown & ~together, late, -torch.inf)
    rank = late.argsort(dim=1, descending=True, stable=True).argsort(dim=1)
    count = (unknown & ~together).sum(dim=1, keepdim=True)
    calls = count if settings.steps is None else count.clamp(max=settings.steps)
    # The reveals are shared out evenly: call j covers the ranks from about j n / K on.
    event = torch.where(together, calls, rank * calls // count.clamp(min=1)).where(unknown, 0)
    tau = torch.where(unknown, schedule.inverse_masked(level), 0.0)
    time = torch.zeros_like(tau).scatter_reduce(1, event, tau, "amax").gather(1, event)
    return Plan(torch.where(unknown, event, KNOWN), time), tau


class FirstHitting(Planned):
    """Rows that follow `first_hitting_plan`, all reveals of a call from one prediction."""

    def begin(self, rows: Rows, settings: SamplingConfig) -> dict[str, Tensor]:
        return self._begin(rows, settings)[0]

    def _begin(self, rows: Rows, settings: SamplingConfig) -> tuple[dict[str, Tensor], Tensor]:
        assert isinstance(self.model, MD4)
        plan, tau = first_hitting_plan(self.model.schedule, rows.unknown, rows.key, settings, rows.block_index())
        greedy = rows.unknown & (tau == 0) & (settings.leftovers == "argmax")
        plan = plan.bounded(settings.min_reveals, settings.max_reveals, rows.block_index())
        return self.planned(plan, greedy), tau


class RefinedFirstHitting(FirstHitting):
    """Rows with `extrapolate` or `correct`: they remember what they need of two calls, 3 x W x V float32 numbers."""

    revises = True

    def begin(self, rows: Rows, settings: SamplingConfig) -> dict[str, Tensor]:
        own, tau = self._begin(rows, settings)
        # The place of a position among those of its event, and the most that one has.
        order = torch.where(rows.unknown, own["plan"], NEVER).argsort(dim=1, stable=True)
        ordered = own["plan"].gather(1, order)
        index = torch.arange(ordered.shape[1], device=order.device).expand_as(order)
        changes = ordered[:, 1:] != ordered[:, :-1]
        begins = torch.cat([torch.zeros_like(index[:, :1]), torch.where(changes, index[:, 1:], 0)], dim=1)
        slot = torch.zeros_like(order).scatter(1, order, index - begins.cummax(dim=1).values)
        width = int(torch.where(rows.unknown, slot, 0).max()) + 1

        def every(value: object) -> Tensor:
            return torch.full((len(rows),), bool(value), device=tau.device)

        memory = torch.zeros(len(rows), width, 3, self.mask, dtype=torch.float32, device=tau.device)
        return own | {
            "tau": tau,
            "slot": slot,
            "memory": memory,
            "extrapolate": every(settings.extrapolate),
            "correct": every(settings.correct),
        }

    def ask(self, rows: Rows) -> Ask:
        event, time = self.next(rows)
        plan, now = rows.own["plan"], event[:, None]
        wanted = plan == now
        wanted |= (plan == now + 1) & rows.own["extrapolate"][:, None]
        wanted |= (plan == now - 1) & rows.own["correct"][:, None]
        return Ask(time, wanted & rows.unknown & ~self.finished(rows)[:, None])

    def look(self, rows: Rows, sight: Sight) -> dict[str, Tensor]:
        row, position, logits = sight
        event, time = self.next(rows)
        now, plan = event[row], rows.own["plan"][row, position]
        slot, memory = rows.own["slot"][row, position], rows.own["memory"]
        tau, time = rows.own["tau"][row, position], time[row]
        probability = log_weights(logits, rows.temperature[row]).softmax(dim=1)

        present, ahead, behind = plan == now, plan == now + 1, plan == now - 1
        before = self._time_of(rows, event - 1)[row]
        ratio = ((time - tau) / (before - time).clamp(min=_GAP)).clamp(max=1)
        ratio = torch.where(rows.own["extrapolate"][row] & (before - time >= _GAP), ratio, 0.0)
        reach = torch.where((before - time >= _GAP), (before - tau) / (before - time).clamp(min=_GAP), 0.0)
        earlier = memory[row, slot, plan % 3].double()
        # Present positions move away from the last prediction, those behind part of the way to this one.
        factor = torch.where(present, 1 + ratio, reach)[:, None]
        mixed = (factor * probability + (1 - factor) * earlier).clamp(min=0)
        total = mixed.sum(dim=1, keepdim=True)
        mixed = torch.where(torch.isfinite(total) & (total > 0), mixed / total, probability)

        kept = torch.where(ahead[:, None], probability, mixed).float()
        weights = filtered(mixed.log(), rows.top_p[row], rows.top_k[row])
        call = torch.where(behind, rows.event[row, position], rows.calls[row])
        token = categorical(weights, self.token_keys(rows, row, position, call))
        greedy = rows.own["greedy"][row, position]
        token = torch.where(greedy, logits.argmax(dim=1), token)
        return {"token": torch.where(ahead, self.mask, token), "kept": kept}

    def tell(self, rows: Rows, seen: Seen) -> None:
        token = seen.values["token"]
        event = self.next(rows)[0][seen.row]
        plan = rows.own["plan"][seen.row, seen.position]
        rows.own["memory"][seen.row, rows.own["slot"][seen.row, seen.position], plan % 3] = seen.values["kept"]
        again = plan < event
        rows.tokens[seen.row[again], seen.position[again]] = token[again]
        drawn = plan <= event
        rows.draws.index_add_(0, seen.row[drawn], torch.ones_like(seen.row[drawn]))
        fresh = plan == event
        self.reveal(rows, seen.row[fresh], seen.position[fresh], token[fresh])

    def _time_of(self, rows: Rows, event: Tensor) -> Tensor:
        """Times `[B]` of events [B]; -1 for one that doesn't exist."""
        return torch.where((rows.own["plan"] == event[:, None]) & rows.unknown, rows.own["time"], -1.0).amax(dim=1)
