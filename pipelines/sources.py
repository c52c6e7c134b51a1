"""Where text comes from: sources (`pipelines.units`) whose units hold documents.

    text    a text file, or every *.txt and *.md below a folder; a file is a document
    pydocs  the English of the documentation that ships with the running Python; help topics, modules and classes
            are its documents

Images have sources of their own: `pipelines.images`.
"""

import ast
import hashlib
import os
import re
import sys
import sysconfig
import warnings
from pathlib import Path
from typing import BinaryIO

from md4.errors import UserError
from pipelines.documents import Document, Reading
from pipelines.units import Source, Unit, label_of, pieces, walk

KINDS = ("pydocs", "text")
TEXT_SUFFIXES = (".txt", ".md")
_WHITE = b" \t\n\r\f\v"


def open_source(kind: str, path: str | None) -> Source:
    """The source `kind`, at `path` if it is of a kind that has one. Nothing is read yet.

    UserError for a path that is missing or not wanted.
    """
    if kind == "pydocs":
        if path is not None:
            raise UserError(f"data.path={path!r}: the source 'pydocs' is found in the running Python and takes no path")
        return Source("pydocs", "pydocs", f"Python {sys.version.split()[0]}", lambda _: _list_pydocs())
    if kind == "text":
        if path is None:
            raise UserError("data.path is missing: the source 'text' needs a text file or a folder of text files")
        root = Path(path).expanduser().absolute()
        return Source("text", label_of(root, "text"), os.path.normpath(root), lambda piece: _list_text(root, piece))
    raise ValueError(f"{kind!r} is not one of {KINDS}")


def read(unit: Unit) -> Reading:
    """The documents of one unit, in their order; UserError if it cannot be read or is not UTF-8."""
    data = read_piece(unit)
    sha256 = hashlib.sha256(data).hexdigest()
    if unit.kind == "text":
        return Reading([Document(_decode(unit, data), unit.name)], sha256)
    texts = _topics(data) if unit.name == _TOPICS else _docstrings(data)
    return Reading([Document(text, f"{unit.name}:{number}") for number, text in enumerate(texts)], sha256)


# -- text files ------------------------------------------------------------------------------------------------------


def _list_text(root: Path, piece: int) -> list[Unit]:
    if not root.exists():
        raise UserError(f"data.path={str(root)!r} does not exist; it must be a text file or a folder of text files")
    if root.is_dir():
        files = walk(root, TEXT_SUFFIXES)
        if not files:
            raise UserError(
                f"no text in {str(root)!r}: a folder must hold files ending in {' or '.join(TEXT_SUFFIXES)}"
            )
    else:
        files = [(root.name, root)]
    units = [unit for name, file in files for unit in pieces("text", name, file, piece)]
    if not units:
        raise UserError(f"the corpus {str(root)!r} is empty: {len(files)} file(s) of 0 bytes")
    return units


def read_piece(unit: Unit) -> bytes:
    """The bytes of a unit, moved to word borders: a piece begins after the first white space at or after its start.

    It ends with the first white space at or after its stop. So the pieces of a file join to the whole file without
    cutting a word, or a character: UTF-8 has no white space inside of one.
    """
    try:
        with open(unit.file, "rb") as file:
            size = file.seek(0, os.SEEK_END)
            if size < unit.stop:
                raise UserError(f"{unit.file!r} shrank to {size} bytes while it was being prepared")
            start, stop = _borders(file, unit)
            file.seek(start)
            return file.read(stop - start)
    except OSError as error:
        raise UserError(f"cannot read {unit.file!r}: {error.strerror}") from error


def _borders(file: BinaryIO, unit: Unit) -> tuple[int, int]:
    """The bytes `start..stop-1` that `read_piece` reads."""
    return _word_end(file, unit.start) if unit.start else 0, _word_end(file, unit.stop)


def _word_end(file: BinaryIO, position: int, block: int = 2**12) -> int:
    """Position after the first white space at or after `position`; the end of the file if there is none."""
    file.seek(position)
    while data := file.read(block):
        found = next((i for i, byte in enumerate(data) if byte in _WHITE), None)
        if found is not None:
            return position + found + 1
        position += len(data)
    return position


def _decode(unit: Unit, data: bytes) -> str:
    try:
        return data.decode().removeprefix("\ufeff")  # the byte order mark that some editors write
    except UnicodeDecodeError as error:
        with open(unit.file, "rb") as file:
            offset = _borders(file, unit)[0] + error.start
        raise UserError(
            f"{unit.file!r} is not UTF-8: byte {data[error.start]:#04x} at offset {offset} ({error.reason}); "
            "convert it, e.g. with iconv -t UTF-8"
        ) from error


# -- the documentation of Python -------------------------------------------------------------------------------------

_TOPICS = "pydoc_data/topics.py"
_SKIPPED_FOLDERS = {
    "test", "tests", "idle_test", "idlelib", "turtledemo", "site-packages", "dist-packages", "__pycache__",
}  # fmt: skip


def _list_pydocs() -> list[Unit]:
    root = Path(sysconfig.get_path("stdlib"))
    units = []
    for folder, folders, names in os.walk(root):
        folders[:] = sorted(set(folders) - _SKIPPED_FOLDERS)
        for name in sorted(names):
            if name.endswith(".py"):
                file = Path(folder, name)
                # Syntax does not stop at a piece's border: a module is always one unit.
                units += pieces("pydocs", file.relative_to(root).as_posix(), file, piece=sys.maxsize)
    if not units:
        raise UserError(f"no documentation of Python in {str(root)!r}: this Python has no source files of its library")
    return sorted(units, key=lambda unit: unit.name)


def _parse(data: bytes) -> ast.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # invalid escapes in somebody else's source
        try:
            return ast.parse(data)
        except (SyntaxError, ValueError):  # templates that only look like modules: no documentation in them
            return ast.Module(body=[], type_ignores=[])


def _topics(data: bytes) -> list[str]:
    """The texts of Python's `help()` topics, out of the dictionary that `pydoc_data/topics.py` assigns."""
    for statement in _parse(data).body:
        if isinstance(statement, ast.Assign) and isinstance(statement.value, ast.Dict):
            topics: dict[str, str] = ast.literal_eval(statement.value)
            return [clean_markup(topics[name]) for name in sorted(topics)]
    return []


def _docstrings(data: bytes) -> list[str]:
    """The docstrings of a module: one document of the module and its functions, and one of each class."""
    module = _parse(data)
    classes = [node for node in module.body if isinstance(node, ast.ClassDef)]
    module.body = [node for node in module.body if not isinstance(node, ast.ClassDef)]
    documents = ("\n\n".join(_docstrings_below(node)) for node in (module, *classes))
    return [document for document in documents if document]


def _docstrings_below(root: ast.AST) -> list[str]:
    """The docstrings of a definition and of those inside it, in the order of the source."""
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    nodes = [node for node in ast.walk(root) if isinstance(node, documented)]
    nodes.sort(key=lambda node: getattr(node, "lineno", 0))
    return [clean_markup(text) for node in nodes if (text := ast.get_docstring(node))]


_MARKUP = [
    (re.compile(r"^\s*(>>>|\.\.\.)( .*)?$", re.MULTILINE), ""),  # doctest prompts: code
    (re.compile(r"^\s*\.\. (\w+)::", re.MULTILINE), ""),  # names of directives
    (re.compile(r":[\w:+-]+:`([^`<]*?)(?:<[^`]*>)?`"), r"\1"),  # :class:`Name`, :ref:`text <target>`
    (re.compile(r"^\s*[@:](param|type|return|returns|rtype|raises?|keyword|ivar|cvar)\b", re.MULTILINE), ""),
]


def clean_markup(text: str) -> str:
    """Text without what only a machine reads in it: doctest input, the names of Sphinx roles, directives and fields."""
    for pattern, replacement in _MARKUP:
        text = pattern.sub(replacement, text)
    return text
