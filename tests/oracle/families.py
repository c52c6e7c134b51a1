"""The list of all proofs."""

from tests.oracle import ancestral, blocks, divergence, draws, fault, first_hitting, genmd4, refined, rows, times
from tests.oracle.proof import Proof, Result, examine

# Every family of proofs has a file, and in it a function that lists them.
FAMILIES = (first_hitting, refined, times, ancestral, blocks, draws, fault, rows, divergence, genmd4)


def proofs(words: str = "") -> list[Proof]:
    """All proofs whose names hold `words`."""
    return [proof for family in FAMILIES for proof in family.proofs() if words in proof.name]


def examine_named(name: str, seed: int, samples: int, level: float) -> Result:
    """The result of the proof of that name: proofs themselves don't travel between processes."""
    return examine(next(proof for proof in proofs(name) if proof.name == name), seed, samples, level)
