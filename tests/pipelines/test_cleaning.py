"""Cleaning hooks: those that come along, and a user's own, in another process too."""

import subprocess
import sys

import pytest

from md4.errors import UserError
from pipelines import cleaning
from pipelines.config import DataConfig, prepared_path

OWN = """
import re
DIGITS = re.compile("[0-9]+")

def without_digits(text):
    return None if text.startswith("drop") else strip(DIGITS.sub("", text))

def strip(text):
    return text.strip()

def wrong(text):
    return len(text)

def fails(text):
    raise KeyError("no such word")
"""


@pytest.fixture
def own(tmp_path, monkeypatch):
    """A module of the user's own in the working directory."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own_hooks_of_a_test.py").write_text(OWN)
    yield "own_hooks_of_a_test"
    sys.modules.pop("own_hooks_of_a_test", None)


@pytest.mark.parametrize(
    ("name", "text", "clean"),
    [
        ("nfc", "e\u0301", "\u00e9"),
        ("nfkc", "\ufb01ne", "fine"),
        ("whitespace", " a \t b \r\n\n\n\n c  ", "a b\n\nc"),
        ("html", "<p>5 &lt; 6<script>x()</script><br>&eacute;</p><style>p{}</style>", "\n5 < 6\n\u00e9"),
    ],
)
def test_hooks_that_come_along(name, text, clean):
    assert cleaning.cleaned(text, cleaning.find([name]), "a") == (clean, "")


def test_hooks_run_in_their_order(own):
    hooks = cleaning.find(["html", f"{own}:without_digits"])
    assert cleaning.cleaned("<b>12</b> months ", hooks, "a") == ("months", "")
    assert cleaning.cleaned("<b>drop</b>", hooks, "a") == (None, f"{own}:without_digits")


def test_hooks_travel_to_a_process_that_cannot_import_them(own, tmp_path):
    (tmp_path / "pickled").write_bytes(cleaning.pickled(cleaning.find([f"{own}:without_digits", "whitespace"])))
    (tmp_path / f"{own}.py").unlink()
    code = (
        "import sys; from pipelines import cleaning; "
        "print(cleaning.cleaned('7  up', cleaning.unpickled(open('pickled', 'rb').read()), 'a')[0])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, check=True).stdout == b"up\n"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("wrong", "must return a str, or None .* 'doc.txt' it returned int"),
        ("fails", r"'\S+:fails' raised KeyError on the document 'doc.txt': 'no such word'"),
    ],
)
def test_hooks_that_fail(own, name, message):
    with pytest.raises(UserError, match=message):
        cleaning.cleaned("text", cleaning.find([f"{own}:{name}"]), "doc.txt")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nfd", "unknown hook 'nfd'; known are nfc, nfkc, html, whitespace, and package.module:function"),
        ("no_such_module_at_all:f", "cannot be imported: ModuleNotFoundError"),
        ("re:no_such_function", "module 're' has no function 'no_such_function'"),
    ],
)
def test_hooks_that_there_are_not(name, message):
    with pytest.raises(UserError, match=message):
        cleaning.find([name])


def test_a_set_is_named_by_the_source_of_its_hooks(own, tmp_path):
    data = DataConfig(source="text", path="x.txt", clean=(f"{own}:without_digits",))
    before = prepared_path(data)
    assert before == prepared_path(data) != prepared_path(data.model_copy(update={"clean": ()}))
    (tmp_path / f"{own}.py").write_text(OWN.replace("[0-9]", "[0-8]"))
    assert prepared_path(data) != before
