"""Duplicates are found exactly: against a set of texts, for any parts and buckets."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipelines import cleaning, duplicates
from pipelines.config import DataConfig
from pipelines.part_records import Job, Whole
from pipelines.storage import Folder
from pipelines.texts import read_texts
from pipelines.units import Unit

corpora = st.lists(
    st.lists(st.tuples(st.integers(0, 9), st.sampled_from([None, "train", "validation", "test"])), max_size=8),
    min_size=1,
    max_size=5,
)


def write_parts(folder: Path, corpus: list[list[tuple[int, str | None]]]) -> list[list[Unit]]:
    """Parts whose documents are files: equal ones for equal numbers, and some that are empty once normalised."""
    parts = []
    for number, documents in enumerate(corpus):
        units = []
        for index, (which, split) in enumerate(documents):
            file = folder / f"{number}-{index}.txt"
            file.write_text("!!" if which == 9 else f"Text {'abcdefghi'[which]}" + "." * index)  # equal when normalised
            units.append(Unit("text", str(file), file.name, 0, file.stat().st_size, file.stat().st_mtime_ns, split))
        parts.append(units)
    return parts


def oracle(corpus: list[list[tuple[int, str | None]]]) -> list[set[int]]:
    """Of each part the documents to leave out, by their numbers."""
    ranks = {"test": 0, "validation": 1}
    every = [
        (ranks.get(split or "", 2), part, number, which)
        for part, documents in enumerate(corpus)
        for number, (which, split) in enumerate(documents)
        if which != 9
    ]
    seen: set[int] = set()
    left: list[set[int]] = [set() for _ in corpus]
    for _, part, number, which in sorted(every):
        if which in seen:
            left[part].add(number)
        seen.add(which)
    return left


def job(root: Path) -> Job:
    config = DataConfig(source="text", path="unused", deduplicate=True)
    whole = Whole(own_splits=[], class_names=None)
    return Job(Folder(root), "digest", config, whole, cleaning.pickled([]))


@settings(max_examples=30, deadline=None)
@given(corpora, st.sampled_from([1, 2, 8]))
def test_duplicates_are_those_of_a_set(tmp_path_factory, corpus, buckets):
    root = tmp_path_factory.mktemp("set")
    parts, work = write_parts(root, corpus), job(root)
    assert [duplicates.hash_part(work, number, part) for number, part in enumerate(parts)] == [False] * len(parts)
    assert [duplicates.hash_part(work, number, part) for number, part in enumerate(parts)] == [True] * len(parts)
    for again in (False, True):
        for bucket in range(buckets):
            assert duplicates.compare_bucket(Folder(root), bucket, buckets, len(parts), "d") is again
    found = [duplicates.left_out(Folder(root), number, buckets) for number in range(len(parts))]
    assert [set(rows[:, 0].tolist()) for rows in found] == oracle(corpus)
    for part, rows in enumerate(found):
        for number, first_part, first, held_out in rows.tolist():
            assert held_out == (corpus[first_part][first][1] in ("validation", "test"))
            assert corpus[part][number][0] == corpus[first_part][first][0]
            assert first not in found[first_part][:, 0]


def test_numbers_are_those_of_the_texts(tmp_path):
    (part,) = write_parts(tmp_path, [[(1, None), (9, None), (2, None)]])
    found = read_texts(part, job(tmp_path).config, [])
    assert [(text.number, text.name) for text in found.texts] == [(0, "0-0.txt"), (2, "0-2.txt")]
    assert [(record.name, record.reason) for record in found.rejected] == [("0-1.txt", "empty")]


def test_damaged_hashes_are_made_again(tmp_path):
    (part,) = write_parts(tmp_path, [[(1, None), (2, None)]])
    work = job(tmp_path)
    duplicates.hash_part(work, 0, part)
    file = tmp_path / duplicates.hashes_file(0)
    sound = file.read_bytes()
    file.write_bytes(sound[:-1] + b"x")
    assert not duplicates.hash_part(work, 0, part)
    assert file.read_bytes() == sound
    Path(part[0].file).write_text("other")
    (changed,) = [[Unit(u.kind, u.file, u.name, 0, Path(u.file).stat().st_size, 1, None) for u in part]]
    assert not duplicates.hash_part(work, 0, changed)


@pytest.mark.parametrize(("documents", "buckets"), [(0, 1), (2**20, 1), (2**20 + 1, 2), (10**7, 16), (10**12, 256)])
def test_buckets_hold_about_a_million(documents, buckets):
    assert duplicates.bucket_count(documents) == buckets


def test_the_digest_of_what_is_left_out():
    none, some = np.empty((0, 4), np.int64), np.array([[4, 0, 1, 0]])
    assert duplicates.digest(none) == ""
    assert len({duplicates.digest(some), duplicates.digest(some + 1), ""}) == 3
