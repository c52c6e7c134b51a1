"""Files of plain text, as they are or packed (.gz, .zst).

    text      a file is a document; a long one is cut at white space
    lines     a line is a document
    text8     one file, whose first 90 % are for training, and 5 % each for validation and test: by position
    wikitext  the files of WikiText: a document is an article, from its title " = Title = " to the next

A file is read in pieces that begin and end where a reader may cut: none cuts a character, for UTF-8 has no white space
inside of one. Packed files are read whole.
"""

import os
import re
from collections.abc import Iterator
from typing import BinaryIO

from md4.errors import UserError
from pipelines.archives import PACKED, Damaged, unpacked
from pipelines.documents import Document, Rejected
from pipelines.roots import Root, opened
from pipelines.text.names import excerpt, splits_of
from pipelines.units import Unit, pieces

KINDS = ("text", "lines", "text8", "wikitext")
SUFFIXES = {
    "text": (".txt", ".md"),
    "lines": (".txt", ".tokens", *(f"-of-{count:05d}" for count in (50, 100))),  # as One Billion Words calls them
    "wikitext": (".tokens", ".raw", ".txt"),
}
TEXT8_CHARS = 10**8  # of which 90, 5 and 5 million are the published splits
_WHITE = b" \t\n\r\f\v"
# The title stands alone between blank lines. Headings inside an article have more than one sign on each side.
_TITLE = re.compile(rb"(?:\A|\n) ?\r?\n(?= = (?!= )[^\n]*(?<! =) = ?\r?\n ?\r?\n)")
_TITLE_BYTES = 2**12  # longer than any title


def list_units(kind: str, root: Root, piece: int) -> list[Unit]:
    """Units of about `piece` bytes; UserError if there is no text."""
    if kind == "text8":
        return _list_text8(root, piece)
    files = root.files(SUFFIXES[kind], "text", PACKED[:2])
    splits = splits_of(files, root)
    units = []
    for file in files:
        whole = file.name.lower().endswith(PACKED)
        units += pieces(kind, file, max(1, file.size) if whole else piece, split=splits[file.name])
    if not units:
        raise UserError(f"the corpus {str(root)!r} is empty: {len(files)} file(s) of 0 bytes")
    return units


def read_bytes(unit: Unit) -> bytes:
    """The bytes of a unit, moved to borders: it begins with the first one at or after its start.

    It ends with the first one at or after its stop. So the pieces of a file join to the whole file.
    """
    with opened(unit.file) as file:
        size = file.seek(0, os.SEEK_END)
        if size < unit.stop:
            raise UserError(f"{unit.file!r} shrank to {size} bytes while it was being prepared")
        start, stop = _borders(file, unit, size)
        file.seek(start)
        return file.read(stop - start)


def first_byte(unit: Unit) -> int:
    """Where in its file `read_bytes` begins."""
    with opened(unit.file) as file:
        return _borders(file, unit, file.seek(0, os.SEEK_END))[0]


def _borders(file: BinaryIO, unit: Unit, size: int) -> tuple[int, int]:
    """The bytes `start..stop-1` that `read_bytes` reads."""
    fixed = {0, size, *(_text8_borders(size) if unit.kind == "text8" else ())}
    if unit.name.lower().endswith(PACKED):
        return unit.start, unit.stop
    start, stop = (place if place in fixed else _border(file, unit.kind, place) for place in (unit.start, unit.stop))
    return start, stop


def _border(file: BinaryIO, kind: str, position: int) -> int:
    if kind == "wikitext":
        return _title_start(file, position)
    return _after(file, position, _WHITE if kind.startswith("text") else b"\n")


def _after(file: BinaryIO, position: int, wanted: bytes, block: int = 2**12) -> int:
    """Position after the first of the `wanted` bytes at or after `position`; the end of the file if there is none."""
    file.seek(position)
    while data := file.read(block):
        found = min((place for byte in wanted if (place := data.find(byte)) >= 0), default=None)
        if found is not None:
            return position + found + 1
        position += len(data)
    return position


def _title_start(file: BinaryIO, position: int, block: int = 2**18) -> int:
    """Where the first article begins whose title stands after `position`; the end of the file if there is none."""
    while True:
        file.seek(position)
        data = file.read(block + _TITLE_BYTES)
        found = _TITLE.search(data if position == 0 else b"." + data[1:], 0)
        if found is not None:
            return position + found.end()
        if len(data) < block + _TITLE_BYTES:
            return position + len(data)
        position += block


# -- text8 -----------------------------------------------------------------------------------------------------------


def _text8_borders(size: int) -> tuple[int, int]:
    """Where the splits validation and test begin in a file of so many characters: 90 and 95 % of it."""
    return size * 90 // 100, size * 95 // 100


def _list_text8(root: Root, piece: int) -> list[Unit]:
    files, folder = root.entries("the file text8")
    found = (
        [file for file in files if re.match(r"text8(?!.*\.zip$)", file.name.rpartition("/")[2])] if folder else files
    )
    if len(found) != 1:
        raise UserError(f"data.path={str(root)!r} must hold one file whose name begins with text8, found {len(found)}")
    (file,) = found
    if file.size < 20:
        raise UserError(f"{file.place!r} is not text8: it has {file.size} bytes")
    first, second = _text8_borders(file.size)
    units = []
    for split, start, stop in (("train", 0, first), ("validation", first, second), ("test", second, file.size)):
        units += [
            Unit("text8", file.place, file.name, begin, min(begin + piece, stop), file.stamp, split)
            for begin in range(start, stop, piece)
        ]
    return units


def text8_note(size: int) -> str | None:
    """What to say of a file that is not the published text8; None for that."""
    if size == TEXT8_CHARS:
        return None
    first, second = _text8_borders(size)
    return (
        f"text8: the file has {size:,} bytes, not {TEXT8_CHARS:,}: train {first:,}, validation "
        f"{second - first:,}, test {size - second:,} of them; figures are not comparable with published ones"
    )


# -- documents -------------------------------------------------------------------------------------------------------


def records(unit: Unit, data: bytes) -> Iterator[Document | Rejected]:
    """The documents of a unit's bytes."""
    try:
        content = unpacked(data, unit.name)
    except Damaged as error:
        yield Rejected(unit.file, error.reason, str(error))
        return
    if unit.kind == "lines":
        for number, line in enumerate(content.split(b"\n"), 1):
            if line.strip():
                yield document(line.removesuffix(b"\r"), place_name(unit, number), unit)
    elif unit.kind == "wikitext":
        for number, article in enumerate(_articles(content)):
            yield document(article, f"{unit.name}:{unit.start}:{number}", unit)
    else:
        yield document(content, unit.name, unit, offset=first_byte(unit) if content is data else 0)


def _articles(content: bytes) -> Iterator[bytes]:
    """The articles, with their titles and the blank lines around; and what stands before the first title, if any."""
    borders = [found.end() for found in _TITLE.finditer(content)]
    for start, stop in zip([0, *borders], [*borders, len(content)], strict=True):
        if content[start:stop].strip():
            yield content[start:stop]


def joined_articles(rows: Iterator[Document | Rejected], unit: Unit) -> Iterator[Document | Rejected]:
    """The articles of a WikiText table, whose rows are lines."""
    lines = []
    for row in rows:
        if isinstance(row, Rejected):
            yield row
        else:
            lines.append(row.text if row.text.endswith("\n") else row.text + "\n")
    for number, article in enumerate(_articles("".join(lines).encode())):
        yield document(article, f"{unit.name}:{number}", unit)


def place_name(unit: Unit, number: int) -> str:
    """Line `number` of a unit, for messages; in a later piece of a file, the number of lines before is not known."""
    return f"{unit.name}:{number}" if unit.start == 0 else f"{unit.name}:{unit.start}+{number}"


def document(data: bytes, name: str, unit: Unit, offset: int | None = None) -> Document | Rejected:
    """UTF-8 as a document; `offset` is where the data begin in the file, if that is to be told."""
    try:
        return Document(data.decode().removeprefix("\ufeff"), name)  # the mark that some editors write
    except UnicodeDecodeError as error:
        where = "" if offset is None else f" at offset {offset + error.start}"
        what = unit.file if offset is not None else name
        detail = f"{what!r} is not UTF-8: byte {data[error.start]:#04x}{where} ({error.reason})"
        return Rejected(name, "not UTF-8", f"{detail}; convert it, e.g. with iconv -t UTF-8", excerpt(data))


def size_of(root: Root) -> int:
    """Bytes of the text8 file."""
    return max(unit.stop for unit in _list_text8(root, 2**62))
