"""Data sets that a language model is tested on without training on them, read from local files, and the two protocols.

A published zero-shot perplexity depends on everything between the file and the network: how the tokenised text is made
plain again (the *detokenizer*), what counts as a record, and how records are laid into windows. Two protocols are in
use; their numbers are not comparable.

`md4`: MD4, SEDD and others. Each record ends with the end-of-text token; the records of the set, one behind the other,
are cut into windows of L tokens that don't overlap.

`mdlm`: MDLM and others. The same stream, but every window begins and ends with an end-of-text token, which leaves room
for L - 2 tokens, and windows slide: each begins `stride` tokens behind the one before, and only what is new in it is
scored, given all that it shares with the earlier one. The default stride is half of the window; a stride of L - 2 puts
the windows side by side.

Where we differ from the programs that the authors published: the last, short window is filled up and counted, where
theirs drop what doesn't fill a window in each thousand records; and the two boundary tokens of a window are shown but
not counted, where theirs count them, which lowers a perplexity of 50 by about 0.8 % at L = 1024.

Records are what those programs see: lines of WikiText (headings and empty ones too) and of Penn Treebank, sentences of
One Billion Word, passages of LAMBADA. A *document* is what is independent of the rest: an article of WikiText, a
passage, a sentence. Penn Treebank has lost its articles; its lines count as documents, so its errors come out a little
small. WikiText-2 and WikiText-103 have the same test split.
"""

import hashlib
import json
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Literal

import numpy as np

from md4.errors import UserError
from pipelines.vocabularies import Vocabulary

# -- from the tokenised text of a data set to plain text -------------------------------------------------------------


def wikitext_detokenizer(text: str) -> str:
    """WikiText's marks `@-@` and the spaces around punctuation, brackets, quotes and headings are taken away."""
    text = text.replace("s '", "s'")
    for mark in "-,.":
        text = text.replace(f" @{mark}@ ", mark)
    for mark in ":;.!?,":
        text = text.replace(f" {mark} ", f"{mark} ")
    for start, end in ("()", "[]", "{}", '""', "''"):
        inside = rf"{re.escape(start)}\s*([^{re.escape(end)}]*?)\s*{re.escape(end)}"
        text = re.sub(inside, lambda found, start=start, end=end: f"{start}{found[1]}{end}", text)
    for depth in (4, 3, 2):
        text = text.replace(" ".join("=" * depth), "=" * depth)
    for written, plain in ((" ° ", "°"), (" \n", "\n"), ("\n ", "\n"), (" N ", " 1 "), (" 's", "'s")):
        text = text.replace(written, plain)
    return text


def ptb_detokenizer(text: str) -> str:
    """Penn Treebank: contractions are joined, N (any number) becomes 1, an unknown word a question mark."""
    for written, plain in ((" 's", "'s"), ("s ' ", "s' "), (" n't", "n't"), (" \n ", "\n"), ("\\/", "/")):
        text = text.replace(written, plain)
    while " N " in text:  # two of them share a space: one pass leaves the second
        text = text.replace(" N ", " 1 ")
    for written, plain in (("$ 1", "$1"), ("# 1", "#1"), ("<unk>", "?")):
        text = text.replace(written, plain)
    return text


_LM1B_RULES = [
    (r"(https?) : / / ", r"\1://"),
    (r" '(\w+)", r"'\1"),
    (r" (\w+) \. ", r" \1. "),
    (r" (\w+) \.$", r" \1."),
    (r" \? ", "? "),
    (r" \?$", "?"),
    (r" ! ", "! "),
    (r" !$", "!"),
    (r" , ", ", "),
    (r" : ", ": "),
    (r" ; ", "; "),
    (r" / ", "/"),
    (r'" ([^"]+) "', r'"\1"'),
    (r"' ([^']+) '", r"'\1'"),
    (r"\( ([^()]+) \)", r"(\1)"),
    (r"\[ ([^\[\]]+) \]", r"[\1]"),
    (r"([$£]) ", r"\1"),
]


def lm1b_detokenizer(text: str) -> str:
    """One Billion Word: spaces before punctuation and inside quotes and brackets are taken away."""
    for pattern, plain in _LM1B_RULES:
        text = re.sub(pattern, plain, text)
    return text


def lambada_detokenizer(text: str) -> str:
    """LAMBADA: curly quotes become straight ones; a line break comes first, no white space at the end."""
    return (
        "\n"
        + text.replace("\N{LEFT DOUBLE QUOTATION MARK}", '"').replace("\N{RIGHT DOUBLE QUOTATION MARK}", '"').strip()
    )


# -- the data sets ---------------------------------------------------------------------------------------------------


def _wikitext(text: str) -> Iterator[list[str]]:
    """Articles, begun by lines like " = Title = " between empty lines (equations look like them, but have text around).

    An empty line is an empty record; others keep their line break.
    """
    lines = text.removesuffix("\n").split("\n")
    filled = [False, *(bool(line.strip()) for line in lines), False]  # filled[i + 1] is about lines[i]
    article: list[str] = []
    for i, line in enumerate(lines):
        is_title = re.fullmatch(r" ?= [^=].* = ?", line) and not filled[i] and not filled[i + 2]
        if is_title and any(article):
            yield article
            article = []
        article.append(f"{line}\n" if filled[i + 1] else "")
    if any(article):
        yield article


def _lines(text: str) -> Iterator[list[str]]:
    """Lines, without the white space around them; empty ones are passed over."""
    yield from ([line.strip()] for line in text.split("\n") if line.strip())


def _json_lines(text: str) -> Iterator[list[str]]:
    """The field "text" of records in JSON."""
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
            if not isinstance(record, dict) or not isinstance(record.get("text"), str):
                raise ValueError('it is not a record like {"text": "..."}')
        except ValueError as error:
            raise UserError(f"line {number}: {error}") from None
        yield [record["text"]]


@dataclass(frozen=True)
class DataSet:
    """A named data set: where its files may lie below a folder of data, and how to read them."""

    name: str
    files: dict[str, tuple[str, ...]]  # glob patterns of each split; the one tried first is the one reported on
    documents: Callable[[str], Iterator[list[str]]]  # text of a file -> documents, each a list of records
    detokenizer: Callable[[str], str]


def _wikitext_files(version: int) -> dict[str, tuple[str, ...]]:
    folder = f"wikitext-{version}*"
    return {
        "test": (f"{folder}/wiki.test.*", f"{folder}/test.txt"),
        "validation": (f"{folder}/wiki.valid.*", f"{folder}/valid.txt"),
        "train": (f"{folder}/wiki.train.*", f"{folder}/train.txt"),
    }


DATA_SETS = {
    data_set.name: data_set
    for data_set in (
        DataSet("lambada", {"test": ("lambada*/lambada_test.jsonl",)}, _json_lines, lambada_detokenizer),
        DataSet("wikitext2", _wikitext_files(2), _wikitext, wikitext_detokenizer),
        DataSet("wikitext103", _wikitext_files(103), _wikitext, wikitext_detokenizer),
        DataSet(
            "ptb",
            {split: (f"ptb*/ptb.{short}.txt",) for split, short in
             {"test": "test", "validation": "valid", "train": "train"}.items()},
            _lines,
            ptb_detokenizer,
        ),
        DataSet(
            "lm1b",
            {"test": ("lm1b*/news.en.heldout-00000-of-00050", "lm1b*/1b_benchmark.test.tokens"),
             "validation": ("lm1b*/1b_benchmark.dev.tokens",)},
            _lines,
            lm1b_detokenizer,
        ),
    )
}  # fmt: skip


def find(name: str, folder: str | Path, split: str | None = None) -> tuple[DataSet, str, Path]:
    """The data set called `name`, a split of it, and that split's file below `folder`.

    split: "test", "validation" or "train"; if None, the first of these that is there. UserError for an unknown name,
    and for files that are absent, naming where they were looked for.
    """
    if name not in DATA_SETS:
        raise UserError(f"unknown data set {name!r}; known are {', '.join(DATA_SETS)}")
    data_set = DATA_SETS[name]
    if not Path(folder).is_dir():
        raise UserError(f"{str(folder)!r} is not a folder: it should hold the files of {name}")
    if split is not None and split not in data_set.files:
        raise UserError(f"{name} has no split {split!r}; it has {', '.join(data_set.files)}")
    looked = []
    for candidate in data_set.files if split is None else [split]:
        for pattern in data_set.files[candidate]:
            if found := sorted(Path(folder).glob(pattern)):
                return data_set, candidate, found[0]
            looked.append(pattern)
    raise UserError(f"no files of {name} in {str(folder)!r}: looked for {', '.join(looked)}")


# -- the protocols ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Protocol:
    """How records become windows."""

    name: Literal["md4", "mdlm"]
    stride: int | None = None  # new tokens of a window; None: as many as it holds
    boundaries: bool = False  # does an end-of-text token stand at both ends of a window?
    separate: bool = False  # does every document begin a window of its own, filled up at its end?


def protocol(name: str, length: int, stride: int | None = None, separate: bool = False) -> Protocol:
    """The protocol called `name` for windows of `length` tokens; UserError for an unknown name or a bad stride."""
    if name not in ("md4", "mdlm"):
        raise UserError(f"unknown protocol {name!r}; known are md4 and mdlm")
    if name == "md4":
        if stride is not None:
            raise UserError(f"stride={stride}: the windows of the protocol md4 don't overlap; use mdlm")
        return Protocol("md4", separate=separate)
    if length < 3:
        raise UserError(f"windows of {length} tokens are too short for the protocol mdlm: its ends alone take 2")
    room, stride = length - 2, length // 2 if stride is None else stride
    if not 1 <= stride <= room:
        raise UserError(f"stride={stride}: it must be in 1..{room} in windows of {length} tokens")
    return Protocol("mdlm", stride=stride, boundaries=True, separate=separate)


@dataclass(frozen=True)
class Windows:
    """A data set as the network sees it."""

    tokens: np.ndarray  # [N, L], in the dtype of the vocabulary
    scored: np.ndarray  # [N, L] bool: the tokens that count; each token of the text does exactly once, or was dropped
    documents: np.ndarray  # [N] int64: which document a window's first scored token is from
    dropped: int  # tokens left out

    @property
    def fingerprint(self) -> str:
        """sha256 of what the network is shown, and of what counts."""
        digest = hashlib.sha256(repr((self.tokens.shape, self.tokens.dtype.str)).encode())
        for array in (self.tokens, self.scored, self.documents):
            digest.update(np.ascontiguousarray(array).tobytes())
        return digest.hexdigest()


def windows(
    documents: Sequence[np.ndarray], rule: Protocol, length: int, end_of_text: int | None, drop_short: bool = False
) -> Windows:
    """Lay documents (tokens `[n]` each, their end-of-text tokens included) into windows of `length` tokens.

    drop_short: leave out what doesn't fill a window, instead of filling it up with visible tokens that don't count.
    UserError where the protocol needs an end-of-text token and there is none, and where no window remains.
    """
    if rule.boundaries and end_of_text is None:
        raise UserError(
            f"protocol {rule.name} puts end-of-text tokens around windows; this vocabulary has none: use md4"
        )
    numbers = np.repeat(np.arange(len(documents)), [len(tokens) for tokens in documents])
    stream = np.concatenate([np.empty(0, np.uint16), *documents])
    streams = [(numbers, stream)]
    if rule.separate:
        streams = [(np.full(len(tokens), number), tokens) for number, tokens in enumerate(documents)]
    edge = int(rule.boundaries)
    room = length - 2 * edge
    filling = 0 if end_of_text is None else end_of_text
    rows, marks, owners = [], [], []
    dropped = 0
    for numbers, stream in streams:
        for start, new, stop in _spans(len(stream), room, rule.stride or room):
            if drop_short and stop - start < room:
                dropped += stop - new
                continue
            row, mark = np.full(length, filling, stream.dtype), np.zeros(length, bool)
            row[edge : edge + stop - start] = stream[start:stop]
            mark[edge + new - start : edge + stop - start] = True
            rows.append(row)
            marks.append(mark)
            owners.append(numbers[new])
    if not rows:
        raise UserError(f"the text is too short to fill a window of {length} tokens" if dropped else "there is no text")
    return Windows(np.stack(rows), np.stack(marks), np.array(owners, np.int64), dropped)


def _spans(total: int, room: int, stride: int) -> Iterator[tuple[int, int, int]]:
    """(start, first new token, stop) of windows over `total` tokens, each token being new exactly once.

    Sliding windows (stride < room) end where the text ends: the last one moves back instead of being filled up.
    """
    new = 0
    while new < total:
        start = new if new == 0 or stride == room else new - (room - stride)
        stop = min(start + room, total)
        if stride < room:
            start = max(0, stop - room)
        yield start, new, stop
        new = stop


@dataclass(frozen=True)
class ZeroShotSet:
    """A data set under a protocol: windows, and all that a report says of them."""

    name: str
    split: str
    detokenizer: str
    rule: Protocol
    windows: Windows
    characters: int  # of the plain text, which all the scored tokens together spell
    vocabulary: str


def load(
    name: str,
    folder: str | Path,
    words: Vocabulary,
    rule: Protocol,
    length: int,
    split: str | None = None,
    drop_short: bool = False,
) -> ZeroShotSet:
    """Read, detokenize, encode and lay into windows: the data set called `name`, from files below `folder`.

    A vocabulary that can't spell everything normalises the text first. UserError as of `find` and `windows`, and for a
    file that can't be read.
    """
    data_set, split, file = find(name, folder, split)
    try:
        read = list(data_set.documents(file.read_text(encoding="utf-8")))
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"can't read {str(file)!r}: {error}") from None
    except UserError as error:
        raise UserError(f"{str(file)!r}, {error}") from None
    documents = [[words.normalise(data_set.detokenizer(record)) for record in records] for records in read]
    if words.end_of_text is None:  # an empty record is nothing but its separator
        documents = [[record for record in records if record] for records in documents]
        documents = [records for records in documents if records]
    encoded = words.encode_documents(record for records in documents for record in records)
    counts = np.cumsum([0, *map(len, documents)])
    joined = [np.concatenate(encoded[a:b]) for a, b in pairwise(counts.tolist())]
    return ZeroShotSet(
        name=name,
        split=split,
        detokenizer=data_set.detokenizer.__name__,
        rule=rule,
        windows=windows(joined, rule, length, words.end_of_text, drop_short),
        characters=sum(len(record) for records in documents for record in records),
        vocabulary=words.name,
    )
