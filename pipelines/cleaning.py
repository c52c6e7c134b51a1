"""Cleaning hooks: what is done to the text of every document before it becomes tokens, in the order they are named.

A hook takes a text and returns a text, or None to leave the document out. It has a name of the list below, or is a
user's own function, written `package.module:function`; its module may lie in the folder that the command runs in.
"""

import hashlib
import importlib
import inspect
import os
import pickle
import re
import sys
import sysconfig
import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html.parser import HTMLParser
from types import ModuleType
from typing import cast

from md4.errors import UserError

Clean = Callable[[str], str | None]


def _whitespace(text: str) -> str:
    """Runs of spaces become one, lines lose theirs at both ends, and more than one empty line becomes one."""
    lines = (" ".join(line.split()) for line in text.splitlines())
    return re.sub(r"\n{3,}", "\n\n", "\n".join(lines)).strip()


class _Text(HTMLParser):
    """Gathers what a reader of a page sees."""

    _HIDDEN = ("script", "style")
    _LINES = ("p", "br", "div", "li", "tr", "h1", "h2", "h3", "h4", "h5", "h6")

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.found: list[str] = []
        self._hidden = 0

    def handle_starttag(self, tag: str, attrs: object) -> None:
        self._hidden += tag in self._HIDDEN
        if tag in self._LINES:
            self.found.append("\n")

    def handle_endtag(self, tag: str) -> None:
        self._hidden -= tag in self._HIDDEN and self._hidden > 0

    def handle_data(self, data: str) -> None:
        if not self._hidden:
            self.found.append(data)


def _html(text: str) -> str:
    """Markup, scripts and styles are left out; entities become characters."""
    parser = _Text()
    parser.feed(text)
    parser.close()
    return "".join(parser.found)


BUILT_IN: dict[str, Clean] = {
    "nfc": lambda text: unicodedata.normalize("NFC", text),
    "nfkc": lambda text: unicodedata.normalize("NFKC", text),
    "html": _html,
    "whitespace": _whitespace,
}


@dataclass(frozen=True)
class Hook:
    """One hook, found."""

    name: str
    clean: Clean
    sha256: str = ""  # of the file that a user's function lies in


def find(names: Sequence[str]) -> list[Hook]:
    """The hooks of these names; UserError for one that there is not."""
    return [Hook(name, BUILT_IN[name]) if name in BUILT_IN else _import(name) for name in names]


def _import(name: str) -> Hook:
    known = f"known are {', '.join(BUILT_IN)}, and package.module:function of your own"
    module_name, colon, function = name.partition(":")
    if not colon or not module_name or not function:
        raise UserError(f"data.clean: unknown hook {name!r}; {known}")
    # An installed command does not look into the folder that it runs in.
    sys.path.insert(0, os.getcwd())
    try:
        module = importlib.import_module(module_name)
    except Exception as error:  # whatever the module does while it is imported
        raise UserError(f"data.clean: {name!r} cannot be imported: {type(error).__name__}: {error}; {known}") from error
    finally:
        sys.path.remove(os.getcwd())
    clean = getattr(module, function, None)
    if not callable(clean):
        raise UserError(f"data.clean: module {module_name!r} has no function {function!r}")
    return Hook(name, cast(Clean, clean), _sha256(module))


def _sha256(module: ModuleType) -> str:
    """Of the whole file, for the function may call others in it."""
    file = inspect.getsourcefile(module) if getattr(module, "__file__", None) else None
    if file is None:  # compiled
        return hashlib.sha256(sys.version.encode()).hexdigest()
    with open(file, "rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def pickled(hooks: Sequence[Hook]) -> bytes:
    """The user's functions and what they need, for a process that may not be able to import them."""
    from ray import cloudpickle

    installed = tuple(sysconfig.get_path(place) for place in ("stdlib", "purelib", "platlib"))
    modules = []
    for hook in hooks:
        module = sys.modules.get(hook.name.partition(":")[0]) if hook.sha256 else None
        if module is not None and not (getattr(module, "__file__", None) or "").startswith(installed):
            modules.append(module)
    for module in modules:
        cloudpickle.register_pickle_by_value(module)
    try:
        given = [(hook.name, None if hook.name in BUILT_IN else hook.clean) for hook in hooks]
        return cloudpickle.dumps(given)  # type: ignore
    finally:
        for module in set(modules):
            cloudpickle.unregister_pickle_by_value(module)


def unpickled(data: bytes) -> list[Hook]:
    """What `pickled` was given."""
    return [Hook(name, clean or BUILT_IN[name]) for name, clean in pickle.loads(data)]


def cleaned(text: str, hooks: Sequence[Hook], document: str) -> tuple[str | None, str]:
    """A text after all hooks, and "". Or None, and the name of the hook that left the document out.

    UserError for a hook that raises, or returns something else; `document` is the name it is reported by.
    """
    for hook in hooks:
        try:
            result = hook.clean(text)
        except Exception as error:
            raise UserError(
                f"data.clean: {hook.name!r} raised {type(error).__name__} on the document {document!r}: {error}"
            ) from error
        if result is None:
            return None, hook.name
        if not isinstance(result, str):
            raise UserError(
                f"data.clean: {hook.name!r} must return a str, or None to leave a document out; on the document "
                f"{document!r} it returned {type(result).__name__}"
            )
        text = result
    return text, ""
