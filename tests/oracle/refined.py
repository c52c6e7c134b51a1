"""First hitting with fewer calls than tokens: all tokens of a call from one prediction, extrapolated, or corrected.

None of them samples the model's law, so each is held to the law that its definition has, enumerated; where there is
none (more calls, longer sequences) to its distance from the model's. With a call for every token all are plain.
"""

from functools import partial

import torch
from torch import Tensor

from md4 import noise
from md4.samplers.first_hitting import FirstHitting, RefinedFirstHitting
from md4.samplers.rows import Rows
from md4.samplers.settings import SamplingConfig
from tests.oracle.first_hitting import TOY, StaleTimes, in_continuous_time
from tests.oracle.laws import corrected_law, extrapolated_law, parallel_law
from tests.oracle.proof import Proof, Trial, law_proof
from tests.oracle.sampling import Draws, draws_of
from tests.oracle.statistics import below
from tests.oracle.toys import Chain

SMALL, LONGER = Chain(vocabulary=2, length=4), Chain(vocabulary=2, length=6)
NO_LEFTOVERS = 1e-12


class FreshNoise(RefinedFirstHitting):
    """Mutant: what is corrected is drawn again with other random numbers."""

    def token_keys(self, rows: Rows, row: Tensor, position: Tensor, call: Tensor | None = None) -> Tensor:
        keys = super().token_keys(rows, row, position, call)
        again = rows.event[row, position] >= 0
        return torch.where(again, noise.derive(keys, "again"), keys)


class WholeRatio(RefinedFirstHitting):
    """Mutant: every reveal is extrapolated as far as it may be, wherever its own time lies."""

    def begin(self, rows: Rows, settings: SamplingConfig) -> dict[str, Tensor]:
        own = super().begin(rows, settings)
        return own | {"tau": torch.zeros_like(own["tau"])}


class LaterStamp(FirstHitting):
    """Mutant: a call is shown the time of the last reveal of the block before; the first one t = 1."""

    def begin(self, rows: Rows, settings: SamplingConfig) -> dict[str, Tensor]:
        own, tau = self._begin(rows, settings)
        time = torch.ones_like(tau)
        for event in range(1, int(own["plan"].max()) + 1):
            before = torch.where(own["plan"] == event - 1, tau, 2.0).amin(dim=1, keepdim=True)
            time = torch.where(own["plan"] == event, before, time)
        return own | {"time": time}


def _distance(
    name: str, better: Draws, factor: float, worse: Draws, mutants: dict[str, Draws], share: float = 0.5
) -> Proof:
    """The divergence from the law is at most `factor` times that of `worse`."""

    def test(better: Draws, word: str, trial: Trial) -> float:
        counts = better(trial.derived(word))
        return below(counts, factor, trial.once("worse", lambda t: worse(t.derived("worse"))), LONGER.law)

    rejected = {word: partial(test, mutant, word) for word, mutant in mutants.items()}
    return Proof(name, partial(test, better, "better"), rejected, share, most=1_000_000)


def proofs() -> list[Proof]:
    found = []
    plain = draws_of(TOY)
    for sizes in ((4,), (2, 2), (2, 1, 1)):
        draw = plain.set(steps=len(sizes))
        found.append(
            law_proof(
                f"{len(sizes)} parallel calls follow their enumerated law",
                draw,
                partial(parallel_law, TOY, sizes),
                {"a call more": plain.set(steps=len(sizes) + 1)},
                {"the model's own law": lambda: TOY.law},
            )
        )
    timed = draws_of(TOY, timed=True, steps=4)
    found.append(
        law_proof(
            "a parallel call for each token is first hitting",
            timed,
            partial(in_continuous_time, "linear", 1e-4),
            {
                "stamped with the last reveal of the block before": timed.but(sampler=LaterStamp),
                "a call fewer": timed.set(steps=3),
            },
        )
    )
    for name in ("extrapolate", "correct"):
        draw = timed.set(**{name: True})
        found.append(
            law_proof(
                f"{name} with a call for each token is first hitting",
                draw,
                partial(in_continuous_time, "linear", 1e-4),
                {"a call fewer": draw.set(steps=3), "times of the reveal before": timed.but(sampler=StaleTimes)},
            )
        )
    draw = draws_of(Chain(vocabulary=3, length=4), steps=4, correct=True)
    found.append(
        law_proof(
            "correct with a call for each token and leave-one-out predictions samples the model's law",
            draw,
            lambda: Chain(vocabulary=3, length=4).law,
            {"fresh noise": draw.but(sampler=FreshNoise), "a call fewer": draw.set(steps=3)},
        )
    )
    draw = draws_of(SMALL, eps=NO_LEFTOVERS, steps=2, extrapolate=True)
    found.append(
        law_proof(
            "two extrapolated calls follow their enumerated law",
            draw,
            partial(extrapolated_law, SMALL),
            {
                "not extrapolated": draw.set(extrapolate=False),
                "extrapolated as far as can be": draw.but(sampler=WholeRatio),
            },
            {"the model's own law": lambda: SMALL.law},
        )
    )
    draw = draws_of(SMALL, eps=NO_LEFTOVERS, steps=2, correct=True)
    found.append(
        law_proof(
            "two corrected calls follow their enumerated law",
            draw,
            partial(corrected_law, SMALL),
            {"not corrected": draw.set(correct=False), "fresh noise": draw.but(sampler=FreshNoise)},
            {"the model's own law": lambda: SMALL.law},
        )
    )
    half = draws_of(LONGER, steps=3)
    for few, many in ((1, 2), (2, 3), (3, 6)):
        better, worse = draws_of(LONGER, steps=many), draws_of(LONGER, steps=few)
        name = f"the bias of {many} parallel calls for 6 tokens is below a third of that of {few}"
        found.append(_distance(name, better, 1 / 3, worse, {"as many calls": worse}))
    for name, factor in (("extrapolate", 0.4), ("correct", 0.8)):
        better = half.set(**{name: True})
        claim = f"{name}: 3 calls for 6 tokens have less than {factor} times the bias of parallel ones"
        found.append(_distance(claim, better, factor, half, {"parallel ones": half}, share=4))
    return found
