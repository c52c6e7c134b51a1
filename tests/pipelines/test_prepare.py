import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from md4.errors import UserError
from pipelines import ngrams
from pipelines.config import DataConfig, prepared_path
from pipelines.manifest import MANIFEST, Manifest
from pipelines.part_shards import assign
from pipelines.prepare import prepare
from pipelines.shards import ShardSet, verify
from pipelines.vocabularies import Characters
from tests.pipelines.test_shards import damage

WORDS = ["the", "of", "masked", "diffusion", "token", "and", "reveals", "a", "number", "order", "seed", "worker"]


def quietly(_: str) -> None:
    pass


def write_corpus(folder: Path, files: int = 6, words: int = 400, seed: int = 0) -> Path:
    """Text files of random words, each with a name of its own in it."""
    folder.mkdir(parents=True, exist_ok=True)
    generator = np.random.default_rng(seed)
    for number in range(files):
        name = "document" + "".join(chr(ord("a") + int(digit)) for digit in f"{number:03d}")
        text = " ".join([name, *generator.choice(WORDS, words)])
        (folder / f"{number:03d}.txt").write_text(text)
    return folder


def config(corpus: Path, directory: Path, **changes) -> DataConfig:
    small = {"length": 32, "part_bytes": 4000, "rows_per_group": 8, "rows_per_shard": 32, "document_chars": 500}
    return DataConfig(
        **{"source": "text", "path": str(corpus), "directory": str(directory), **small, **changes}  # type: ignore[arg-type]
    )


def contents(root: Path) -> dict[str, bytes]:
    """Everything below a folder, by path, but for the report: it has the time that was taken."""
    files = {str(file.relative_to(root)): file for file in sorted(root.rglob("*")) if file.is_file()}
    return {path: file.read_bytes() for path, file in files.items() if not path.startswith("report.")}


def test_reading_processes_need_no_torch():
    """Importing it takes seconds of a core in each of Ray's processes."""
    code = "import sys, pipelines.prepare, pipelines.ray_data; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=120).returncode == 0


# -- whole preparations ----------------------------------------------------------------------------------------------


@pytest.mark.ray
def test_every_document_is_whole_in_one_split(ray_cluster, tmp_path):
    corpus = write_corpus(tmp_path / "corpus", files=30, words=60)
    data = config(corpus, tmp_path, part_bytes=10**6, document_chars=10**4, validation=0.2, test=0.2)
    root = prepare(data, quietly)
    manifest = verify(root)

    texts = [file.read_text() for file in corpus.iterdir()]
    found = 0
    for name, split in manifest.splits.items():
        mine = [text for text in texts if assign(text, 0.2, 0.2)[0] == name]
        stream = " ".join(mine)
        assert split.documents == len(mine)
        assert split.characters == sum(map(len, mine))
        assert split.tokens == len(stream) == split.rows * 32 + split.dropped_tokens
        assert 0 <= split.dropped_tokens < 32
        files = sorted((root / name).iterdir())
        rows = np.concatenate([ShardSet(root, name).read(np.arange(split.rows))]) if files else np.empty((0, 32))
        assert [shard.path for shard in split.shards] == [str(file.relative_to(root)) for file in files]
        assert len(rows) == split.rows
        decoded = " " + Characters().decode(in_file_order(root, name)) + " "
        whole = [text for text in mine if f" {text} " in decoded]
        assert len(whole) >= len(mine) - 1  # the last one loses its end to the rows' length
        found += len(whole)
    assert found >= 27


def in_file_order(root: Path, split: str) -> np.ndarray:
    """All tokens of a split as plain pyarrow finds them in the sorted files."""
    tokens = [pq.read_table(file)["tokens"].combine_chunks().flatten() for file in sorted((root / split).iterdir())]
    return np.concatenate([column.to_numpy() for column in tokens])


@pytest.mark.ray
def test_equal_documents_and_the_order_of_files(ray_cluster, tmp_path):
    """Documents are shuffled by their hashes: in one part, the names of the files do not matter."""
    corpus = write_corpus(tmp_path / "corpus", files=8)
    renamed = tmp_path / "renamed"
    renamed.mkdir()
    for number, file in enumerate(sorted(corpus.iterdir(), reverse=True)):
        (renamed / f"{number}.txt").write_bytes(file.read_bytes())
    sets = [prepare(config(folder, tmp_path, part_bytes=10**6), quietly) for folder in (corpus, renamed)]
    first, second = (Manifest.load(root) for root in sets)
    assert sets[0] != sets[1]
    assert first.fingerprint == second.fingerprint


@pytest.mark.ray
def test_the_manifest_has_the_entropies_of_the_train_split(ray_cluster, tmp_path):
    root = prepare(config(write_corpus(tmp_path / "corpus"), tmp_path), quietly)
    train = ShardSet(root)
    assert train.manifest.ngrams is not None
    rows = train.read(np.arange(train.rows))
    assert train.manifest.ngrams.model_dump() == ngrams.entropies(ngrams.count_trigrams([rows], 27))
    bits = train.manifest.ngrams
    assert 0 < bits.trigram < bits.bigram < bits.unigram < np.log2(27)


PREPARE = """
import os, sys
from orchestration.cluster import start_local
from pipelines.config import DataConfig
from pipelines.prepare import prepare
start_local(num_cpus=1)
prepare(DataConfig.model_validate_json(sys.argv[1]))
"""


@pytest.mark.ray
@pytest.mark.parametrize("deduplicate", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_killed_in_the_middle_and_finished_on_other_cpus(ray_cluster, tmp_path, deduplicate):
    """A run on one CPU is killed after its first part; the run that goes on here, on four, ends with the same bytes.

    Where documents are compared first, it is killed while it hashes them.
    """
    corpus = write_corpus(tmp_path / "corpus", files=60, words=700)
    if deduplicate:
        (corpus / "copy.txt").write_bytes((corpus / "007.txt").read_bytes())
    killed = config(corpus, tmp_path / "killed", deduplicate=deduplicate)
    root = prepared_path(killed)
    process = subprocess.Popen([sys.executable, "-c", PREPARE, killed.model_dump_json()], stdout=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 120
        folder = root / ("duplicates" if deduplicate else "parts")
        while not list(folder.glob("*.json")):
            assert process.poll() is None, "the preparation ended before it could be killed"
            assert time.monotonic() < deadline
            time.sleep(0.002)
    finally:
        process.kill()
        process.wait()
    done = {file: file.stat().st_mtime_ns for file in folder.glob("*.json")}
    assert not (root / MANIFEST).exists()
    with pytest.raises(UserError, match="is not a prepared set"):
        ShardSet(root)

    said: list[str] = []
    assert prepare(killed, said.append) == root
    ready = "parts were hashed before" if deduplicate else "parts were ready from before"
    assert any(f"{len(done)} of " in line and ready in line for line in said)
    assert all(file.stat().st_mtime_ns == stamp for file, stamp in done.items())

    fresh = prepare(config(corpus, tmp_path / "fresh", deduplicate=deduplicate), quietly)
    assert {path: data for path, data in contents(root).items() if not path.endswith(".tmp")} == contents(fresh)
    assert len(list((fresh / "parts").iterdir())) > 20
    verify(root)


@pytest.mark.ray
@pytest.mark.slow
def test_one_cpu_and_four_give_the_same_files(ray_cluster, tmp_path):
    corpus = write_corpus(tmp_path / "corpus", files=20)
    alone = config(corpus, tmp_path / "alone")
    subprocess.run([sys.executable, "-c", PREPARE, alone.model_dump_json()], check=True, timeout=200)
    assert contents(prepared_path(alone)) == contents(prepare(config(corpus, tmp_path / "together"), quietly))


@pytest.fixture
def finished(ray_cluster, tmp_path):
    """A configuration whose set is prepared, and the set's folder."""
    data = config(write_corpus(tmp_path / "corpus"), tmp_path / "data")
    return data, prepare(data, quietly)


@pytest.mark.ray
def test_a_finished_set_is_left_alone(finished):
    data, root = finished
    stamps = {file: file.stat().st_mtime_ns for file in root.rglob("*")}
    said: list[str] = []
    assert prepare(data, said.append) == root
    assert {file: file.stat().st_mtime_ns for file in root.rglob("*")} == stamps
    assert said == [f"data: {root} is ready"]


@pytest.mark.ray
def test_a_missing_shard_is_made_again(finished):
    data, root = finished
    before = contents(root)
    missing = sorted((root / "train").iterdir())[1]
    missing.unlink()
    said: list[str] = []
    prepare(data, said.append)
    assert contents(root) == before
    assert any("is missing" in line for line in said)


@pytest.mark.ray
def test_an_unfinished_set_with_a_damaged_shard_and_leftovers(finished):
    """As a crash of the machine may leave it: shards are trusted by their hashes only."""
    data, root = finished
    before = contents(root)
    (root / MANIFEST).unlink()
    damage(sorted((root / "train").iterdir())[0], 40)
    (root / "parts" / "00001.json").write_text('{"config": "torn')
    for orphan in ("train/00000-0009.parquet", "test/00099-0000.parquet", "parts/00099.json"):
        (root / orphan).parent.mkdir(exist_ok=True)
        (root / orphan).write_bytes(b"of an earlier corpus")
    old, new = root / "train" / "old.tmp", root / "train" / "new.tmp"
    old.write_bytes(b"x")
    new.write_bytes(b"x")
    os.utime(old, (0, 0))
    prepare(data, quietly)
    assert new.exists()  # perhaps somebody writes it now
    new.unlink()
    assert contents(root) == before


@pytest.mark.ray
def test_a_changed_corpus_is_not_mixed_with_what_was_prepared(finished, tmp_path):
    data, root = finished
    before = contents(root)
    file = tmp_path / "corpus" / "001.txt"
    text = file.read_text()
    os.utime(file)  # touched, not changed
    assert prepare(data, quietly) == root

    for changed in (text.replace("the", "eht"), text + " more"):
        file.write_text(changed)
        with pytest.raises(UserError, match=r"corpus .* has changed since .* was prepared"):
            prepare(data, quietly)
    file.write_text(text)
    (tmp_path / "corpus" / "new.txt").write_text("one more")
    with pytest.raises(UserError, match="has changed"):
        prepare(data, quietly)
    assert contents(root) == before


@pytest.mark.ray
def test_a_finished_set_outlives_its_corpus(finished, tmp_path):
    data, root = finished
    (tmp_path / "corpus").rename(tmp_path / "moved")
    said: list[str] = []
    assert prepare(data, said.append) == root
    assert "its corpus cannot be looked at" in said[0]


@pytest.mark.ray
def test_bytes_that_are_not_utf8_stop_the_preparation(ray_cluster, tmp_path):
    corpus = write_corpus(tmp_path / "corpus", files=3)
    (corpus / "bad.txt").write_bytes(b"some words caf\xe9")
    data = config(corpus, tmp_path)
    with pytest.raises(UserError, match=r"bad.txt' is not UTF-8: byte 0xe9 at offset 14") as caught:
        prepare(data, quietly)
    assert "\n" not in str(caught.value)
    assert not (prepared_path(data) / MANIFEST).exists()
    (corpus / "bad.txt").write_text("some words café")
    verify(prepare(data, quietly))


@pytest.mark.ray
def test_a_corpus_that_is_too_small(ray_cluster, tmp_path):
    (tmp_path / "small.txt").write_text("eight by" * 2)
    with pytest.raises(UserError, match=r"too small: its train split has 16 tokens in 1 part\(s\), .* needs 32"):
        prepare(config(tmp_path / "small.txt", tmp_path, validation=0, test=0), quietly)


@pytest.mark.ray
def test_a_manifest_of_a_newer_version_is_not_touched(finished):
    data, root = finished
    file = root / MANIFEST
    file.write_text(json.dumps(json.loads(file.read_text()) | {"version": 99}))
    with pytest.raises(UserError, match="version 99"):
        prepare(data, quietly)
    assert json.loads(file.read_text())["version"] == 99
