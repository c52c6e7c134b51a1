"""Packed files, taken on trust in nothing: nothing is unpacked to a disk, and all that is read is bounded.

Refused, with the reason: names that lead out of a folder, links, devices and sparse files, files that are too large,
and content that ends too early, is damaged, or unpacks to very much more than it is.
"""

import gzip
import io
import lzma
import os
import re
import tarfile
import zlib
from collections.abc import Iterator
from typing import Any, BinaryIO, NamedTuple

import zstandard

FILE_BYTES = 2**26  # of one file in an archive: larger ones are not read
FREE_BYTES, RATIO = 2**26, 100  # anything may unpack to this many bytes, or to so many times its size
PACKED = (".gz", ".zst", ".xz")
_META = re.compile(r"__[^/]*__($|/)")  # webdataset's own notes in an archive
DAMAGED = (tarfile.TarError, ValueError, EOFError, zlib.error, gzip.BadGzipFile)  # what reading an archive may raise


class Damaged(Exception):
    """Packed content that cannot be unpacked: why, in general and in particular."""

    def __init__(self, reason: str, detail: str):
        super().__init__(detail)
        self.reason = reason


def unpacked(data: bytes, name: str) -> bytes:
    """The content of a packed file, or the data as they are where its name does not end in one of PACKED."""
    end = os.path.splitext(name.lower())[1]
    most = max(FREE_BYTES, RATIO * len(data))
    try:
        if end == ".gz":
            content = gzip.GzipFile(fileobj=io.BytesIO(data)).read(most + 1)
        elif end == ".zst":
            content = _unpacked_zst(memoryview(data), most)
        elif end == ".xz":
            with lzma.LZMAFile(io.BytesIO(data)) as file:
                content = file.read(most + 1)
        else:
            return data
    except (OSError, EOFError, zlib.error, lzma.LZMAError, zstandard.ZstdError) as error:
        raise Damaged("damaged archive", f"it cannot be unpacked: {error}") from error
    if len(content) > most:
        raise Damaged("unpacks to too much", f"it unpacks to more than {most:,} bytes, {RATIO} times its size")
    return content


def _unpacked_zst(data: memoryview, most: int) -> bytes:
    """The content of all frames, or somewhat more than `most` bytes of it."""
    parts, size, start = [], 0, 0
    while start < len(data) and size <= most:
        frame = zstandard.ZstdDecompressor(max_window_size=2**27).decompressobj()
        while not frame.eof and size <= most:
            if start >= len(data):
                raise EOFError("it ends too early")
            parts.append(frame.decompress(data[start : start + 2**10]))  # which may become 32 MB
            size += len(parts[-1])
            start = min(start + 2**10, len(data))
        start -= len(frame.unused_data)
    return b"".join(parts)


# -- tars ------------------------------------------------------------------------------------------------------------


class Member(NamedTuple):
    """A file in a tar: its bytes, or why they must not be used."""

    name: str
    data: bytes | None
    refused: Damaged | None = None


def members(file: BinaryIO) -> Iterator[Member]:
    """The files in a tar or tar.gz, in their order. Raises one of DAMAGED where it is not sound."""
    content = _Bounded(file)
    archive = tarfile.TarFile(fileobj=content)
    while (member := archive.next()) is not None:
        if member.size < 0:
            raise tarfile.ReadError(f"{member.name!r} has a size below zero")
        archive.members = []  # type: ignore[attr-defined] - it would keep all of them
        if member.isdir() or _META.match(member.name):
            continue
        refused = _why_not(member)
        if refused is not None:
            yield Member(member.name, None, refused)
            continue
        opened = archive.extractfile(member)
        assert opened is not None
        data = opened.read()
        if len(data) < member.size:
            raise tarfile.ReadError("unexpected end of data")
        yield Member(member.name, data)
    # tarfile ends without a word at whatever is no header; the right end is a block of zeros.
    content.seek(archive.offset)
    if content.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
        raise tarfile.ReadError("it has no end, it was cut or damaged")
    while content.read(2**20):  # gzip's checksum comes last
        pass


def _why_not(member: tarfile.TarInfo) -> Damaged | None:
    """Why a member must not be used; None for a plain file with a plain name."""
    parts = re.split(r"[/\\]", member.name)
    if parts[0] == "" or ".." in parts or re.match(r"[A-Za-z]:", member.name):
        return Damaged("unsafe name", "its name leads out of the archive's folder")
    if member.issym() or member.islnk():
        return Damaged("link or device", f"it is a link to {member.linkname!r}")
    if not member.isreg() or member.issparse():
        return Damaged("link or device", "it is no plain file")
    if member.size > FILE_BYTES:
        return Damaged("too large", f"it has {member.size:,} bytes; at most {FILE_BYTES:,} are read")
    return None


class _Bounded(io.RawIOBase):
    """The content of an archive, unpacked if it is packed. Reading very much of it, at once or in all, is an error."""

    def __init__(self, file: BinaryIO):
        packed = file.read(2) == b"\x1f\x8b"
        self._size = file.seek(0, os.SEEK_END)
        self._most = max(FREE_BYTES, RATIO * self._size)
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
            raise tarfile.ReadError(f"it unpacks to more than {self._most:,} bytes, {RATIO} times its size")
