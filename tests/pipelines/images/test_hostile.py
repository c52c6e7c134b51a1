"""Archives and images that somebody made to do harm, really built: refused, or left out and counted."""

import gzip
import io
import struct
import tarfile
import tracemalloc
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from md4.errors import UserError
from pipelines.images import Recipe
from pipelines.images.records import FILE_BYTES
from tests.pipelines.pictures import encoded, read_all, some_images, write_mnist, write_parquet, write_tar

RGB = (6, 5, 3)
REFUSE = Recipe("webdataset", RGB)
SKIP = replace(REFUSE, damaged="skip")


def member(name: str, data: bytes = b"", **facts: object) -> tuple[tarfile.TarInfo, bytes]:
    info = tarfile.TarInfo(name)
    info.size = len(data)
    for key, value in facts.items():
        setattr(info, key, value)
    return info, data


def built(file: Path, *members: tuple[tarfile.TarInfo, bytes]) -> Path:
    """A tar of two sound samples with the members between them."""
    first, last = (encoded(image) for image in some_images(2))
    with tarfile.open(file, "w:gz" if file.name.endswith("gz") else "w") as tar:
        for info, data in (member("0.png", first), *members, member("1.png", last)):
            tar.addfile(info, io.BytesIO(data))
    return file


@contextmanager
def little_memory(most: int) -> Iterator[None]:
    tracemalloc.start()
    yield
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < most


HOSTILE = [
    (member("../../outside.png", b"x"), "unsafe name", "leads out"),
    (member("a/../../b.png", b"x"), "unsafe name", "leads out"),
    (member("/etc/cron.d/job", b"x"), "unsafe name", "leads out"),
    (member("C:\\windows\\a.png", b"x"), "unsafe name", "leads out"),
    (member("..\\a.png", b"x"), "unsafe name", "leads out"),
    (member("a.png", type=tarfile.SYMTYPE, linkname="/etc/passwd"), "link or device", "link to '/etc/passwd'"),
    (member("a.png", type=tarfile.LNKTYPE, linkname="0.png"), "link or device", "link to '0.png'"),
    (member("noext", type=tarfile.SYMTYPE, linkname="/etc"), "link or device", "link to '/etc'"),
    (member("a.png", type=tarfile.CHRTYPE, devmajor=1, devminor=3), "link or device", "no plain file"),
    (member("a.png", type=tarfile.FIFOTYPE), "link or device", "no plain file"),
]


@pytest.mark.parametrize("end", ["tar", "tgz"])
@pytest.mark.parametrize(("entry", "reason", "message"), HOSTILE)
def test_members_that_are_no_plain_files(tmp_path, monkeypatch, entry, reason, message, end):
    monkeypatch.chdir(tmp_path)
    file = built(tmp_path / f"a.{end}", entry)
    with pytest.raises(UserError, match=rf"^image '.*a\.{end}: .*{message}.*Set data.damaged=skip") as caught:
        read_all(REFUSE, file)
    assert "\n" not in str(caught.value)
    (found,) = read_all(SKIP, file)
    assert np.array_equal(found.tokens, some_images(2).reshape(2, -1))
    assert found.notes.rejected == {reason: 1}
    assert list(tmp_path.iterdir()) == [file]  # nothing was unpacked


def test_a_sample_with_one_hostile_field_is_left_out_whole(tmp_path):
    image = encoded(some_images(1)[0])
    file = built(tmp_path / "a.tar", member("a.png", image), member("a.cls", type=tarfile.SYMTYPE, linkname="x"))
    (found,) = read_all(SKIP, file)
    assert len(found.tokens) == 2
    assert found.notes.rejected == {"link or device": 1}


def test_folders_and_notes_are_harmless(tmp_path):
    entries = [member("a", type=tarfile.DIRTYPE), member("__meta__/x.json", b"{}"), member("readme", b"text")]
    (found,) = read_all(REFUSE, built(tmp_path / "a.tar", *entries))
    assert len(found.tokens) == 2


def declared(file: Path, size: int) -> None:
    """A tar whose one member says that it has `size` bytes."""
    info = tarfile.TarInfo("a.png")
    info.size = size
    file.write_bytes(info.tobuf(tarfile.GNU_FORMAT) + bytes(4096))


@pytest.mark.parametrize("size", [2**40, 2**62])
def test_a_declared_size_that_is_not_there(tmp_path, size):
    file = tmp_path / "a.tar"
    declared(file, size)
    with little_memory(2**22), pytest.raises(UserError, match=rf"has {size:,} bytes; at most"):
        read_all(REFUSE, file)
    (found,) = read_all(SKIP, file)
    assert found.notes.rejected == {"too large": 1, "damaged archive": 1}


def test_a_size_below_zero(tmp_path):
    """Which would lead back to the same member for ever."""
    file = tmp_path / "a.tar"
    declared(file, 0)
    data = bytearray(file.read_bytes())
    data[124:136] = b"\xff" * 10 + (-512 & 0xFFFF).to_bytes(2, "big")
    data[148:156] = b"%06o\0 " % (sum(data[:148]) + 8 * 32 + sum(data[156:512]))
    file.write_bytes(data)
    with pytest.raises(UserError, match="not a sound tar"):
        read_all(REFUSE, file)


def zeros_gz(file: Path, head: bytes, count: int) -> None:
    """A gzip file of `head` and so many zeros, a thousandth of that on disk."""
    with gzip.open(file, "wb", compresslevel=1) as out:
        out.write(head)
        for _ in range(count // 2**20):
            out.write(bytes(2**20))


def header(size: int, **facts: object) -> bytes:
    info, _ = member("a.bin", **facts)
    info.size = size
    return info.tobuf(tarfile.GNU_FORMAT)


def test_bombs(tmp_path):
    """Small on disk, large when unpacked: as a file, as a header's text, as padding that is only skipped."""
    count = 2**28
    cases = {
        "file": (header(count), "has 268,435,456 bytes; at most"),
        "text of a header": (header(count, type=tarfile.XHDTYPE), "would have to be read at once"),
        "long name": (header(count, type=tarfile.GNUTYPE_LONGNAME), "would have to be read at once"),
    }
    for name, (head, message) in cases.items():
        file = tmp_path / f"{name}.tgz"
        zeros_gz(file, head, count)
        assert file.stat().st_size < count / 200
        with little_memory(2**23), pytest.raises(UserError, match=message):
            read_all(REFUSE, file)
        with little_memory(2**23):
            (found,) = read_all(SKIP, file)
        assert len(found.tokens) == 0
        assert found.notes.rejected["damaged archive"] == 1
    zeros, image = bytes(2**20), encoded(some_images(1)[0])
    file = write_tar(
        tmp_path / "many.tgz", {f"{i}.{e}": d for i in range(80) for e, d in (("png", image), ("txt", zeros))}
    )
    with little_memory(2**24), pytest.raises(UserError, match="unpacks to more than 67,108,864 bytes, 100 times"):
        read_all(REFUSE, file)


@pytest.mark.parametrize("end", ["tar", "tgz"])
def test_truncated_archives(tmp_path, end):
    """Cut anywhere, even where one file ends and the next begins: noticed, and what came before is kept by `skip`."""
    sound = write_tar(tmp_path / f"a.{end}", {f"{i}.png": encoded(image) for i, image in enumerate(some_images(20))})
    data = sound.read_bytes()
    cuts = {512 * 2, 512 * 3, 512 * 7 + 100, len(data) // 2, 10} if end == "tar" else {len(data) // 3, len(data) - 5, 4}
    for cut in cuts:
        sound.write_bytes(data[:cut])
        with pytest.raises(UserError, match=rf"a\.{end}': it is not a sound tar: .*data\.damaged=skip"):
            read_all(REFUSE, sound)
        (found,) = read_all(SKIP, sound)
        assert len(found.tokens) < 20 or cut == len(data) - 5
        assert found.notes.rejected == {"damaged archive": 1}


def test_a_header_damaged_in_the_middle(tmp_path):
    """tarfile takes it for the end."""
    file = write_tar(tmp_path / "a.tar", {f"{i}.png": encoded(image) for i, image in enumerate(some_images(5))})
    data = bytearray(file.read_bytes())
    data[512 * 2 + 20] ^= 1
    file.write_bytes(data)
    with pytest.raises(UserError, match="it has no end, it was cut or damaged"):
        read_all(REFUSE, file)


# -- images ----------------------------------------------------------------------------------------------------------


def png_bomb(side: int) -> bytes:
    """A sound PNG of `side` x `side` black pixels of one bit."""
    packer = zlib.compressobj(9)
    row = bytes(1 + (side + 7) // 8)
    packed = b"".join(packer.compress(row) for _ in range(side)) + packer.flush()

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", packed) + chunk(b"IEND", b"")


def test_absurd_pixel_counts(tmp_path):
    bomb = png_bomb(20_000)
    assert len(bomb) < 10**5
    file = built(tmp_path / "a.tar", member("a.png", bomb))
    with little_memory(2**22), pytest.raises(UserError, match=r"a\.png': it is too large .*data\.damaged=skip"):
        read_all(REFUSE, file)
    (found,) = read_all(replace(SKIP, fit="crop"), file)
    assert found.notes.rejected == {"too large": 1}


def test_formats_that_run_programs_are_no_images(tmp_path):
    script = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 5 6\n%%EndComments\nshowpage\n%%EOF\n"
    with pytest.raises(UserError, match="no image of a known format"):
        read_all(REFUSE, built(tmp_path / "a.tar", member("a.png", script)))


def test_huge_files_of_images(tmp_path):
    (tmp_path / "folder").mkdir()
    with open(tmp_path / "folder" / "a.png", "wb") as file:
        file.truncate(FILE_BYTES + 1)
    with little_memory(2**22), pytest.raises(UserError, match=r"a\.png': its file has 67,108,865 bytes"):
        read_all(Recipe("images", RGB), tmp_path / "folder")
    file = write_parquet(tmp_path / "a.parquet", [bytes(FILE_BYTES + 1)])
    with pytest.raises(UserError, match=r"row 0': its file has 67,108,865 bytes"):
        read_all(Recipe("image-parquet", RGB), file)


@pytest.mark.parametrize("end", ["", ".gz"])
def test_an_idx_header_that_promises_too_much(tmp_path, end):
    write_mnist(tmp_path, end=end)
    file = tmp_path / f"train-images-idx3-ubyte{end}"
    data = bytearray(gzip.decompress(file.read_bytes()) if end else file.read_bytes())
    data[8:16] = b"\xff" * 8
    file.write_bytes(gzip.compress(data) if end else data)
    with little_memory(2**22), pytest.raises(UserError, match=r"truncated.*promises"):
        read_all(Recipe("idx", (28, 28, 1)), tmp_path)
