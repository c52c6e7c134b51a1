"""JSON lines (.jsonl, .json, .ndjson; as they are, or .gz, .zst): a document is one field of a line's object."""

import json
from collections.abc import Iterator

from md4.errors import UserError
from pipelines.archives import PACKED, Damaged, unpacked
from pipelines.documents import Document, Rejected
from pipelines.roots import File, Root
from pipelines.text.files import place_name
from pipelines.text.names import excerpt, splits_of
from pipelines.text.recipe import Recipe
from pipelines.units import Unit, pieces

SUFFIXES = (".jsonl", ".json", ".ndjson")


def list_units(root: Root, piece: int) -> list[Unit]:
    """Units of about `piece` bytes, cut at the ends of lines; packed files whole. UserError if there are none."""
    files = [file for file in root.files(SUFFIXES, "JSON lines", PACKED[:2]) if not _is_metadata(file)]
    splits = splits_of(files, root)
    units = []
    for file in files:
        whole = file.name.lower().endswith(PACKED)
        units += pieces("jsonl", file, max(1, file.size) if whole else piece, split=splits[file.name])
    if not units:
        raise UserError(f"the corpus {str(root)!r} is empty: {len(files)} file(s) of JSON lines")
    return units


def _is_metadata(file: File) -> bool:
    return file.name.rpartition("/")[2] in ("dataset_info.json", "dataset_infos.json", "state.json")


def records(unit: Unit, data: bytes, recipe: Recipe) -> Iterator[Document | Rejected]:
    """The documents of a unit's lines, empty lines left out."""
    try:
        content = unpacked(data, unit.name)
    except Damaged as error:
        yield Rejected(unit.file, error.reason, str(error))
        return
    for number, line in enumerate(content.split(b"\n"), 1):
        if line.strip():
            yield _record(line, place_name(unit, number), recipe.column)


def _record(line: bytes, name: str, column: str) -> Document | Rejected:
    try:
        facts = json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        return Rejected(name, "not UTF-8", f"byte {line[error.start]:#04x} at {error.start} of the line", excerpt(line))
    except (ValueError, RecursionError) as error:
        return Rejected(name, "malformed line", f"it is not JSON: {error}", excerpt(line))
    if not isinstance(facts, dict):
        return Rejected(name, "malformed line", f"it is a {type(facts).__name__}, not an object", excerpt(line))
    text = facts.get(column)
    if isinstance(text, str):
        return _sound(text, name, line)
    if column in facts and text is not None:
        return Rejected(name, "no text", f"its field {column!r} is a {type(text).__name__}", excerpt(line))
    there = ", ".join(map(repr, list(facts)[:20])) or "none"
    return Rejected(name, "no text", f"it has no {column!r} (data.text_column); its fields are {there}", excerpt(line))


def _sound(text: str, name: str, line: bytes) -> Document | Rejected:
    """JSON can spell halves of characters, which no encoding has."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        return Rejected(name, "not UTF-8", f"half a character at {error.start} of the text", excerpt(line))
    return Document(text, name)
