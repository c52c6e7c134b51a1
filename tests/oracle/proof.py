"""What a proof is, and how its verdict comes about."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from time import perf_counter

import torch
from torch import Tensor

from md4 import noise
from tests.md4.oracle import chi_square

ALPHA = 1e-3
FAST, LONG = 100_000, 1_000_000
MUTANT = 50_000  # samples of one at most: enough to reject it


@dataclass(frozen=True)
class Trial:
    """One experiment: its noise and its size."""

    key: int
    samples: int
    _done: dict[str, Tensor] = field(default_factory=dict, compare=False)

    def row_seeds(self, start: int, stop: int) -> Tensor:
        """Seeds `[stop - start]` of samples start..stop-1."""
        return noise.derive(self.key, torch.arange(start, stop))

    def derived(self, word: str) -> "Trial":
        """Another one with noise of its own."""
        return Trial(noise.key(self.key, word), self.samples)

    def of_mutant(self, name: str) -> "Trial":
        """Another one with noise of its own, and no larger than it takes."""
        return Trial(noise.key(self.key, name), min(self.samples, MUTANT))

    def once(self, name: str, make: Callable[["Trial"], Tensor]) -> Tensor:
        """make(self), made once: what several tests look at."""
        if name not in self._done:
            self._done[name] = make(self)
        return self._done[name]


PValue = Callable[[Trial], float]


@dataclass(frozen=True)
class Proof:
    """A claim and the mutants of what it is about. Each gives the probability of as bad a result if the claim is true.

    What has no chance in it gives 1 where the claim holds and 0 where it doesn't.
    """

    name: str
    claim: PValue
    mutants: Mapping[str, PValue]
    share: float = 1.0  # of the usual number of samples
    most: int | None = None  # samples, for what gains nothing by more

    def trial(self, seed: int, samples: int) -> Trial:
        count = int(samples * self.share)
        return Trial(noise.key(seed, self.name), count if self.most is None else min(count, self.most))


def law_proof(
    name: str,
    draw: Callable[[Trial], Tensor],
    law: Callable[[], Tensor],
    mutants: Mapping[str, Callable[[Trial], Tensor]],
    other_laws: Mapping[str, Callable[[], Tensor]] | None = None,
    share: float = 1.0,
) -> Proof:
    """The counts that `draw` gives follow `law`; those of the mutants don't, nor do its own follow the other laws."""

    law = cache(law)

    def against(law: Callable[[], Tensor]) -> PValue:
        return lambda trial: chi_square(trial.once("claim", draw), law())

    def mutant(name: str, draw: Callable[[Trial], Tensor]) -> PValue:
        return lambda trial: chi_square(draw(trial.of_mutant(name)), law())

    rejected = {other: mutant(other, wrong) for other, wrong in mutants.items()}
    rejected |= {other: against(wrong) for other, wrong in (other_laws or {}).items()}
    return Proof(name, against(law), rejected, share)


@dataclass
class Result:
    """What a proof came to."""

    name: str
    samples: int
    key: int
    p: float
    mutants: dict[str, float]
    seconds: float
    repeated: float | None = None  # p of the repetition
    believed: bool = True  # the claim
    level: float = ALPHA  # mutants are rejected below it
    error: str = ""  # what broke the proof off

    @property
    def missed(self) -> list[str]:
        """Mutants that were not rejected."""
        return [name for name, p in self.mutants.items() if not p < self.level]

    @property
    def passed(self) -> bool:
        return self.believed and not self.missed and not self.error

    def __str__(self) -> str:
        if self.error:
            return f"FAIL  {self.name}  broken off: {self.error}"
        claim = f"p = {self.p:.2g}" + ("" if self.repeated is None else f", again with 4x samples {self.repeated:.2g}")
        worst = max(self.mutants, key=lambda name: self.mutants[name])
        rejected = f"{len(self.mutants) - len(self.missed)} of {len(self.mutants)} mutants rejected"
        detail = f"{rejected}, {worst}: p = {self.mutants[worst]:.1g}"
        if self.missed:
            detail += f"; NOT REJECTED: {', '.join(self.missed)}"
        outcome = "PASS" if self.passed else "FAIL"
        size = f"{self.samples} samples, key {self.key}, {self.seconds:.1f} s"
        return f"{outcome}  {self.name}  {claim}; {detail}  ({size})"


def examine(proof: Proof, seed: int, samples: int, level: float = ALPHA) -> Result:
    """Claim and mutants of one proof; the verdict is yet to come."""
    began = perf_counter()
    trial = proof.trial(seed, samples)
    p, mutants, error = 1.0, {}, ""
    try:
        p = proof.claim(trial)
        mutants = {name: test(trial) for name, test in proof.mutants.items()}
    except Exception as broken:  # one bad proof must not hide the verdict on the others
        error = f"{type(broken).__name__}: {' '.join(str(broken).split())}"
    return Result(proof.name, trial.samples, trial.key, p, mutants, perf_counter() - began, level=level, error=error)


def holm(p_values: Sequence[float], alpha: float) -> list[bool]:
    """Which of the hypotheses are rejected when all of them together may be wrongly so with probability alpha."""
    rejected = [False] * len(p_values)
    for rank, index in enumerate(sorted(range(len(p_values)), key=lambda i: p_values[i])):
        if not p_values[index] < alpha / (len(p_values) - rank):
            break
        rejected[index] = True
    return rejected


def repeat(proofs: Mapping[str, Proof], results: Sequence[Result], seed: int, samples: int) -> None:
    """Verdicts of the long form: Holm, and those that fail are repeated once with 4 times the samples."""
    suspects = [r for r, no in zip(results, holm([r.p for r in results], ALPHA), strict=True) if no]
    p_values = []
    for result in suspects:
        proof = proofs[result.name]
        result.repeated = proof.claim(proof.trial(noise.key(seed, "again"), 4 * samples))
        p_values.append(result.repeated)
    for result, no in zip(suspects, holm(p_values, ALPHA), strict=True):
        result.believed = not no
