"""Folders on this machine and in S3 (a real server behind a real proxy): the same for whoever reads and writes."""

import os
import pickle
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from md4.errors import UserError
from pipelines import storage
from pipelines.storage import Entry, Folder, Retries, coalesced, location
from tests.s3 import BUCKET, KINDS

ROOT = f"s3://{BUCKET}/some/prefix"
QUICK = Retries(attempts=4, first=0.01, longest=0.05, timeout=5)


@pytest.fixture(params=["local", "s3"])
def folder(request, tmp_path):
    if request.param == "local":
        return Folder(tmp_path / "folder")
    request.getfixturevalue("s3")
    return Folder(ROOT)


def test_reading_what_was_written(folder):
    assert folder.list() == {}
    assert not folder.exists("a/b.bin")
    data = bytes(range(256)) * 50
    folder.write("a/b.bin", b"old")
    folder.write("a/b.bin", data)
    folder.write("ab", b"")
    assert folder.read("a/b.bin") == data
    assert folder.read("ab") == b""
    assert folder.size("a/b.bin") == len(data)
    assert folder.exists("a/b.bin")
    assert not folder.exists("a")
    listed = folder.list()
    assert [(name, entry.size) for name, entry in listed.items()] == [("a/b.bin", len(data)), ("ab", 0)]
    assert isinstance(listed["ab"], Entry)
    assert list(folder.list("a")) == ["a/b.bin"]
    assert list((folder / "a").list()) == ["b.bin"]
    assert (folder / "a").read("b.bin") == data
    assert folder.read_ranges("a/b.bin", [(3, 7), (1000, 1001), (5, 5)]) == [data[3:7], data[1000:1001], b""]
    with folder.open("a/b.bin") as file:
        assert file.seek(-4, os.SEEK_END) == len(data) - 4
        assert file.read() == data[-4:]
        file.seek(300)
        assert file.read(8) == data[300:308]
    copy = pickle.loads(pickle.dumps(folder))
    assert copy == folder
    assert copy.read("ab") == b""
    folder.remove("a/b.bin")
    folder.remove("a/b.bin")
    assert list(folder.list()) == ["ab"]


def test_a_file_is_created_once(folder):
    folder.create("a/first", b"one")
    folder.create("a/first", b"one")  # said twice: a lost answer may make it so
    with pytest.raises(FileExistsError):
        folder.create("a/first", b"two")
    assert folder.read("a/first") == b"one"
    assert list(folder.list()) == ["a/first"]


def test_updates_of_many_are_not_lost(folder):
    def add(old: bytes | None) -> bytes:
        return str(int(old or b"0") + 1).encode()

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda _: folder.update("count", add), range(24)))
    assert folder.read("count") == b"24"
    folder.update("count", lambda old: None)
    assert folder.read("count") == b"24"
    folder.remove_all()
    assert folder.list() == {}


@pytest.mark.parametrize("kind", KINDS)
def test_updates_and_creations_survive_every_kind_of_failure(s3, kind):
    folder = Folder(ROOT)
    s3.fails(0.5, (kind,), seed=3)
    for number in range(8):
        folder.create(f"file-{number}", b"x")
    for number in range(8):
        # Whoever decides by what is there decides again after a lost answer: the change must bear that.
        folder.update("newest", lambda old, number=number: str(max(int(old or b"0"), number)).encode())
    s3.fails(0)
    assert folder.read("newest") == b"7"
    assert len(folder.list()) == 9


def test_what_is_not_there(folder):
    folder.write("there", b"1234")
    for ask in (folder.read, folder.size, folder.open, lambda name: folder.read_ranges(name, [(0, 1)])):
        with pytest.raises(FileNotFoundError, match="absent"):
            ask("absent")
    with pytest.raises((OSError, UserError)):
        folder.read_ranges("there", [(2, 9)])


def test_pyarrow_and_its_file_system(folder):
    table = pa.table({"number": list(range(1000))})
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink)
    folder.write("sets/a.parquet", sink.getvalue().to_pybytes())
    files, path = pickle.loads(pickle.dumps(folder.arrow()))
    assert pq.read_table(f"{path}/sets", filesystem=files).equals(table)


def test_more_objects_than_one_answer_lists(s3, monkeypatch):
    monkeypatch.setattr("pipelines.s3._PAGE", 3)
    for number in range(10):
        s3.ask("PUT", f"/{BUCKET}/some/prefix/{number:04d}", b"x")
    assert list(Folder(ROOT).list()) == [f"{number:04d}" for number in range(10)]
    assert len(s3.asked) == 4


@pytest.mark.parametrize("wrong", ["s3://", "s3:/bucket/path", "http://host/path", "gs://bucket", "s3://a//b"])
def test_urls_of_other_kinds_are_refused(wrong):
    with pytest.raises(UserError, match=r"neither a local path nor a url of the form s3://bucket/prefix"):
        Folder(wrong)


def test_names():
    folder = Folder("s3://bucket/some/") / "set"
    assert (str(folder), folder.name, folder.path("a/b")) == ("s3://bucket/some/set", "set", "s3://bucket/some/set/a/b")
    assert str(Folder("s3://bucket").absolute()) == "s3://bucket"
    assert str(Folder("data").absolute()) == os.path.abspath("data")
    assert str(location("data/sub")) == "data/sub"


def test_spans_are_joined():
    assert coalesced([(50, 60), (0, 10), (12, 20), (55, 57)], gap=2) == [(0, 20), (50, 60)]
    assert coalesced([]) == []


# -- failures --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_failure_passes(s3, kind):
    """Half of all requests fail; with 20 attempts for each of some 60, chance leaves one without once in 10^4."""
    folder = Folder(ROOT, Retries(attempts=20, first=0.002, longest=0.01, timeout=5))
    s3.fails(0.5, (kind,))
    for number in range(6):
        data = bytes([number]) * (1000 + number)
        folder.write(f"{number}", data)
        assert folder.read(f"{number}") == data
        assert folder.read_ranges(f"{number}", [(10, 20), (700, 900)]) == [data[10:20], data[700:900]]
    assert [entry.size for entry in folder.list().values()] == [1000 + number for number in range(6)]
    assert s3.failed[kind] >= 5
    s3.fails(0)
    assert s3.objects() == [f"some/prefix/{number}" for number in range(6)]


def test_giving_up_says_why(s3):
    folder = Folder(ROOT, QUICK)
    folder.write("old", b"whole")
    for kind, why in (("slow down", "SlowDown"), ("error", "InternalError"), ("no answer", "."), ("truncated", ".")):
        s3.fails(1, (kind,))
        with pytest.raises(UserError, match=rf"s3://bucket/some/prefix/old: given up after 4 attempts.*{why}"):
            folder.read("old")
        assert 4 <= len(s3.asked) <= 8  # a kept connection that was closed is no attempt
    s3.fails(1, ("error",), only="^PUT")
    with pytest.raises(UserError, match="given up"):
        folder.write("old", b"other")
    assert folder.read("old") == b"whole"


def test_an_endpoint_that_is_silent(s3):
    """A server that takes too long counts as failed after `timeout`."""
    folder = Folder(ROOT, Retries(attempts=2, first=0.01, timeout=0.04))
    folder.write("a", b"1")
    s3.fails(1, ("late",))
    with pytest.raises(UserError, match=r"given up after 2 attempts.*imeout"):
        folder.read("a")


def test_what_another_attempt_would_not_change_is_said_at_once(s3, monkeypatch):
    folder = Folder(ROOT)
    with pytest.raises(FileNotFoundError):
        folder.read("absent")
    assert len(s3.asked) == 1
    nowhere = Folder("s3://no-such-bucket/set")
    for ask in (nowhere.read, nowhere.exists, lambda name: nowhere.write(name, b"1"), nowhere.list):
        with pytest.raises(UserError, match=r"^s3://no-such-bucket/set.*: the bucket 'no-such-bucket' does not exist"):
            ask("x")
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    with pytest.raises(UserError, match=r"^s3://bucket/some/prefix/x: no AWS credentials .* set AWS_PROFILE"):
        folder.read("x")
    monkeypatch.setenv("AWS_PROFILE", "nobody")
    with pytest.raises(UserError, match=r"^s3://bucket/some/prefix/x: .*nobody"):
        folder.read("x")
    monkeypatch.delenv("AWS_PROFILE")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "tests")
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:1")
    with pytest.raises(UserError, match=r"endpoint cannot be reached .*127.0.0.1:1.*AWS_ENDPOINT_URL"):
        folder.read("x")
    monkeypatch.setenv("AWS_ENDPOINT_URL", "127.0.0.1")
    with pytest.raises(UserError, match=r"^s3://bucket/some/prefix/x: .*endpoint"):
        folder.read("x")


def test_waits_grow_and_are_drawn():
    retries = Retries(first=1.0, longest=10.0)
    drawn = [[retries.wait(failures) for _ in range(200)] for failures in range(1, 8)]
    for most, waits in zip([1, 2, 4, 8, 10, 10, 10], drawn, strict=True):
        assert 0.5 * most < max(waits) <= most
        assert min(waits) < 0.5 * most


def test_local_work_needs_no_client_of_s3():
    code = "import sys, pipelines.storage as s; s.Folder('.').list(); sys.exit('botocore' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0


def test_a_failed_write_leaves_the_old_file(tmp_path):
    file = tmp_path / "some" / "file"
    storage.write_atomically(file, b"old")
    with pytest.raises(TypeError):
        storage.write_atomically(file, "text is not bytes")  # type: ignore[arg-type]
    assert file.read_bytes() == b"old"
    assert list(file.parent.iterdir()) == [file]
