"""A completion as it grows: what of its text is certain, from left to right, while tokens come in any order.

Certain is the text up to the first token that is still hidden, or that is only a part of a character; without what
might be the beginning of a stop string. A sampler that may take back what it revealed leaves nothing certain until the
end.
"""

from collections.abc import Sequence

from orchestration.serving.events import Step
from pipelines.vocabularies.byte_pairs import ENDS

_PART = "\N{REPLACEMENT CHARACTER}"  # an event's word for a part of a character


def cut(text: str, stops: Sequence[str], begin: int = 0) -> tuple[str, bool]:
    """The text before the first stop string that lies behind `begin` characters, and whether there was one."""
    places = [place for stop in stops if (place := text.find(stop, begin)) >= 0]
    return (text[: min(places)], True) if places else (text, False)


def _undecided(text: str, stops: Sequence[str]) -> int:
    """How many of the last characters could be the beginning of a stop string."""
    longest = max((len(stop) - 1 for stop in stops), default=0)
    for size in range(min(longest, len(text)), 0, -1):
        if any(stop.startswith(text[-size:]) for stop in stops):
            return size
    return 0


class Prefix:
    """One completion under way.

    canvas: the words of each token, None where hidden; begin, end: where in it the completion lies; stops: strings
    before which it is cut; echo: what lies before it is told first; revises: whether the sampler may take tokens back.
    """

    def __init__(
        self,
        canvas: Sequence[str | None],
        begin: int,
        end: int,
        stops: Sequence[str],
        *,
        echo: bool = False,
        revises: bool = False,
    ) -> None:
        self.pieces = list(canvas)
        self.begin, self.end = begin, end
        self.stops, self.revises = stops, revises
        self.place = 0 if echo else begin
        self.text = ""  # of the tokens before `place`
        self.echoed = 0  # characters of it that are no completion: stop strings don't count there
        self.sent = 0
        self.stopped = False

    def show(self, step: Step) -> str:
        """What a step makes certain; empty if nothing."""
        for position in step.hidden:
            self.pieces[position] = None
        for position, piece in zip(step.positions, step.pieces or (), strict=True):
            self.pieces[position] = piece
        return self.grown()

    def grown(self) -> str:
        """What has become certain since the last call."""
        if self.revises or self.stopped:
            return ""
        while self.place < self.end:
            piece = self.pieces[self.place]
            # An end of text may be what ends this one: then it is no part of it.
            if piece is None or _PART in piece or piece in ENDS:
                break
            self.text += piece
            self.place += 1
            if self.place <= self.begin:
                self.echoed = len(self.text)
        text, self.stopped = cut(self.text, self.stops, self.echoed)
        certain = len(text) if self.stopped else len(text) - _undecided(text[self.echoed :], self.stops)
        new = text[self.sent : certain]
        self.sent = max(self.sent, certain)
        return new

    def rest(self, completion: str, echoed: int = 0) -> tuple[str, bool]:
        """What is left to tell when all of it is known, and whether a stop string ended it."""
        text, stopped = cut(completion, self.stops, echoed)
        return text[self.sent :], stopped
