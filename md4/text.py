"""Text of an exported model's tokens, and back. Training reads text by `pipelines.vocabularies`, with more care."""

import re
from pathlib import Path

from md4.errors import UserError

HOLE = "_"  # how a mask is shown, and written


class Symbols:
    """Each token is a character; the mask follows them."""

    def __init__(self, symbols: str):
        self.symbols = symbols + HOLE

    def encode(self, text: str) -> list[int]:
        """Tokens of a text; UserError for a character that is none of the symbols."""
        for position, char in enumerate(text):
            if char not in self.symbols:
                raise UserError(f"character {char!r} at position {position} is none of {self.symbols!r}")
        return [self.symbols.index(char) for char in text]

    def decode(self, tokens: list[int]) -> str:
        """Text of tokens, masks among them."""
        return "".join(self.symbols[token] for token in tokens)

    def token(self, text: str) -> int | None:
        """The token that is this text; None if there is none."""
        return self.symbols.index(text) if len(text) == 1 and text in self.symbols[:-1] else None


class Pieces:
    """Tokens are pieces of text that a tokenizer.json describes. UserError if `tokenizers` is not installed."""

    def __init__(self, file: Path, vocab_size: int):
        try:
            from tokenizers import Tokenizer
        except ImportError:
            raise UserError("this model's text is made of byte pairs: `pip install tokenizers` to read it") from None
        self._tokenizer = Tokenizer.from_file(str(file))
        self._tokenizer.encode_special_tokens = True  # the letters of a special token are letters
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self.mask = vocab_size

    def encode(self, text: str) -> list[int]:
        """Tokens of a text, `_` being the mask, `\\_` an underscore; what stands between masks is encoded by itself."""
        tokens: list[int] = []
        for number, piece in enumerate(re.split(r"(?<!\\)_", text)):
            plain = piece.replace("\\_", HOLE)
            tokens += [self.mask] * bool(number) + self._tokenizer.encode(plain, add_special_tokens=False).ids
        return tokens

    def decode(self, tokens: list[int]) -> str:
        """Text of tokens, masks among them; bytes that are not UTF-8 become U+FFFD."""
        pieces: list[list[int]] = [[]]
        for token in tokens:
            if token == self.mask:
                pieces.append([])
            else:
                pieces[-1].append(token)
        return HOLE.join(self._tokenizer.decode(piece, skip_special_tokens=False) for piece in pieces)

    def token(self, text: str) -> int | None:
        """The token that is this text, a special one by its name; None if there is none."""
        special = self._tokenizer.token_to_id(text)
        if special is not None:
            return special
        found = self._tokenizer.encode(text, add_special_tokens=False).ids
        return found[0] if len(found) == 1 else None
