"""What a source of text gives: documents, and what it had to leave out."""

from dataclasses import dataclass, field
from typing import NamedTuple

EXCERPT_CHARS = 200


class Document(NamedTuple):
    """One text, as it came."""

    text: str
    name: str  # where it lies, for messages and reports: "file.txt", "file.jsonl:17"


class Rejected(NamedTuple):
    """A record that gives no document."""

    name: str
    reason: str  # in general, a few words: records are counted by it
    detail: str  # in particular
    excerpt: str = ""  # the record's beginning, at most EXCERPT_CHARS characters


@dataclass(frozen=True)
class Reading:
    """What a unit held, in its order, and a hash of the bytes it came from."""

    documents: list[Document]
    sha256: str
    rejected: list[Rejected] = field(default_factory=list)
