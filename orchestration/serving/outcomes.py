"""Errors of `Models` on their way between processes.

As exceptions they would arrive as Ray's own, with the stack trace of another process in their message, and would be
logged as failures of the replica, which a full queue or a wrong prompt is not.
"""

from dataclasses import dataclass

from md4.errors import UserError
from orchestration.serving.models import Broken, Busy, Lost, UnknownModel

_KINDS = {
    kind.__name__: kind for kind in (Busy, UnknownModel, UserError, Broken, Lost)
}  # the special before the general
ERRORS = (UserError, Broken, Lost)  # and their kinds


@dataclass(frozen=True)
class Refusal:
    """Stands where an answer would."""

    kind: str
    message: str
    retry_after_s: float = 0.0

    @classmethod
    def of(cls, error: UserError | Broken | Lost) -> "Refusal":
        kind = next(name for name, kind in _KINDS.items() if isinstance(error, kind))
        return cls(kind, str(error), getattr(error, "retry_after_s", 0.0))

    def error(self) -> UserError | Broken | Lost:
        """The error that it was."""
        if self.kind == Busy.__name__:
            return Busy(self.message, self.retry_after_s)
        return _KINDS[self.kind](self.message)  # type: ignore[call-arg]
