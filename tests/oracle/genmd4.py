"""GenMD4: true posteriors depend on the time, and so does the rate at which each token is revealed."""

from functools import partial

import torch
from torch import Tensor

from md4.objectives import MaskedDiffusion
from md4.samplers import SamplingConfig
from md4.samplers.grids import time_grid
from md4.samplers.race import Frozen, LatentRace
from md4.samplers.rows import Rows
from md4.samplers.sampler import Seen
from md4.samplers.thinning import Thinning
from tests.md4.genmd4_oracle import PowerToy, kolmogorov
from tests.oracle.laws import continuous_law
from tests.oracle.proof import Proof, Trial, law_proof
from tests.oracle.sampling import Draws

TOY = PowerToy(length=4)
EQUAL = PowerToy((1.0, 1.0, 1.0), length=4)
HOLES = [TOY.mask, 1, TOY.mask, TOY.mask]


class Credulous(Thinning):
    """Mutant: every candidate is accepted, so powers don't matter."""

    def __init__(self, model: MaskedDiffusion) -> None:
        super().__init__(model)
        self.powers = torch.full_like(self.powers, float(self.most))


class BackInTime(Thinning):
    """Mutant: after a rejection a row goes on from the time before."""

    def tell(self, rows: Rows, seen: Seen) -> None:
        clock, rejected = rows.own["clock"].clone(), rows.own["rejected"].clone()
        super().tell(rows, seen)
        rows.own["clock"] = torch.where(rows.own["rejected"] > rejected, clock, rows.own["clock"])


class Remembering(Thinning):
    """The sampler itself, which also keeps the time of the first reveal, `first` [B] on the clock r = -ln t."""

    counts = (*Thinning.counts, "first")

    def begin(self, rows: Rows, settings: SamplingConfig) -> dict[str, Tensor]:
        return super().begin(rows, settings) | {"first": torch.full_like(rows.temperature, -1.0)}

    def tell(self, rows: Rows, seen: Seen) -> None:
        super().tell(rows, seen)
        now = (rows.own["first"] < 0) & (rows.event >= 0).any(dim=1)
        rows.own["first"] = torch.where(now, rows.own["clock"], rows.own["first"])


class CredulousRemembering(Remembering, Credulous):
    """Mutant, see Credulous."""


def _draws(toy: PowerToy, sampler: str, kind: str = "exact", canvas: list[int] | None = None, **settings) -> Draws:
    start = torch.full((toy.length,), toy.mask) if canvas is None else torch.tensor(canvas)
    return Draws(toy.model(kind), SamplingConfig(sampler=sampler, **settings), start)


def _first_event(sampler: type[Thinning], trial: Trial) -> float:
    tokens = _draws(TOY, "thinning").but(sampler=sampler)
    first = torch.exp(-tokens.samples(trial, "first"))
    return kolmogorov(first, TOY.first_event(first))


def proofs() -> list[Proof]:
    thinning = _draws(TOY, "thinning")
    faults = {
        "frozen": thinning.but(sampler=Frozen),
        "latent race": thinning.but(sampler=LatentRace),
    }
    found = [
        law_proof(
            "thinning samples the law of the true posterior",
            thinning,
            lambda: TOY.law,
            faults | {"accepts all": thinning.but(sampler=Credulous), "back in time": thinning.but(sampler=BackInTime)},
        ),
        law_proof(
            "adaptive thinning samples the law of the true posterior",
            _draws(TOY, "adaptive_thinning"),
            lambda: TOY.law,
            faults,
        ),
        law_proof(
            "thinning fills holes from the law given what is known",
            _draws(TOY, "thinning", canvas=HOLES),
            partial(TOY.given, torch.tensor(HOLES)),
            {"frozen": _draws(TOY, "frozen", canvas=HOLES)},
        ),
        Proof(
            "the first reveal of thinning comes at its time",
            partial(_first_event, Remembering),
            {"accepts all": lambda trial: _first_event(CredulousRemembering, trial.of_mutant("accepts all"))},
        ),
    ]
    for sampler in ("frozen", "thinning"):
        draw = _draws(TOY, sampler, "still")
        found.append(
            law_proof(
                f"{sampler} follows the law of a network without time",
                draw,
                TOY.jumps_law,
                {"accepts all": draw.but(sampler=Credulous), "latent race": draw.but(sampler=LatentRace)},
            )
        )
    for kind, steps, grid in (("exact", 4, "uniform"), ("exact", 8, "cosine"), ("timed", 16, "uniform")):
        draw = _draws(TOY, "ancestral", kind, steps=steps, grid=grid)
        found.append(
            law_proof(
                f"ancestral GenMD4 follows its law of {steps} steps, {grid} grid, {kind} network",
                draw,
                partial(TOY.steps_law, time_grid(grid, steps), kind),
                {"half the steps": draw.set(steps=steps // 2), "thinning": _draws(TOY, "thinning", kind)},
                {"the toy's own law": lambda: TOY.law},
            )
        )
    bent = partial(continuous_law, EQUAL, "linear", 1e-12, lambda t: EQUAL.mu(t, timed=True))
    draw = _draws(EQUAL, "thinning", "timed")
    found.append(
        law_proof(
            "thinning at equal powers is first hitting, with a network that sees the time",
            draw,
            bent,
            {"frozen": draw.but(sampler=Frozen)},
        )
    )
    return found
