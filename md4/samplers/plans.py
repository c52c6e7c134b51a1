"""Plans that are known before the first network call, because reveal times don't depend on tokens.

Shapes: B rows, T tokens of a row.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from md4.samplers.rows import KNOWN, Rows
from md4.samplers.sampler import Ask, Sampler, Seen, Sight

NEVER = torch.iinfo(torch.int64).max


@dataclass
class Plan:
    """Position (b, p) is revealed in event `event[b, p]`, at which the network is shown `time[b, p]`.

    A row's events happen in rising order, and only those that reveal something exist: a step in which nothing happens
    costs nothing. Rows are independent: each has its own events and times.
    """

    event: Tensor  # [B, T] int64, KNOWN where the token stands from the start
    time: Tensor  # [B, T] float64, the same for all positions of one event

    def bounded(self, least: int | None, most: int | None, block: Tensor) -> "Plan":
        """With at least `least` reveals an event (but for the last) and at most `most`, in the same order.

        Events that are too small are put together and shown the time of the first; those that are too large are cut.
        block: `[B, T]`, the block of each position: blocks follow each other, and no event is in two of them.
        """
        if least is None and most is None:
            return self
        least, most = least or 1, most or NEVER
        order = torch.where(self.event == KNOWN, NEVER, self.event).argsort(dim=1, stable=True)
        order = order.gather(1, block.gather(1, order).argsort(dim=1, stable=True))
        # Plain numbers: reading tensors one by one takes ten times as long.
        event, time, blocks = self.event.tolist(), self.time.tolist(), block.tolist()
        for row, places in enumerate(order.tolist()):
            group, size, last, begin = -1, 0, (-1, -1), 0.0
            for place in places:
                here = blocks[row][place], event[row][place]
                if here[1] == KNOWN:
                    continue
                if here[0] != last[0] or size == most or (here != last and size >= least):
                    group, size, begin = group + 1, 0, time[row][place]
                event[row][place], time[row][place] = group, begin
                size, last = size + 1, here
        return Plan(torch.tensor(event).to(self.event), torch.tensor(time, dtype=self.time.dtype).to(self.time))


class Planned(Sampler):
    """Rows with a plan: `begin` of a subclass makes it.

    Rows that are sampled in blocks go through their plan once for each block. The network is then shown the time at
    which as many tokens of its view are masked: the text before a block is known, that behind it is not.
    """

    def planned(self, plan: Plan, greedy: Tensor) -> dict[str, Tensor]:
        """The tensors of a plan; at `greedy` positions [B, T] the most probable token is taken."""
        return {"plan": plan.event, "time": plan.time, "greedy": greedy}

    def next(self, rows: Rows) -> tuple[Tensor, Tensor]:
        """The next event of each row `[B]` and the time `[B]` at which it happens."""
        pending = torch.where(rows.active(self.mask), rows.own["plan"], NEVER)
        event, first = pending.min(dim=1)
        return event, rows.own["time"].gather(1, first[:, None])[:, 0]

    def ask(self, rows: Rows) -> Ask:
        event, time = self.next(rows)
        blocked = rows.block < rows.tokens.shape[1]
        if bool(blocked.any()):
            time = torch.where(blocked, self.time_of_share(rows), time)
        return Ask(time, rows.active(self.mask) & (rows.own["plan"] == event[:, None]))

    def look(self, rows: Rows, sight: Sight) -> dict[str, Tensor]:
        token = self.draw(rows, sight)
        greedy = rows.own["greedy"][sight.row, sight.position]
        if bool(greedy.any()):
            token = torch.where(greedy, sight.logits.argmax(dim=1), token)
        return {"token": token}

    def tell(self, rows: Rows, seen: Seen) -> None:
        self.reveal(rows, seen.row, seen.position, seen.values["token"])
        rows.draws.index_add_(0, seen.row, torch.ones_like(seen.row))
