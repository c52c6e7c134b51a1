"""Vocabularies: between the characters of a document and the tokens `0..V-1` that the model sees (contract C1)."""

import difflib
import re
from pathlib import Path

from md4.errors import UserError
from pipelines.storage import Folder, Place
from pipelines.vocabularies import byte_pairs
from pipelines.vocabularies.byte_pairs import TOKENIZER, BytePairs, Trained
from pipelines.vocabularies.characters import Characters
from pipelines.vocabularies.pixels import Pixels
from pipelines.vocabularies.words import END_OF_TEXT, HOLE, Vocabulary, one_token, token_dtype

__all__ = [
    "END_OF_TEXT", "HOLE", "TOKENIZER", "BytePairs", "Characters", "Pixels", "Trained", "Vocabulary", "keep", "located",
    "one_token", "token_dtype", "vocabulary",
]  # fmt: skip

_VOCABULARIES = {Characters.name: Characters, BytePairs.name: BytePairs, "pixels": Pixels}
_TRAINED = re.compile(r"bpe-\d+-[0-9a-f]{12}")  # names of `Trained`


def located(name: str) -> str:
    """`name`; of a vocabulary that is named by the path of its file, the absolute path."""
    known = name in _VOCABULARIES or name.startswith("pixels") or _TRAINED.fullmatch(name)
    return name if known or not byte_pairs.is_path(name) else str(Path(name).expanduser().absolute())


def vocabulary(name: str, beside: Place | None = None) -> Vocabulary:
    """The vocabulary called `name`: "text8", "gpt2", "pixels" (256 levels) or pixels and a number of levels (pixels17).

    Or where a tokenizer.json lies: its path, or that of its folder. The name of such a vocabulary itself is enough if
    the folder `beside` has kept its file. UserError with the nearest name otherwise.
    """
    if levels := re.fullmatch(r"pixels(\d{1,9})", name):
        return Pixels(int(levels[1]))
    if name in _VOCABULARIES:
        return _VOCABULARIES[name]()
    if _TRAINED.fullmatch(name):
        return _kept(name, beside)
    if byte_pairs.is_path(name):
        return byte_pairs.read(name)
    nearest = difflib.get_close_matches(name, _VOCABULARIES, n=1, cutoff=0)
    hint = f"; did you mean {nearest[0]!r}?" if nearest else ""
    raise UserError(
        f"unknown vocabulary {name!r}: known are {', '.join(sorted(_VOCABULARIES))}, and the path of a {TOKENIZER} "
        f"or of its folder{hint}"
    )


def keep(words: Vocabulary, folder: Place) -> None:
    """Put the file of a vocabulary that has one into `folder`, for `vocabulary(name, folder)`."""
    if isinstance(words, Trained):
        Folder(folder).write(TOKENIZER, words.content)


def _kept(name: str, beside: Place | None) -> Trained:
    file = TOKENIZER if beside is None else Folder(beside).path(TOKENIZER)
    try:
        content = None if beside is None else Folder(beside).read(TOKENIZER)
    except FileNotFoundError:
        content = None
    if content is None:
        raise UserError(f"the file of vocabulary {name!r} is missing: {file}")
    found = Trained(content, file)
    if found.name != name:
        raise UserError(f"{file!r} describes the vocabulary {found.name}, not {name}: it was changed or replaced")
    return found
