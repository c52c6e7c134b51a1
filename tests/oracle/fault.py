"""The float32 fault, on purpose: a joint draw over all tokens and "stay masked" reveals as the lattice formula says."""

from functools import partial

import torch
from torch import Tensor

from md4.samplers import SamplingConfig
from md4.schedules import EPS
from tests.md4.lattice import lattice_flip_probability
from tests.oracle.proof import Proof, Trial, law_proof
from tests.oracle.sampling import Draws
from tests.oracle.toys import Fixed

VOCABULARY, BITS, RHO = 64, 12, 1 / 32
LENGTH = 1024  # tokens of a row, so many that its first step surely reveals some: idle steps have no number
# M falls to (1 - rho) M(1) in the first of two steps.
GRID = (1.0, ((1 - RHO) * (1 - EPS) - EPS) / (1 - 2 * EPS), 0.0)
FLAT = torch.zeros(VOCABULARY)
ZIPF = -torch.arange(1, VOCABULARY + 1).log()


def _flips(logits: Tensor, trial: Trial, **settings) -> Tensor:
    """How many of the trial's positions the first step reveals, and how many it doesn't, `[2]`."""
    model = Fixed(logits).model()
    config = SamplingConfig(sampler="ancestral", grid=GRID, leftovers="independent", **settings)
    rows = Trial(trial.key, -(-trial.samples // LENGTH))
    draws = Draws(model, config, torch.full((LENGTH,), model.mask_id))
    revealed = int((draws.events(rows) == 0).sum())
    return torch.tensor([revealed, rows.samples * LENGTH - revealed])


def _law(logits: Tensor, bits: int) -> Tensor:
    flip = lattice_flip_probability(logits.double().softmax(0), RHO, bits)
    return torch.tensor([flip, 1 - flip])


def proofs() -> list[Proof]:
    """2e5 positions see 5 %, the 2e6 of the long form 1.5 % (false-alarm rate 1e-3)."""
    found = []
    for name, logits in (("flat", FLAT), ("Zipf's", ZIPF)):
        joint = {"draws": "legacy_fp32_joint", "uniform_bits": BITS}
        finer = joint | {"uniform_bits": BITS + 2}
        found.append(
            law_proof(
                f"joint draws of {BITS} bits reveal as the lattice formula says, {name} prediction",
                partial(_flips, logits, **joint),
                partial(_law, logits, BITS),
                {
                    "exact draws": partial(_flips, logits),
                    "2 bits more": partial(_flips, logits, **finer),
                },
                {"what is intended": lambda: torch.tensor([RHO, 1 - RHO])},
                share=2,
            )
        )
        found.append(
            law_proof(
                f"exact draws reveal as intended, {name} prediction",
                partial(_flips, logits),
                lambda: torch.tensor([RHO, 1 - RHO]),
                {f"joint draws of {BITS} bits": partial(_flips, logits, **joint)},
                share=2,
            )
        )
    return found
