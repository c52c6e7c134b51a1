"""What became better or worse from one evaluation to the next: by statistics, not by eye.

Each figure of an evaluation is compared with the best of the earlier ones that were measured alike (one that is neither
better low nor high: with the one before). The difference over its standard error, row by row where the rows are the
same, has a t distribution if nothing has changed. The best of k earlier figures is the best partly by luck, so that its
p-value is multiplied by k; and as one evaluation has many figures, Holm's rule decides which of them stand out. Hence
the false-alarm rate: of an evaluation of a model that is no worse than before, in any of its figures, the chance that
any of them is called worse is at most `alpha` (1 % unless said otherwise).

Evaluations of versions in the registry, of steps of a run and of weights that have neither are sequences of their own:
a version is neither before nor after a step. Within each the order is that of versions, or of steps; the newest one is
nevertheless that which was measured last, be it of an earlier step: of a training that was begun anew.
"""

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Literal

from scipy import special

from md4.errors import UserError
from orchestration import results
from orchestration.results import Contributions, Difference, Result
from pipelines.storage import Place

ALPHA = 0.01
Kind = Literal["first", "unjudged", "same", "better", "worse", "changed"]
Rows = Callable[[str], dict[str, Contributions]]  # by the id of an evaluation


@dataclass(frozen=True)
class Verdict:
    """A figure beside what came before it."""

    result: Result
    kind: Kind  # unjudged: no standard error is known
    reference: Result | None = None  # that it was compared with
    difference: Difference | None = None
    p: float | None = None  # of so large a step to the worse (of figures that are neither: to any side), times k


@dataclass(frozen=True)
class Evaluation:
    """The figures of one evaluation, judged."""

    verdicts: tuple[Verdict, ...]

    @property
    def first(self) -> Result:
        """Any figure of it: for what they have in common."""
        return self.verdicts[0].result

    def of(self, kind: Kind) -> list[Verdict]:
        return [one for one in self.verdicts if one.kind == kind]

    @property
    def axis(self) -> str:
        """What orders it among others: versions, steps or times."""
        return "versions" if self.first.version is not None else "times" if self.first.step is None else "steps"

    @property
    def place(self) -> str:
        """Where on the way it stands: version, step or day."""
        one = self.first
        if one.version is not None:
            return f"version {one.version}"
        return f"step {one.step:,}" if one.step is not None else f"{one.created:%Y-%m-%d %H:%M}"


def models(table: Place, suite: str | None = None) -> list[str]:
    """Those that have results, of that suite if one is named; UserError if there are none."""
    found = sorted({one.model for one in results.read(table, suite=suite)})
    if found:
        return found
    known = sorted({one.suite for one in results.read(table)})
    if not known:
        raise UserError(f"there are no results in {table}: md4 evaluate RUN --suite FILE puts them there")
    raise UserError(f"there are no results of a suite {suite!r} in {table}; there are those of {', '.join(known)}")


def read(table: Place, model: str, suite: str | None = None, alpha: float = ALPHA) -> dict[str, list[Evaluation]]:
    """The evaluations of a model in a table, judged, by suite; UserError if there are none.

    Where those of one suite are several sequences, the key says which: "nightly, versions" and "nightly, steps".
    """
    found = results.read(table, model=model)
    if not found:
        known = ", ".join(models(table))
        raise UserError(f"there are no results of model {model!r} in {table}; there are those of {known}")
    wanted = [one for one in found if suite in (None, one.suite)]
    if not wanted:
        known = ", ".join(sorted({one.suite for one in found}))
        raise UserError(
            f"there are no results of model {model!r} of a suite {suite!r} in {table}; its suites are {known}"
        )
    sequences = defaultdict(list)
    for one in wanted:
        sequences[one.suite, Evaluation((Verdict(one, "first"),)).axis].append(one)
    suites = [name for name, _ in sequences]
    rows = cache(lambda attempt: results.contributions(table, attempt))
    return {
        name if suites.count(name) == 1 else f"{name}, {axis}": judge(ones, rows, alpha)
        for (name, axis), ones in sequences.items()
    }


def newest(judged: Sequence[Evaluation]) -> Evaluation:
    """The one that was measured last, wherever it stands in their order."""
    return max(reversed(judged), key=lambda one: one.first.created)


def judge(found: Iterable[Result], rows: Rows | None = None, alpha: float = ALPHA) -> list[Evaluation]:
    """The evaluations of one sequence (see above) in their order, each judged by those before it.

    rows: what single rows contributed; without it, no difference is taken row by row.
    """
    if not 0 < alpha < 1:
        raise UserError(f"alpha is {alpha}; it must lie between 0 and 1")
    earlier: dict[tuple, list[Result]] = defaultdict(list)
    judged = []
    for figures in _in_order(found):
        compared = [_compared(one, earlier[one.series], rows) for one in figures]
        judged.append(Evaluation(tuple(_decided(compared, alpha))))
        for one in figures:
            earlier[one.series].append(one)
    return judged


def holm(p: Sequence[float], alpha: float) -> list[bool]:
    """Which hypotheses are rejected, so that the chance to reject any true one is at most alpha (Holm 1979)."""
    rejected = [False] * len(p)
    for rank, place in enumerate(sorted(range(len(p)), key=lambda place: p[place])):
        if p[place] > alpha / (len(p) - rank):
            break
        rejected[place] = True
    return rejected


def _in_order(found: Iterable[Result]) -> list[list[Result]]:
    """Figures by evaluation; of weights that were measured again in the same way, the last."""
    attempts: dict[str, list[Result]] = defaultdict(list)
    for one in found:
        attempts[one.attempt].append(one)
    newest: dict[tuple, list[Result]] = {}
    for figures in sorted(attempts.values(), key=lambda ones: ones[0].created):
        one = figures[0]
        newest[one.version, one.step, one.weights_hash, frozenset(one.series for one in figures)] = figures
    return sorted(newest.values(), key=lambda ones: (ones[0].version or 0, ones[0].step or 0, ones[0].created))


def _compared(one: Result, earlier: list[Result], rows: Rows | None) -> Verdict:
    """The figure with its difference; of p-values that for a step to the worse, of which `_decided` makes a verdict."""
    if not earlier:
        return Verdict(one, "first")
    reference = earlier[-1]
    if one.better != "neither":
        best = min if one.better == "lower" else max
        reference = best(earlier, key=lambda other: other.value)
    try:
        kept = None if rows is None else [rows(side.attempt).get(one.metric) for side in (one, reference)]
        difference = results.difference(one, reference, kept)
    except UserError:
        return Verdict(one, "unjudged", reference)
    if one.better == "neither":
        return Verdict(one, "same", reference, difference, min(1.0, 2 * _tail(abs(difference.z), difference)))
    worse = difference.z if one.better == "lower" else -difference.z
    return Verdict(one, "same", reference, difference, min(1.0, len(earlier) * _tail(worse, difference)))


def _decided(compared: list[Verdict], alpha: float) -> list[Verdict]:
    """Verdicts by Holm's rule: steps to the worse, or to any side, as one family; steps to the better as another."""
    tested = [i for i, one in enumerate(compared) if one.p is not None]
    downs = holm([compared[i].p or 0.0 for i in tested], alpha)
    up = [i for i in tested if compared[i].result.better != "neither"]
    ups = holm([_better(compared[i]) for i in up], alpha)
    kinds: dict[int, Kind] = {i: "better" for i, rejected in zip(up, ups, strict=True) if rejected}
    for i, rejected in zip(tested, downs, strict=True):
        if rejected:
            kinds[i] = "changed" if compared[i].result.better == "neither" else "worse"
    return [
        Verdict(one.result, kinds.get(i, one.kind), one.reference, one.difference, one.p)
        for i, one in enumerate(compared)
    ]


def _better(one: Verdict) -> float:
    """p-value of a step to the better from the best one so far."""
    assert one.difference is not None
    z = one.difference.z
    return _tail(-z if one.result.better == "lower" else z, one.difference)


def _tail(z: float, difference: Difference) -> float:
    """The chance of more than `z` standard errors, if nothing has changed."""
    if math.isinf(z):
        return 0.0 if z > 0 else 1.0
    return float(special.ndtr(-z) if math.isinf(difference.freedom) else special.stdtr(difference.freedom, -z))
