"""webdataset's tars, taken on trust in nothing: no file is unpacked to a disk, and all that is read is bounded.

Refused, or left out as `data.damaged` says: names that lead out of a folder, links, devices and sparse files, files
that are too large, and archives that end too early, are damaged, or unpack to very much more than they are.
"""

import gzip
import io
import json
import os
import re
import tarfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from md4.errors import UserError
from pipelines.images.records import FILE_BYTES, IMAGE_SUFFIXES, Record, Rejected, files_below
from pipelines.units import Unit, pieces

TAR_SUFFIXES = (".tar", ".tar.gz", ".tgz")
_FREE_BYTES, _RATIO = 2**26, 100  # an archive may unpack to this many bytes, or to so many times its size
_META = re.compile(r"__[^/]*__($|/)")  # webdataset's own notes in an archive


def list_tars(root: Path) -> list[Unit]:
    """A unit for each tar; UserError if there are none."""
    units = []
    for name, file, split in files_below(root, TAR_SUFFIXES, "tar"):
        units += pieces("webdataset", name, file, piece=2**62, split=split)
    if not units:
        raise UserError(f"the tars in {str(root)!r} are empty")
    return units


def tar_records(unit: Unit) -> Iterator[Record]:
    """The samples of a tar; UserError for one without an image or with a label that is no number.

    What must not be used comes as a record that says so.
    """
    from webdataset.tariterators import group_by_keys

    aside: list[Record] = []
    try:
        with open(unit.file, "rb") as file:
            for sample in group_by_keys(_members(unit.file, file, aside)):
                yield from _drained(aside)
                if None not in sample.values():  # else it has been said already why it is left out
                    yield _record(f"{unit.file}: {sample['__key__']}", sample)
    except (tarfile.TarError, ValueError, EOFError, zlib.error, gzip.BadGzipFile) as error:
        what = str(error.args[0] if error.args else error)
        yield from _drained(aside)
        yield Record(unit.file, Rejected("damaged archive", f"it is not a sound tar: {what}"), None)
    except OSError as error:
        raise UserError(f"cannot read {unit.file!r}: {error.strerror or error}") from error
    yield from _drained(aside)


def _drained(aside: list[Record]) -> Iterator[Record]:
    yield from aside
    aside.clear()


def _record(name: str, sample: dict[str, Any]) -> Record:
    key = next((key for key in sample if "." + key.rpartition(".")[2] in IMAGE_SUFFIXES), None)
    if key is None:
        fields = ", ".join(key for key in sample if not key.startswith("__")) or "none"
        raise UserError(f"sample {name!r} has no image: its fields are {fields}")
    return Record(f"{name}.{key}", sample[key], _label(name, sample))


def _label(name: str, sample: dict[str, Any]) -> int | None:
    try:
        if "cls" in sample:
            return int(sample["cls"])
        facts = json.loads(sample.get("json", b"{}"))
        return int(facts["label"]) if isinstance(facts, dict) and "label" in facts else None
    except (ValueError, TypeError, RecursionError) as error:
        raise UserError(f"sample {name!r}: its label is not a number ({error})") from error


# -- members ---------------------------------------------------------------------------------------------------------


def _members(name: str, file: BinaryIO, aside: list[Record]) -> Iterator[dict[str, Any]]:
    """The files in an archive as webdataset groups them: `fname` and `data`.

    A member that must not be used goes to `aside`, and has the data None.
    """
    content = _Bounded(file)
    archive = tarfile.TarFile(fileobj=content)
    while (member := archive.next()) is not None:
        if member.size < 0:
            raise tarfile.ReadError(f"{member.name!r} has a size below zero")
        archive.members = []  # type: ignore[attr-defined] - it would keep all of them
        if member.isdir() or _META.match(member.name):
            continue
        data = None
        refused = _why_not(member)
        if refused is not None:
            aside.append(Record(f"{name}: {member.name}", refused, None))
        else:
            opened = archive.extractfile(member)
            assert opened is not None
            data = opened.read()
            if len(data) < member.size:
                raise tarfile.ReadError("unexpected end of data")
        yield {"fname": member.name, "data": data, "__url__": name}
    # tarfile ends without a word at whatever is no header; the right end is a block of zeros.
    content.seek(archive.offset)
    if content.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
        raise tarfile.ReadError("it has no end, it was cut or damaged")
    while content.read(2**20):  # gzip's checksum comes last
        pass


def _why_not(member: tarfile.TarInfo) -> Rejected | None:
    """Why a member must not be used; None for a plain file with a plain name."""
    parts = re.split(r"[/\\]", member.name)
    if parts[0] == "" or ".." in parts or re.match(r"[A-Za-z]:", member.name):
        return Rejected("unsafe name", "its name leads out of the archive's folder")
    if member.issym() or member.islnk():
        return Rejected("link or device", f"it is a link to {member.linkname!r}")
    if not member.isreg() or member.issparse():
        return Rejected("link or device", "it is no plain file")
    if member.size > FILE_BYTES:
        return Rejected("too large", f"it has {member.size:,} bytes; at most {FILE_BYTES:,} are read")
    return None


class _Bounded(io.RawIOBase):
    """The content of an archive, unpacked if it is packed. Reading very much of it, at once or in all, is an error."""

    def __init__(self, file: BinaryIO):
        packed = file.read(2) == b"\x1f\x8b"
        self._size = file.seek(0, os.SEEK_END)
        self._most = max(_FREE_BYTES, _RATIO * self._size)
        file.seek(0)
        self._content: Any = gzip.GzipFile(fileobj=file) if packed else file

    def read(self, size: int = -1) -> bytes:
        # Headers may ask for as much as they like; the files themselves have been looked at before.
        if not 0 <= size <= FILE_BYTES + tarfile.BLOCKSIZE:
            raise tarfile.ReadError(f"{size:,} bytes would have to be read at once")
        data = self._content.read(size)
        self._check()
        return data

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        # Step by step: skipping what is packed means unpacking it.
        while whence == os.SEEK_SET and isinstance(self._content, gzip.GzipFile) and self._content.tell() < offset:
            if not self.read(min(offset - self._content.tell(), 2**20)):
                break
        if whence == os.SEEK_SET and not isinstance(self._content, gzip.GzipFile) and offset > self._size:
            raise tarfile.ReadError("unexpected end of data")
        place = self._content.seek(offset, whence)
        self._check()
        return place

    def tell(self) -> int:
        return self._content.tell()

    def _check(self) -> None:
        if isinstance(self._content, gzip.GzipFile) and self._content.tell() > self._most:
            raise tarfile.ReadError(f"it unpacks to more than {self._most:,} bytes, {_RATIO} times its size")
