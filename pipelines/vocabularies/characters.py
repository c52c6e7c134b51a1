"""The 27 symbols of text8."""

import re
import string
import unicodedata
from collections.abc import Iterable

import numpy as np

from md4.errors import UserError
from pipelines.vocabularies.words import HOLE, expanded, known

# Latin letters that Unicode does not decompose into an ASCII letter and accents.
_LETTERS = str.maketrans(
    {
        "ß": "ss", "ẞ": "ss", "æ": "ae", "Æ": "ae", "œ": "oe", "Œ": "oe", "ø": "o", "Ø": "o", "đ": "d", "Đ": "d",
        "ð": "d", "Ð": "d", "þ": "th", "Þ": "th", "ł": "l", "Ł": "l", "ħ": "h", "Ħ": "h", "ŋ": "ng", "Ŋ": "ng",
        "\N{LATIN SMALL LETTER DOTLESS I}": "i",
    }
)  # fmt: skip
_NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
_DIGITS = str.maketrans({str(digit): f" {number} " for digit, number in enumerate(_NUMBERS)})
_ACCENTS = re.compile("[\u0300-\u036f]+")  # combining marks, as NFKD leaves them behind their letters
_OTHERS = re.compile("[^a-z]+")


class Characters:
    """The 27 symbols of text8: `a..z` are the tokens 0..25, the space is 26."""

    name = "text8"
    symbols = string.ascii_lowercase + " "
    size = len(symbols)
    end_of_text: int | None = None  # a space stands between two documents
    digest = ""

    _TOKENS = np.full(128, 255, np.uint8)  # ASCII code -> token
    _TOKENS[np.frombuffer(symbols.encode(), np.uint8)] = np.arange(size)
    _SYMBOLS = np.frombuffer((symbols + HOLE).encode(), np.uint8)  # id -> ASCII code

    def normalise(self, text: str) -> str:
        """The rules of text8's makers: lower case, digits spelled out, everything that is not a letter a single space.

        Accents are folded ("é" -> "e", "ß" -> "ss") rather than dropped. No space at either end; may be empty.
        """
        if not text.isascii():
            text = _ACCENTS.sub("", unicodedata.normalize("NFKD", text.translate(_LETTERS)))
        return _OTHERS.sub(" ", text.lower().translate(_DIGITS)).strip()

    def encode(self, text: str) -> np.ndarray:
        """Tokens `[len(text)]` uint8; UserError for a character that is not one of the 27."""
        self._check(text, self.symbols, "text")
        return self._TOKENS[np.frombuffer(text.encode(), np.uint8)]

    def encode_documents(self, documents: Iterable[str]) -> list[np.ndarray]:
        """Tokens of normalised documents, each with a space behind it."""
        return [self.encode(f"{document} ") for document in documents]

    def encode_prompt(self, text: str) -> np.ndarray:
        """Ids `[n]` int64 of a prompt in which `_` is a hole to fill, and `_{12}` twelve of them.

        Capitals are taken as small letters.
        """
        text = expanded(text)
        # Capitals outside ASCII stay as they are: lower-casing may change the length and so the positions we report.
        text = "".join(char.lower() if char in string.ascii_uppercase else char for char in text)
        self._check(text, self.symbols + HOLE, "prompt")
        codes = np.frombuffer(text.encode(), np.uint8)
        return np.where(codes == ord(HOLE), self.size, self._TOKENS[codes]).astype(np.int64)

    def decode(self, tokens: np.ndarray) -> str:
        """Text of ids `[n]`; ValueError if one is outside `0..27`."""
        return self._SYMBOLS[known(tokens, self.size)].tobytes().decode()

    def _check(self, text: str, allowed: str, what: str) -> None:
        for position, char in enumerate(text) if not set(text) <= set(allowed) else ():
            if char not in allowed:
                holes = f" and {HOLE!r} for a hole" if HOLE in allowed else ""
                raise UserError(
                    f"{what}: character {char!r} at position {position} is not in the vocabulary {self.name!r}; "
                    f"allowed are a-z, the space{holes}"
                )
