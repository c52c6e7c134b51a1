"""Vocabularies: between the characters of a document and the tokens `0..V-1` that the model sees (contract C1)."""

import difflib
import os
import re
import string
import unicodedata
from collections.abc import Iterable
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np

from md4.errors import UserError

if TYPE_CHECKING:
    from tokenizers import Tokenizer

HOLE = "_"  # how the mask token is shown in samples and written in prompts; _{12} is a hole of 12 tokens
END_OF_TEXT = "<|endoftext|>"  # how GPT-2's token behind a document is written where one token is asked for
HOLE_LIMIT = 2**20  # tokens to fill that one prompt may have
GPT2_FILES = "MD4_GPT2"  # environment variable: where GPT-2's vocabulary is, a folder or a name on the hub
GPT2_HUB = "openai-community/gpt2"  # used where the variable is not set


class Vocabulary(Protocol):
    """What the pipelines ask of a vocabulary. The mask is not a member: its id is `size`."""

    name: str
    size: int
    end_of_text: int | None  # the token behind a document; None: documents are joined in another way

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


def _expanded(prompt: str) -> str:
    """A prompt with `_{n}` written as n holes; UserError for too many."""
    counts = [int(count) for count in _LONG_HOLE.findall(prompt)]
    if 0 in counts or sum(counts) > HOLE_LIMIT:
        raise UserError(f"prompt: its holes have {counts} tokens; each has at least 1, all together {HOLE_LIMIT:,}")
    return _LONG_HOLE.sub(lambda hole: HOLE * int(hole[1]), prompt)


def one_token(words: Vocabulary, text: str) -> int:
    """The token that `text` is; UserError if it is none or several. `<|endoftext|>` is GPT-2's end of a document."""
    if text == END_OF_TEXT and words.end_of_text is not None:
        return words.end_of_text
    tokens = words.encode(text)
    if len(tokens) != 1:
        raise UserError(f"{text!r} is {len(tokens)} tokens of the vocabulary {words.name!r}, not one")
    return int(tokens[0])


def token_dtype(size: int) -> np.dtype:
    """The smallest of uint8, uint16 and int32 that stores the tokens `0..size-1`."""
    return np.dtype(np.uint8 if size <= 2**8 else np.uint16 if size <= 2**16 else np.int32)


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
        text = _expanded(text)
        # Capitals outside ASCII stay as they are: lower-casing may change the length and so the positions we report.
        text = "".join(char.lower() if char in string.ascii_uppercase else char for char in text)
        self._check(text, self.symbols + HOLE, "prompt")
        codes = np.frombuffer(text.encode(), np.uint8)
        return np.where(codes == ord(HOLE), self.size, self._TOKENS[codes]).astype(np.int64)

    def decode(self, tokens: np.ndarray) -> str:
        """Text of ids `[n]`; ValueError if one is outside `0..27`."""
        return self._SYMBOLS[_known(tokens, self.size)].tobytes().decode()

    def _check(self, text: str, allowed: str, what: str) -> None:
        for position, char in enumerate(text) if not set(text) <= set(allowed) else ():
            if char not in allowed:
                holes = f" and {HOLE!r} for a hole" if HOLE in allowed else ""
                raise UserError(
                    f"{what}: character {char!r} at position {position} is not in the vocabulary {self.name!r}; "
                    f"allowed are a-z, the space{holes}"
                )


class BytePairs:
    """GPT-2's 50,257 tokens: pairs of bytes merged in the order of a list, and a token for the end of a document.

    where: a folder with the vocabulary's files (encoder.json and vocab.bpe, or vocab.json and merges.txt, or
    tokenizer.json), or a name on the hub. If None, the environment variable MD4_GPT2 names one of these, and if that is
    not set the hub is asked for GPT-2's own. Files are read when the first text is encoded or decoded: to know the
    size, none are needed. UserError if they can't be had, or are not GPT-2's.
    """

    name = "gpt2"
    size = 50257
    end_of_text: int | None = 50256

    _FILES = (("encoder.json", "vocab.bpe"), ("vocab.json", "merges.txt"))

    def __init__(self, where: str | Path | None = None):
        self._where = where

    @cached_property
    def _tokenizer(self) -> "Tokenizer":
        where = str(self._where or os.environ.get(GPT2_FILES) or GPT2_HUB)
        tokenizer = self._read(Path(where)) if Path(where).is_dir() else self._fetch(where)
        size = tokenizer.get_vocab_size()
        if size != self.size or tokenizer.token_to_id("<|endoftext|>") != self.end_of_text:
            raise UserError(f"the vocabulary at {where!r} is not GPT-2's: it has {size} tokens, not {self.size}")
        # A document that quotes the special token contains its letters, not the end of a document.
        tokenizer.encode_special_tokens = True
        return tokenizer

    @classmethod
    def _read(cls, folder: Path) -> "Tokenizer":
        from tokenizers import Tokenizer, decoders, models, pre_tokenizers

        try:
            for vocabulary_file, merges in cls._FILES:
                if (folder / vocabulary_file).exists() and (folder / merges).exists():
                    tokenizer = Tokenizer(models.BPE.from_file(str(folder / vocabulary_file), str(folder / merges)))
                    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # type: ignore
                    tokenizer.decoder = decoders.ByteLevel()  # type: ignore
                    return tokenizer
            if (folder / "tokenizer.json").exists():
                return Tokenizer.from_file(str(folder / "tokenizer.json"))
        except Exception as error:  # the library raises nothing more special
            raise UserError(f"GPT-2's vocabulary in {str(folder)!r} can't be read: {error}") from None
        known = ", ".join(" and ".join(pair) for pair in cls._FILES)
        raise UserError(f"no vocabulary of GPT-2 in {str(folder)!r}: it has neither {known}, nor tokenizer.json")

    @staticmethod
    def _fetch(name: str) -> "Tokenizer":
        from tokenizers import Tokenizer

        try:
            return Tokenizer.from_pretrained(name)
        except Exception as error:  # as above; the name may be a mistyped folder
            raise UserError(
                f"GPT-2's vocabulary: {name!r} is neither a folder nor a name that the hub answers to ({error}). "
                f"Set {GPT2_FILES} to a folder with encoder.json and vocab.bpe"
            ) from None

    def normalise(self, text: str) -> str:
        """The text itself: any text can be encoded, and decodes to itself."""
        return text

    def encode(self, text: str) -> np.ndarray:
        """Tokens `[n]` uint16; no token is added at either end."""
        return np.array(self._tokenizer.encode(text, add_special_tokens=False).ids, np.uint16)

    def encode_documents(self, documents: Iterable[str]) -> list[np.ndarray]:
        """Tokens of documents, each with the end-of-text token behind it."""
        found = self._tokenizer.encode_batch_fast(list(documents), add_special_tokens=False)  # without offsets
        return [np.array([*encoding.ids, self.end_of_text], np.uint16) for encoding in found]

    def encode_prompt(self, text: str) -> np.ndarray:
        """Ids `[n]` int64 of a prompt in which `_` is a token to fill, `_{12}` twelve tokens, and `\\_` an underscore.

        What stands between holes is encoded by itself. Most tokens begin with their space: write "The_ sat", not
        "The _ sat".
        """
        pieces = [piece.replace("\\_", HOLE) for piece in re.split(r"(?<!\\)_", _expanded(text))]
        ids = [np.append(self.encode(piece).astype(np.int64), self.size) for piece in pieces]
        return np.concatenate(ids)[:-1]

    def decode(self, tokens: np.ndarray) -> str:
        """Text of ids `[n]`; bytes that are not UTF-8 become U+FFFD. ValueError if an id is outside `0..50257`."""
        tokens = _known(tokens, self.size)
        pieces = np.split(tokens, np.flatnonzero(tokens == self.size))
        return HOLE.join(
            self._tokenizer.decode(piece[piece != self.size].tolist(), skip_special_tokens=False) for piece in pieces
        )


class Pixels:
    """Brightness levels of a picture's channels, `0..levels-1`. There is no text in them."""

    end_of_text: int | None = None

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
        for position, word in enumerate(_expanded(text).replace(HOLE, f" {HOLE} ").split()):
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
        return " ".join(HOLE if token == self.size else str(token) for token in _known(tokens, self.size).tolist())

    def _no_text(self) -> UserError:
        return UserError(f"the vocabulary {self.name!r} holds brightness levels of pictures: it can't encode text")


def _known(tokens: np.ndarray, mask: int) -> np.ndarray:
    """Ids `[n]` as int64; ValueError if one is outside `0..mask`."""
    tokens = np.asarray(tokens, np.int64)
    if tokens.size and not 0 <= tokens.min() <= tokens.max() <= mask:
        raise ValueError(f"token ids must be in 0..{mask}, got {tokens.min()}..{tokens.max()}")
    return tokens


_VOCABULARIES = {Characters.name: Characters, BytePairs.name: BytePairs, "pixels": Pixels}


def vocabulary(name: str) -> Vocabulary:
    """The vocabulary called `name`: "text8", "gpt2", "pixels" (256 levels) or pixels and a number of levels (pixels17).

    UserError with the nearest name otherwise.
    """
    if levels := re.fullmatch(r"pixels(\d{1,9})", name):
        return Pixels(int(levels[1]))
    if name not in _VOCABULARIES:
        nearest = difflib.get_close_matches(name, _VOCABULARIES, n=1, cutoff=0)
        hint = f"; did you mean {nearest[0]!r}?" if nearest else ""
        raise UserError(f"unknown vocabulary {name!r}: known are {', '.join(sorted(_VOCABULARIES))}{hint}")
    return _VOCABULARIES[name]()
