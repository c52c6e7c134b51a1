"""What all vocabularies have in common: their interface, how holes are written, how tokens are stored."""

import re
from collections.abc import Iterable
from typing import Protocol

import numpy as np

from md4.errors import UserError

HOLE = "_"  # how the mask token is shown in samples and written in prompts; _{12} is a hole of 12 tokens
END_OF_TEXT = "<|endoftext|>"  # how the token behind a document is written where one token is asked for
HOLE_LIMIT = 2**20  # tokens to fill that one prompt may have


class Vocabulary(Protocol):
    """What the pipelines ask of a vocabulary. The mask is not a member: its id is `size`."""

    name: str
    size: int
    end_of_text: int | None  # the token behind a document; None: documents are joined in another way
    digest: str  # sha256 of a vocabulary that was read from a file; "" where the name says it all

    def normalise(self, text: str) -> str:
        """Any text to text that `encode` accepts."""
        ...

    def encode(self, text: str) -> np.ndarray:
        """Normalised text to tokens `[n]` of `token_dtype(size)`."""
        ...

    def encode_documents(self, documents: Iterable[str]) -> list[np.ndarray]:
        """Tokens of normalised documents, each with what separates it from the next one."""
        ...

    def encode_prompt(self, text: str) -> np.ndarray:
        """A prompt with `_` for holes to ids `[n]` int64, a hole being the mask id `size`; `_{12}` is twelve."""
        ...

    def decode(self, tokens: np.ndarray) -> str:
        """Ids `[n]` to text, the mask id shown as `_`."""
        ...


_LONG_HOLE = re.compile(r"(?<!\\)_\{(\d{1,9})\}")


def expanded(prompt: str) -> str:
    """A prompt with `_{n}` written as n holes; UserError for too many."""
    counts = [int(count) for count in _LONG_HOLE.findall(prompt)]
    if 0 in counts or sum(counts) > HOLE_LIMIT:
        raise UserError(f"prompt: its holes have {counts} tokens; each has at least 1, all together {HOLE_LIMIT:,}")
    return _LONG_HOLE.sub(lambda hole: HOLE * int(hole[1]), prompt)


def one_token(words: Vocabulary, text: str) -> int:
    """The token that `text` is; UserError if it is none or several. `<|endoftext|>` is the end of a document."""
    if text == END_OF_TEXT and words.end_of_text is not None:
        return words.end_of_text
    tokens = words.encode(text)
    if len(tokens) != 1:
        raise UserError(f"{text!r} is {len(tokens)} tokens of the vocabulary {words.name!r}, not one")
    return int(tokens[0])


def token_dtype(size: int) -> np.dtype:
    """The smallest of uint8, uint16 and int32 that stores the tokens `0..size-1`."""
    return np.dtype(np.uint8 if size <= 2**8 else np.uint16 if size <= 2**16 else np.int32)


def known(tokens: np.ndarray, mask: int) -> np.ndarray:
    """Ids `[n]` as int64; ValueError if one is outside `0..mask`."""
    tokens = np.asarray(tokens, np.int64)
    if tokens.size and not 0 <= tokens.min() <= tokens.max() <= mask:
        raise ValueError(f"token ids must be in 0..{mask}, got {tokens.min()}..{tokens.max()}")
    return tokens
