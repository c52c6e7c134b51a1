"""Trials in order, and which of their differences are more than noise."""

import math
from dataclasses import dataclass

from orchestration.search.study import Record, Round, Study

SIGNIFICANT = 2.0  # standard errors of a difference


@dataclass(frozen=True)
class Ranked:
    """A trial in its place."""

    place: int  # from 1
    record: Record
    rounds: list[Round]
    tokens: int  # that its last figure was taken after
    bits: float | None
    error: float | None
    behind: float | None  # the best trial, in bits per token; None where they are not to be compared
    behind_error: float | None

    @property
    def significant(self) -> bool | None:
        """Is it worse than the best one by more than noise? None: it has no figure of the same budget."""
        if self.behind is None or self.behind_error is None:
            return None
        return self.behind > SIGNIFICANT * self.behind_error

    @property
    def state(self) -> str:
        """finished, stopped, failed."""
        return self.record.ended.how if self.record.ended else "interrupted"


def difference(one: float, one_error: float, other: float, other_error: float) -> tuple[float, float]:
    """Of two figures, and its standard error, as if their evaluations were independent.

    All trials are evaluated on the same rows with the same draws, so that their errors go together and the true one is
    smaller: what is significant here is so by a margin.
    """
    return one - other, math.hypot(one_error, other_error)


def rank(study: Study) -> list[Ranked]:
    """Those that finished by their bound; then those that were stopped, by how far they came, then by their bound; then
    those that failed, or whose bound is no finite number."""
    found: list[tuple[Record, list[Round]]] = []
    for trial in study.trials:
        if (record := trial.record()) is not None:
            found.append((record, trial.rounds()))

    def key(one: tuple[Record, list[Round]]) -> tuple:
        record, rounds = one
        how = record.ended.how if record.ended else "failed"
        order = ("finished", "stopped", "failed").index(how)
        last = rounds[-1] if rounds else None
        finite = last is not None and math.isfinite(last.bits)
        if not finite:
            order = 2
        return order, -(last.number if last else 0), last.bits if last and finite else math.inf, record.number

    found.sort(key=key)
    best = found[0][1][-1] if found and found[0][1] else None
    ranked = []
    for place, (record, rounds) in enumerate(found, start=1):
        last = rounds[-1] if rounds else None
        behind = behind_error = None
        if last is not None and best is not None and last.number == best.number and place > 1:
            behind, behind_error = difference(last.bits, last.error, best.bits, best.error)
        if behind is not None and not math.isfinite(behind):
            behind = behind_error = None
        figures = (last.tokens, last.bits, last.error) if last else (0, None, None)
        ranked.append(Ranked(place, record, rounds, *figures, behind, behind_error))
    return ranked
