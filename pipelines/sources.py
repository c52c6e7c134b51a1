"""Where text comes from: sources (`pipelines.units`) whose units hold documents.

    text             a text file, or every *.txt and *.md below a folder; a file is a document
    lines            the same, and every line is one
    jsonl            JSON lines; the field `data.text_column` of each is a document
    parquet          parquet files; the column `data.text_column` holds the documents
    huggingface      a dataset saved by Hugging Face's `datasets` (arrow or parquet), or `org/name[:config]` on its hub
    text-webdataset  tars of texts
    pydocs           the English of the documentation that ships with the running Python; help topics, modules and
                     classes are its documents

The files may be packed (.gz, .zst), and lie in S3. Sets that are known by name are in `pipelines.named`, images have
sources of their own: `pipelines.images`.
"""

import hashlib
import sys
from collections.abc import Iterator

from md4.errors import UserError
from pipelines.documents import Document, Reading, Rejected
from pipelines.roots import Root, opened
from pipelines.text import files, jsonl, pydocs, tables, tars
from pipelines.text.recipe import Recipe
from pipelines.units import Source, Unit

KINDS = ("pydocs", "text", "lines", "jsonl", "parquet", "huggingface", "text-webdataset")
_MORE = ("text8", "wikitext", "wikitext-parquet", "text-archives")  # formats of named sets


def open_source(kind: str, path: str | None, recipe: Recipe | None = None) -> Source:
    """The source `kind`, at `path` if it is of a kind that has one. Nothing is read yet.

    UserError for a path that is missing or not wanted.
    """
    if kind == "pydocs":
        if path is not None:
            raise UserError(f"data.path={path!r}: the source 'pydocs' is found in the running Python and takes no path")
        return Source("pydocs", "pydocs", f"Python {sys.version.split()[0]}", lambda _: pydocs.list_units())
    if kind not in (*KINDS, *_MORE):
        raise ValueError(f"{kind!r} is not one of {KINDS}")
    if path is None:
        needs = {
            "text": "a text file or a folder of text files",
            "huggingface": "a folder, or a name on the hub: org/name or org/name:config",
        }.get(kind, "a file or a folder")
        raise UserError(f"data.path is missing: the source {kind!r} needs {needs}")
    root = Root(path)
    options = recipe or Recipe()
    return Source(kind, root.label(kind), root.url, lambda piece: _list(kind, root, piece, options))


def _list(kind: str, root: Root, piece: int, recipe: Recipe) -> list[Unit]:
    if kind in files.KINDS:
        return files.list_units(kind, root, piece)
    if kind == "jsonl":
        return jsonl.list_units(root, piece)
    if kind in tars.KINDS:
        return tars.list_units(kind, root)
    if kind == "wikitext-parquet":  # an article goes over row groups: a unit is a file
        units = tables.list_parquet(root, 2**62, recipe)
        return [Unit(kind, u.file, u.name, u.start, u.stop, u.stamp, u.split) for u in units]
    if kind == "huggingface" and any(file.name.endswith(".arrow") for file in root.entries("a saved dataset")[0]):
        return tables.list_arrow(root, recipe)
    return tables.list_parquet(root, piece, recipe)


def read(unit: Unit, recipe: Recipe | None = None) -> Reading:
    """The documents of one unit, in their order, and the records that give none.

    UserError if it cannot be read, and, unless `recipe.damaged` says skip, for the first record that gives none.
    """
    recipe = recipe or Recipe()
    data = read_piece(unit)
    documents: list[Document] = []
    rejected: list[Rejected] = []
    for record in _records(unit, data, recipe):
        if isinstance(record, Document):
            documents.append(record)
        elif recipe.damaged == "refuse":
            where = "" if unit.file in record.detail else f"{record.name!r}: "
            raise UserError(f"{where}{record.detail}. Set data.damaged=skip to leave such records out")
        else:
            rejected.append(record)
    return Reading(documents, hashlib.sha256(data).hexdigest(), rejected)


def read_piece(unit: Unit) -> bytes:
    """The bytes that the documents of a unit come from, moved to the borders that its format has."""
    if unit.kind in (*files.KINDS, "jsonl"):
        return files.read_bytes(unit)
    with opened(unit.file) as file:
        file.seek(unit.start)
        data = file.read(unit.size)
    if len(data) < unit.size:
        raise UserError(f"{unit.file!r} shrank while it was being prepared")
    return data


def _records(unit: Unit, data: bytes, recipe: Recipe) -> Iterator[Document | Rejected]:
    if unit.kind == "pydocs":
        return pydocs.records(unit, data)
    if unit.kind in files.KINDS:
        return files.records(unit, data)
    if unit.kind == "jsonl":
        return jsonl.records(unit, data, recipe)
    if unit.kind in tars.KINDS:
        return tars.records(unit, data)
    if unit.kind == "arrow":
        return tables.arrow_records(unit, data, recipe)
    rows = tables.parquet_records(unit, data, recipe)
    return files.joined_articles(rows, unit) if unit.kind == "wikitext-parquet" else rows
