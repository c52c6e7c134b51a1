"""Tars of text files.

    text-webdataset  a tar, or a folder of them, as webdataset writes them: the .txt of each sample is a document, and
                     may be packed (.txt.gz)
    text-archives    the archives of OpenWebText: tars of .xz files, each of which is a tar of .txt files

What is refused in a tar is said in `pipelines.archives`.
"""

import io
import lzma
import tarfile
from collections.abc import Iterator

from md4.errors import UserError
from pipelines.archives import DAMAGED, Damaged, members, unpacked
from pipelines.documents import Document, Rejected
from pipelines.roots import Root, opened
from pipelines.text.files import document
from pipelines.text.names import splits_of
from pipelines.units import Unit, pieces

KINDS = ("text-webdataset", "text-archives")
_TEXTS = (".txt", ".txt.gz", ".txt.zst", ".txt.xz")


def list_units(kind: str, root: Root) -> list[Unit]:
    """A unit for each tar, or for each .xz file in one; UserError if there are none."""
    files = root.files((".tar", ".tar.gz", ".tgz"), "tars")
    splits = splits_of(files, root)
    units = []
    for file in files:
        if kind == "text-webdataset":
            units += pieces(kind, file, piece=max(1, file.size), split=splits[file.name])
            continue
        with opened(file.place) as raw:
            try:
                with tarfile.open(fileobj=raw, mode="r:") as archive:
                    units += [
                        Unit(kind, file.place, f"{file.name}/{name}", start, stop, file.stamp, splits[file.name])
                        for name, start, stop in _packed_members(archive, file.size)
                    ]
            except DAMAGED as error:
                raise UserError(f"{file.place!r} is not a sound tar: {error}") from error
    if not units:
        raise UserError(f"the tars in {str(root)!r} hold no text")
    return units


def _packed_members(archive: tarfile.TarFile, size: int) -> Iterator[tuple[str, int, int]]:
    """The .xz files in a tar, and where they lie in it."""
    for member in archive:
        if member.isreg() and not member.issparse() and member.name.endswith(".xz"):
            start, stop = member.offset_data, member.offset_data + member.size
            if not start < stop <= size:
                raise tarfile.ReadError(f"{member.name!r} is cut")
            yield member.name, start, stop


def records(unit: Unit, data: bytes) -> Iterator[Document | Rejected]:
    """The texts in a tar, in its order; other files in it are no records."""
    try:
        packed = unit.kind == "text-archives"
        for member in members(io.BytesIO(unpacked(data, unit.name) if packed else data)):
            name = f"{unit.name}/{member.name}"
            if member.refused is not None:
                yield Rejected(name, member.refused.reason, str(member.refused))
            elif member.data is not None and member.name.lower().endswith(_TEXTS):
                yield _text(member.data, name, unit)
    except (Damaged, lzma.LZMAError, *DAMAGED) as error:
        reason = error.reason if isinstance(error, Damaged) else "damaged archive"
        yield Rejected(unit.name, reason, f"it is not a sound tar: {error}")


def _text(data: bytes, name: str, unit: Unit) -> Document | Rejected:
    try:
        return document(unpacked(data, name), name, unit)
    except Damaged as error:
        return Rejected(name, error.reason, str(error))
