"""A vocabulary learned from documents: byte-level pairs, as many as wanted (`md4 tokenizer train`).

Only documents of the training split are read, so that nothing of what a model is evaluated on has been seen. The result
is a function of the documents, the size and the version of `tokenizers`: threads and the order of files do not matter.
"""

import hashlib
import json
import time
from collections.abc import Callable, Iterable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

from md4.errors import UserError
from pipelines import cleaning, sources
from pipelines.config import DataConfig, open_source
from pipelines.part_shards import assign
from pipelines.progress import progress
from pipelines.storage import write_atomically
from pipelines.text_part import cut
from pipelines.units import Unit
from pipelines.vocabularies.byte_pairs import TOKENIZER, Trained
from pipelines.vocabularies.words import END_OF_TEXT

FACTS = "training.json"  # beside the tokenizer: what it was made from
LEAST = 257  # 256 bytes and the end of a document
_HELD_OUT_CHARS = 10**6  # of the validation split, that the report's characters per token are measured on
_SUPERFLUOUS = 2  # a pair that stands so seldom is no token


def train(
    config: DataConfig,
    size: int,
    out: str | Path,
    megabytes: float = 1000,
    report: Callable[[str], None] = print,
) -> Trained:
    """Learn a vocabulary of `size` tokens and write it to the folder `out`: tokenizer.json, and how it was made.

    config: which documents; its own vocabulary and row length are not looked at. megabytes: of a larger corpus, that
    many are read, in pieces from everywhere. UserError for images, a size below 257, a folder that has a tokenizer
    already, documents that cannot be read, or that are too few for so many tokens.
    """
    began, folder = time.monotonic(), Path(out)
    if config.has_images:
        raise UserError(f"data.source={config.source} has images: only text is made of pairs of bytes")
    if size < LEAST:
        raise UserError(f"--size {size}: at least {LEAST} tokens are needed, for 256 bytes and the end of a text")
    if (folder / TOKENIZER).exists():
        raise UserError(f"{folder} has a {TOKENIZER} already: name a new folder")
    units = []
    for _, one in config.sets():
        source = open_source(one)
        source.fetch(report)
        units += [(one, unit) for unit in source.list_units(one.part_bytes)]
    chosen = _some(units, megabytes * 1e6)
    total = sum(unit.size for _, unit in chosen)
    report(f"tokenizer: learning {size:,} tokens from {total / 1e6:.1f} MB in {len(chosen)} pieces")
    seen = _Seen()
    with progress("tokenizer", total, report) as advance:
        content = learn(seen.texts(chosen, lambda unit: advance(unit.size)), size)
    words = Trained(content, str(folder / TOKENIZER))
    if words.size != size:
        raise UserError(
            f"--size {size}: the {seen.characters:,} characters of the training split have only {words.size} tokens "
            f"that stand there {_SUPERFLUOUS} times; take a smaller size, or more text"
        )
    facts = {
        "size": size,
        "end_of_text": END_OF_TEXT,
        "sha256": words.digest,
        "sources": sorted({open_source(one).identity for _, one in config.sets()}),
        "bytes": total,
        "documents": seen.documents,
        "characters": seen.characters,
        "characters_per_token": seen.ratio(words),
        "tokenizers": version("tokenizers"),
    }
    write_atomically(folder / FACTS, (json.dumps(facts, indent=1) + "\n").encode())
    write_atomically(folder / TOKENIZER, content)
    ratio = facts["characters_per_token"]
    held_out = "" if ratio is None else f", {ratio:.2f} characters a token in the validation split"
    report(f"tokenizer: {words.name} from {seen.documents:,} documents in {time.monotonic() - began:.1f} s{held_out}")
    return words


def _some(units: list[tuple[DataConfig, Unit]], most: float) -> list[tuple[DataConfig, Unit]]:
    """Units of about `most` bytes, drawn from everywhere, the same every time; at least one."""

    def place(item: tuple[DataConfig, Unit]) -> bytes:
        return hashlib.blake2b(f"{item[1].name}:{item[1].start}".encode(), digest_size=8).digest()

    chosen, size = [], 0
    for item in sorted(units, key=place):
        if chosen and size + item[1].size > most:
            continue
        chosen.append(item)
        size += item[1].size
    return chosen


class _Seen:
    """What was read on the way."""

    def __init__(self) -> None:
        self.documents = self.characters = 0
        self._held_out: list[str] = []
        self._held_out_chars = 0

    def texts(self, chosen: list[tuple[DataConfig, Unit]], done: Callable[[Unit], object]) -> Iterator[str]:
        """The training documents of the units; some of the validation split are put aside."""
        for config, unit in chosen:
            hooks = cleaning.find(config.clean)
            for document in sources.read(unit, config.text_recipe()).documents:
                clean, _ = cleaning.cleaned(document.text, hooks, document.name)
                for text in cut(_writable(clean or ""), config.document_chars):
                    split = assign(text, config.validation, config.test)[0]
                    if (unit.split or split) == "train":
                        self.documents += 1
                        self.characters += len(text)
                        yield text
                    elif split == "validation" and self._held_out_chars < _HELD_OUT_CHARS:
                        self._held_out.append(text)
                        self._held_out_chars += len(text)
            done(unit)

    def ratio(self, words: Trained) -> float | None:
        """Characters per token of what was put aside."""
        tokens = sum(map(len, words.encode_documents(self._held_out)))
        return self._held_out_chars / tokens if tokens else None


def _writable(text: str) -> str:
    """The text without halves of characters, which JSON can hold and UTF-8 cannot."""
    return text.encode("utf-8", "ignore").decode()


def learn(texts: Iterable[str], size: int) -> bytes:
    """The content of a tokenizer.json."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    rules: Any = Tokenizer(models.BPE())
    rules.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    rules.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        min_frequency=_SUPERFLUOUS,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,  # of its own, which would fight with ours
    )
    rules.train_from_iterator(texts, trainer)
    return rules.to_str(pretty=True).encode()
