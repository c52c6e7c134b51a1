"""Pairs of bytes merged in the order of a list: GPT-2's vocabulary, and any other that a tokenizer.json describes."""

import hashlib
import json
import os
import re
from abc import ABC, abstractmethod
from collections.abc import Iterable
from functools import cached_property, lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from md4.errors import UserError
from pipelines.vocabularies.words import END_OF_TEXT, HOLE, expanded, known, token_dtype

if TYPE_CHECKING:
    from tokenizers import Tokenizer

TOKENIZER = "tokenizer.json"  # what the file of a vocabulary is called, wherever one is kept
GPT2_FILES = "MD4_GPT2"  # environment variable: where GPT-2's vocabulary is, a folder or a name on the hub
GPT2_HUB = "openai-community/gpt2"  # used where the variable is not set
ENDS = (END_OF_TEXT, "</s>", "<eos>", "<|end_of_text|>")  # what the end of a document is called, in files of others


class _ByteLevel(ABC):
    """A vocabulary in which every text can be written, and that has a token for the end of a document."""

    name: str
    size: int
    end_of_text: int | None

    @property
    @abstractmethod
    def _tokenizer(self) -> "Tokenizer":
        """The library's part of the work. It takes special tokens in a text for the letters that they are."""

    def normalise(self, text: str) -> str:
        """The text itself: any text can be encoded, and decodes to itself."""
        return text

    def encode(self, text: str) -> np.ndarray:
        """Tokens `[n]` of `token_dtype(size)`; no token is added at either end."""
        return np.array(self._tokenizer.encode(text, add_special_tokens=False).ids, token_dtype(self.size))

    def encode_documents(self, documents: Iterable[str]) -> list[np.ndarray]:
        """Tokens of documents, each with the end-of-text token behind it."""
        found = self._tokenizer.encode_batch_fast(list(documents), add_special_tokens=False)  # without offsets
        dtype = token_dtype(self.size)
        return [np.array([*encoding.ids, self.end_of_text], dtype) for encoding in found]

    def encode_prompt(self, text: str) -> np.ndarray:
        """Ids `[n]` int64 of a prompt in which `_` is a token to fill, `_{12}` twelve tokens, and `\\_` an underscore.

        What stands between holes is encoded by itself. Most tokens begin with their space: write "The_ sat", not
        "The _ sat".
        """
        pieces = [piece.replace("\\_", HOLE) for piece in re.split(r"(?<!\\)_", expanded(text))]
        ids = [np.append(self.encode(piece).astype(np.int64), self.size) for piece in pieces]
        return np.concatenate(ids)[:-1]

    def decode(self, tokens: np.ndarray) -> str:
        """Text of ids `[n]`; bytes that are not UTF-8 become U+FFFD. ValueError if an id is outside `0..size`."""
        tokens = known(tokens, self.size)
        pieces = np.split(tokens, np.flatnonzero(tokens == self.size))
        return HOLE.join(
            self._tokenizer.decode(piece[piece != self.size].tolist(), skip_special_tokens=False) for piece in pieces
        )


class BytePairs(_ByteLevel):
    """GPT-2's 50,257 tokens, one of them for the end of a document.

    where: a folder with the vocabulary's files (encoder.json and vocab.bpe, or vocab.json and merges.txt, or
    tokenizer.json), or a name on the hub. If None, the environment variable MD4_GPT2 names one of these, and if that is
    not set the hub is asked for GPT-2's own. Files are read when the first text is encoded or decoded: to know the
    size, none are needed. UserError if they can't be had, or are not GPT-2's.
    """

    name = "gpt2"
    size = 50257
    end_of_text: int | None = 50256
    digest = ""

    _FILES = (("encoder.json", "vocab.bpe"), ("vocab.json", "merges.txt"))

    def __init__(self, where: str | Path | None = None):
        self._where = where

    @cached_property
    def _tokenizer(self) -> "Tokenizer":
        where = str(self._where or os.environ.get(GPT2_FILES) or GPT2_HUB)
        tokenizer = self._read(Path(where)) if Path(where).is_dir() else self._fetch(where)
        size = tokenizer.get_vocab_size()
        if size != self.size or tokenizer.token_to_id(END_OF_TEXT) != self.end_of_text:
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
            if (folder / TOKENIZER).exists():
                return Tokenizer.from_file(str(folder / TOKENIZER))
        except Exception as error:  # the library raises nothing more special
            raise UserError(f"GPT-2's vocabulary in {str(folder)!r} can't be read: {error}") from None
        files = ", ".join(" and ".join(pair) for pair in cls._FILES)
        raise UserError(f"no vocabulary of GPT-2 in {str(folder)!r}: it has neither {files}, nor {TOKENIZER}")

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


class Trained(_ByteLevel):
    """A vocabulary that a tokenizer.json describes, as `md4 tokenizer train` and the hub's models have them.

    Its name is made of its content, so that it is the same wherever the file lies.

    content: of the file. where: for messages. UserError for a file that is none, that has no token for the end of a
    document (one of `ENDS`), or in which some text can't be written.
    """

    def __init__(self, content: bytes, where: str):
        self.content = content
        self.digest = hashlib.sha256(_canonical(_parsed(content, where))).hexdigest()
        self._ready = _opened(content, where)
        ids = self._ready.get_vocab(with_added_tokens=True).values()
        self.size = max(ids, default=-1) + 1
        self.name = f"bpe-{self.size}-{self.digest[:12]}"
        found = [token for end in ENDS if (token := self._ready.token_to_id(end)) is not None]
        if not found:
            raise UserError(f"{where!r} has no token for the end of a document: it needs one of {', '.join(ENDS)}")
        self.end_of_text: int | None = found[0]
        text = self.normalise(_ALL_BYTES)
        if self.decode(self.encode(text)) != text:
            raise UserError(
                f"{where!r} can't write every text: it must describe byte-level pairs, all 256 bytes among them, "
                "without a space put in front"
            )

    def __reduce__(self) -> Any:
        return Trained, (self.content, "")

    @property
    def _tokenizer(self) -> "Tokenizer":
        return self._ready

    def normalise(self, text: str) -> str:
        """The text itself, or what the file's own normaliser (such as Unicode's NFC) makes of it."""
        rule: Any = self._ready.normalizer
        return text if rule is None else rule.normalize_str(text)


# Every byte that UTF-8 can have is in here.
_ALL_BYTES = "".join(map(chr, (*range(0x800), *range(0x800, 0xD800, 0x800), *range(0xE000, 0x110000, 0x1000))))


def _parsed(content: bytes, where: str) -> dict[str, Any]:
    try:
        tree = json.loads(content)
    except ValueError as error:
        raise UserError(f"{where!r} is not a {TOKENIZER}: it is not JSON ({error})") from None
    if not isinstance(tree, dict) or "model" not in tree:
        raise UserError(f"{where!r} is not a {TOKENIZER}: it describes no model")
    return tree


def _canonical(tree: dict[str, Any]) -> bytes:
    """The same bytes however the file was laid out."""
    return json.dumps(tree, sort_keys=True, separators=(",", ":")).encode()


def _opened(content: bytes, where: str) -> "Tokenizer":
    from tokenizers import Tokenizer

    try:
        tokenizer = Tokenizer.from_buffer(content)
    except Exception as error:  # the library raises nothing more special
        raise UserError(f"{where!r} is not a {TOKENIZER} that can be used: {error}") from None
    tokenizer.encode_special_tokens = True  # as in `BytePairs`
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def is_path(name: str) -> bool:
    """Does what is no known name of a vocabulary say where its file lies?"""
    return name.endswith(".json") or "/" in name or os.sep in name or Path(name).is_dir()


def read(path: str | Path) -> Trained:
    """The vocabulary of a tokenizer.json, or of the folder that has one; UserError if it is absent or unfit."""
    file = Path(path).expanduser()
    if file.is_dir():
        file /= TOKENIZER
    try:
        facts = file.stat()
        return _read(str(file.absolute()), facts.st_mtime_ns, facts.st_size)
    except OSError as error:
        raise UserError(
            f"vocabulary {str(path)!r} can't be read ({error.strerror}): it must be a {TOKENIZER}, or a folder with one"
        ) from None


@lru_cache(maxsize=4)
def _read(file: str, _stamp: int, _size: int) -> Trained:
    return Trained(Path(file).read_bytes(), file)
