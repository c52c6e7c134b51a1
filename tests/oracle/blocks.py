"""Bounds on reveals, blocks, windows, and known tokens.

An order that does not depend on tokens leaves the model's law exact, as long as the tokens come one at a time.
"""

from functools import partial

import torch

from md4.samplers.grids import time_grid
from tests.md4.oracle import Toy
from tests.oracle.first_hitting import TOY, BlindToTheLast, ConstantTime, StaleTimes, in_continuous_time
from tests.oracle.laws import conditional, parallel_law, window_law
from tests.oracle.proof import Proof, law_proof
from tests.oracle.sampling import draws_of
from tests.oracle.toys import Blindfold

PAIR = Toy(vocabulary=3, length=2)
HOLES = [TOY.mask, 1, TOY.mask, TOY.mask]


def _orders() -> list[Proof]:
    found = []
    one = draws_of(TOY, "ancestral", steps=2, max_reveals=1)
    found.append(
        law_proof(
            "ancestral with one reveal a call samples the model's law",
            one,
            lambda: TOY.law,
            {"two": one.set(max_reveals=2)},
        )
    )
    two = draws_of(TOY, min_reveals=2)
    found.append(
        law_proof(
            "first hitting with at least two reveals a call is that with two calls",
            two,
            partial(parallel_law, TOY, (2, 2)),
            {"at least three": two.set(min_reveals=3), "one": two.set(min_reveals=None)},
        )
    )
    both = draws_of(TOY, min_reveals=3, max_reveals=3)
    found.append(
        law_proof(
            "three reveals a call, then what is left",
            both,
            partial(parallel_law, TOY, (3, 1)),
            {"the two halves": both.set(min_reveals=2, max_reveals=2)},
        )
    )
    for size in (1, 2, 3):
        block = draws_of(TOY, block=size)
        found.append(
            law_proof(
                f"first hitting in blocks of {size} samples the model's law",
                block,
                lambda: TOY.law,
                {
                    "two calls": block.set(steps=2, block=2),
                    "blind to the last token": block.but(sampler=BlindToTheLast),
                },
            )
        )
    return found


def _windows() -> Proof:
    mask = PAIR.mask
    draw = draws_of(PAIR, canvas=[mask] * 4, block=1).but(window=2)
    blind = draws_of(PAIR, canvas=[mask] * 4, block=1).but(window=2)
    blind.model.network = Blindfold(blind.model.network, 0, mask)
    return law_proof(
        "a text longer than the window is written from what the window shows",
        draw,
        partial(window_law, PAIR, 4),
        {"the window's first token is hidden": blind},
    )


def _holes() -> list[Proof]:
    found = []
    start = torch.tensor(HOLES)
    for schedule in ("linear", "cosine"):
        draw, blind = (draws_of(TOY, schedule=schedule, canvas=HOLES) for _ in range(2))
        blind.model.network = Blindfold(blind.model.network, 1, TOY.mask)
        found.append(
            law_proof(
                f"holes are filled from the law given what is known, {schedule}",
                draw,
                partial(conditional, TOY, start),
                {"one call": draw.set(steps=1), "blind to what is known": blind},
            )
        )
    draw = draws_of(TOY, timed=True, canvas=HOLES)
    found.append(
        law_proof(
            "the clock of holes starts at 1 and counts them alone",
            draw,
            partial(in_continuous_time, "linear", 1e-4, start),
            {
                "time of the reveal before": draw.but(sampler=StaleTimes),
                "constant time": draw.but(sampler=ConstantTime),
            },
        )
    )
    draw = draws_of(TOY, "ancestral", timed=True, canvas=HOLES, steps=3, grid="uniform")
    found.append(
        law_proof(
            "ancestral fills holes by its law of 3 steps",
            draw,
            partial(TOY.ancestral_law, "linear", 1e-4, time_grid("uniform", 3), True, start),
            {"a step less": draw.set(steps=2)},
            {"the law without steps": partial(in_continuous_time, "linear", 1e-4, start)},
        )
    )
    return found


def proofs() -> list[Proof]:
    return [*_orders(), _windows(), *_holes()]
