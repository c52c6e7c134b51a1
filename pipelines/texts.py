"""The documents of a part as they are hashed and encoded: read, cleaned by hooks, normalised for the vocabulary."""

from collections.abc import Sequence
from dataclasses import dataclass

from pipelines import cleaning, sources
from pipelines.cleaning import Hook
from pipelines.config import DataConfig
from pipelines.documents import EXCERPT_CHARS, Rejected
from pipelines.units import Unit


@dataclass(frozen=True)
class Text:
    """A document, cleaned and normalised."""

    number: int  # among all documents that the part has
    name: str
    text: str
    own: str | None  # the split that the source says
    truncated: bool = False


@dataclass(frozen=True)
class Texts:
    """The documents of a part, in its order, and what it had that is none."""

    texts: list[Text]
    rejected: list[Rejected]
    source_sha256: list[str]  # of each unit's bytes


def read_texts(part: Sequence[Unit], config: DataConfig, hooks: Sequence[Hook]) -> Texts:
    """Every document of the units. UserError for units that cannot be read or used, and hooks that fail."""
    words, number = config.tokens, 0
    found = Texts([], [], [])
    for unit in part:
        reading = sources.read(unit, config.text_recipe())
        found.source_sha256.append(reading.sha256)
        found.rejected.extend(reading.rejected)
        for document in reading.documents:
            number += 1
            text, by = cleaning.cleaned(document.text, hooks, document.name)
            excerpt = document.text[:EXCERPT_CHARS]
            if text is None:
                found.rejected.append(Rejected(document.name, "cleaned away", f"by {by}", excerpt))
                continue
            text = words.normalise(text)
            whole = len(text)
            if config.max_chars is not None:
                text = truncated(text, config.max_chars)
            if text and _is_unicode(text):
                found.texts.append(Text(number - 1, document.name, text, unit.split, len(text) < whole))
            elif text:
                detail = "it has half of a surrogate pair"
                found.rejected.append(Rejected(document.name, "not Unicode", detail, excerpt))
            else:
                detail = "nothing is left of it in the vocabulary" if document.text else "it has no characters"
                found.rejected.append(Rejected(document.name, "empty", detail, excerpt))
    return found


def _is_unicode(text: str) -> bool:
    """Can the text be encoded at all? JSON can hold what cannot."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def truncated(text: str, most: int) -> str:
    """The beginning of a text, at most `most` characters, that ends with a word if it has one."""
    if len(text) <= most:
        return text
    end = text.rfind(" ", 0, most + 1)
    return text[: end if end > 0 else most]
