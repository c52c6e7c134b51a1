"""The English of the documentation that ships with the running Python; topics, modules, classes are its documents."""

import ast
import os
import re
import sys
import sysconfig
import warnings
from collections.abc import Iterator
from pathlib import Path

from md4.errors import UserError
from pipelines.documents import Document
from pipelines.roots import local_file
from pipelines.units import Unit, pieces

_TOPICS = "pydoc_data/topics.py"
_SKIPPED_FOLDERS = {
    "test", "tests", "idle_test", "idlelib", "turtledemo", "site-packages", "dist-packages", "__pycache__",
}  # fmt: skip


def list_units() -> list[Unit]:
    root = Path(sysconfig.get_path("stdlib"))
    units = []
    for folder, folders, names in os.walk(root):
        folders[:] = sorted(set(folders) - _SKIPPED_FOLDERS)
        for name in sorted(names):
            if name.endswith(".py"):
                file = Path(folder, name)
                # Syntax does not stop at a piece's border: a module is always one unit.
                found = local_file(file, file.relative_to(root).as_posix())
                units += pieces("pydocs", found, piece=sys.maxsize)
    if not units:
        raise UserError(f"no documentation of Python in {str(root)!r}: this Python has no source files of its library")
    return sorted(units, key=lambda unit: unit.name)


def records(unit: Unit, data: bytes) -> Iterator[Document]:
    """The documents in a module of the library."""
    texts = _topics(data) if unit.name == _TOPICS else _docstrings(data)
    for number, text in enumerate(texts):
        yield Document(text, f"{unit.name}:{number}")


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
