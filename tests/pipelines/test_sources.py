import os
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from md4.errors import UserError
from pipelines.sources import open_source, read, read_piece
from pipelines.text.pydocs import clean_markup
from pipelines.units import Unit
from pipelines.vocabularies import Characters

PIECE = 2**22


def documents(path: Path, piece: int = PIECE) -> list[str]:
    units = open_source("text", str(path)).list_units(piece)
    return [document.text for unit in units for document in read(unit).documents]


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.tuples(st.text("aé日\U0001f600", max_size=12), st.sampled_from([" ", "\n", "\r\n", "\t"]))),
    st.integers(1, 40),
)
def test_pieces_join_to_the_file_at_word_borders(tmp_path_factory, words, piece):
    file = tmp_path_factory.getbasetemp() / "pieces.txt"
    text = "".join(word + space for word, space in words)
    file.write_bytes(text.encode())
    if not text:
        return
    pieces = documents(file, piece)
    assert "".join(pieces) == text
    filled = [text for text in pieces if text]
    assert all(text[-1] in " \n\r\t" for text in filled)


def test_a_file_of_any_name_is_a_document(tmp_path):
    file = tmp_path / "text8"
    file.write_text("the quick brown fox")
    assert documents(file) == ["the quick brown fox"]


def test_a_byte_order_mark_is_not_text(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfwords")
    assert documents(tmp_path) == ["words"]


def test_a_folder_is_read_in_the_order_of_names(tmp_path):
    for name in ("b.txt", "a/z.MD", "a/b/c.txt", "c.md", "a/image.png", "notes"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    assert documents(tmp_path) == ["a/b/c.txt", "a/z.MD", "b.txt", "c.md"]


def test_a_changed_file_has_another_hash(tmp_path):
    file = tmp_path / "a.txt"
    file.write_text("some words")
    unit = open_source("text", str(file)).list_units(PIECE)[0]
    before = read(unit).sha256
    assert read(unit).sha256 == before
    file.write_text("some wards")
    assert read(unit).sha256 != before


# -- what can be wrong -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "path", "message"),
    [
        ("text", None, "needs a text file or a folder"),
        ("text", "/no/such/corpus", "'/no/such/corpus' does not exist"),
        ("pydocs", "/tmp", "takes no path"),
    ],
)
def test_wrong_sources(kind, path, message):
    with pytest.raises(UserError, match=message):
        open_source(kind, path).list_units(PIECE)


def test_a_folder_without_text(tmp_path):
    (tmp_path / "image.png").write_bytes(b"no text")
    with pytest.raises(UserError, match=r"no text in .*ending in \.txt, \.md, or these with \.gz or \.zst"):
        documents(tmp_path)


def test_empty_files(tmp_path):
    (tmp_path / "a.txt").touch()
    (tmp_path / "b.txt").touch()
    with pytest.raises(UserError, match=r"is empty: 2 file\(s\) of 0 bytes"):
        documents(tmp_path)


def test_an_unreadable_file(tmp_path):
    (tmp_path / "gone.txt").symlink_to(tmp_path / "nowhere")
    with pytest.raises(UserError, match=r"cannot read '.*gone.txt': No such file"):
        documents(tmp_path)


def test_a_file_that_cannot_be_opened(tmp_path):
    file = tmp_path / "a.txt"
    file.write_text("words")
    unit = open_source("text", str(tmp_path)).list_units(PIECE)[0]
    file.unlink()
    file.mkdir()
    with pytest.raises(UserError, match=r"cannot read '.*a.txt'"):
        read(unit)


def test_a_file_that_shrank(tmp_path):
    file = tmp_path / "a.txt"
    file.write_text("many words")
    unit = open_source("text", str(file)).list_units(PIECE)[0]
    file.write_text("many")
    with pytest.raises(UserError, match="shrank to 4 bytes"):
        read(unit)


@pytest.mark.parametrize("piece", [PIECE, 20, 50])
def test_bytes_that_are_not_utf8_are_named(tmp_path, piece):
    file = tmp_path / "latin.txt"
    file.write_bytes(b"word " * 20 + "Ångström".encode() + b" caf\xe9 and more words")
    with pytest.raises(UserError, match=r"latin.txt' is not UTF-8: byte 0xe9 at offset 114"):
        documents(file, piece)


# -- the documentation of Python -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pydocs() -> dict[str, list[str]]:
    """Documents by module, read once; also shows that reading imports nothing of what it reads."""
    before = set(sys.modules)
    units = open_source("pydocs", None).list_units(PIECE)
    found = {unit.name: [document.text for document in read(unit).documents] for unit in units}
    assert set(sys.modules) == before
    return found


def test_pydocs_hold_topics_and_docstrings(pydocs):
    topics = " ".join(pydocs["pydoc_data/topics.py"])
    assert "statements are a convenient way to insert debugging assertions" in " ".join(topics.split())
    assert "Remove any common leading whitespace from every line" in "".join(pydocs["textwrap.py"])
    assert len(pydocs["argparse.py"]) > 5  # the module, and its classes one by one


def test_pydocs_are_about_two_million_characters_of_english(pydocs):
    """1.9 million with Python 3.11; between its releases, and where a distribution leaves parts out, it varies."""
    normal = [Characters().normalise(text) for texts in pydocs.values() for text in texts]
    assert 1_000_000 < sum(map(len, normal)) < 4_000_000
    words = " ".join(normal).split()
    assert 0.03 < words.count("the") / len(words) < 0.08
    assert max(map(len, words)) < 120


def test_pydocs_leave_out_tests_and_installed_packages(pydocs):
    folders = {part for name in pydocs for part in name.split("/")[:-1]}
    assert not folders & {"test", "tests", "idlelib", "site-packages", "__pycache__"}
    assert "asyncio" in folders
    assert sorted(pydocs) == list(pydocs)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Return a :class:`Name` of it.", "Return a Name of it."),
        ("See :ref:`the text <some-target>` or :py:meth:`~a.b`.", "See the text  or ~a.b."),
        ("Example:\n    >>> 1 + 1\n    2\n    ...\nEnd", "Example:\n\n    2\n\nEnd"),
        (".. versionadded:: 3.2\n   More.", " 3.2\n   More."),
        (":param name: what it is", " name: what it is"),
        ("@param name: what it is", " name: what it is"),
        ("one ... two: a dictionary::\n", "one ... two: a dictionary::\n"),
    ],
)
def test_markup_is_taken_out(text, expected):
    assert clean_markup(text) == expected


def test_sources_that_do_not_parse_have_no_documents(tmp_path):
    file = tmp_path / "template.py"
    file.write_text("class {{ name }}:\n")
    unit = Unit("pydocs", str(file), "template.py", 0, os.path.getsize(file), 0)
    assert read(unit).documents == []
    assert read_piece(unit) == file.read_bytes()
