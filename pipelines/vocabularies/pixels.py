"""Brightness levels as a vocabulary."""

import re
from collections.abc import Iterable

import numpy as np

from md4.errors import UserError
from pipelines.vocabularies.words import HOLE, expanded, known


class Pixels:
    """Brightness levels of a picture's channels, `0..levels-1`. There is no text in them."""

    end_of_text: int | None = None
    digest = ""

    def __init__(self, levels: int = 256):
        if not 2 <= levels <= 2**16:
            raise UserError(f"pixels have 2..65536 levels, not {levels}")
        self.size = levels
        self.name = "pixels" if levels == 256 else f"pixels{levels}"

    def normalise(self, text: str) -> str:
        raise self._no_text()

    def encode(self, text: str) -> np.ndarray:
        raise self._no_text()

    def encode_documents(self, documents: Iterable[str]) -> list[np.ndarray]:
        raise self._no_text()

    def encode_prompt(self, text: str) -> np.ndarray:
        """Ids `[n]` int64 of levels as `decode` writes them, with `_` for each that is to be filled: "0 16 _ _ 3"."""
        ids = []
        for position, word in enumerate(expanded(text).replace(HOLE, f" {HOLE} ").split()):
            level = self.size if word == HOLE else int(word) if re.fullmatch("[0-9]{1,5}", word) else -1
            if not 0 <= level <= self.size or (level == self.size and word != HOLE):
                raise UserError(
                    f"prompt: {word!r} at position {position} is no level of the vocabulary {self.name!r}; allowed are "
                    f"0 to {self.size - 1} with spaces between, and {HOLE!r} for a hole"
                )
            ids.append(level)
        return np.array(ids, np.int64)

    def decode(self, tokens: np.ndarray) -> str:
        """The numbers `[n]` with spaces between them, the mask id shown as `_`."""
        return " ".join(HOLE if token == self.size else str(token) for token in known(tokens, self.size).tolist())

    def _no_text(self) -> UserError:
        return UserError(f"the vocabulary {self.name!r} holds brightness levels of pictures: it can't encode text")
