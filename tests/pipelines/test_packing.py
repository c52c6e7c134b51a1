"""Rows of documents: where every token goes, and windows that overlap."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from md4.errors import UserError
from pipelines import packing, shards
from pipelines.config import DataConfig
from pipelines.full_order import FullOrder
from pipelines.manifest import MANIFEST, Manifest, Split
from pipelines.plan import plan
from pipelines.row_cache import open_rows
from pipelines.shards import ShardSet
from pipelines.storage import Folder
from pipelines.windows import Windows, count
from tests.pipelines.small import write_set

DTYPE = np.dtype(np.uint8)
END = 99
documents = st.lists(st.lists(st.integers(0, 9), max_size=40).map(lambda ids: np.array(ids, np.uint8)), max_size=12)


def flat(some: list[np.ndarray]) -> list[int]:
    return [token for one in some for token in one.tolist()]


@given(documents, st.integers(1, 12))
def test_concatenated_rows_are_the_stream(some, length):
    packed = packing.concatenated(some, length, DTYPE)
    stream = flat(some)
    assert packed.rows.ravel().tolist() == stream[: len(stream) // length * length]
    assert packed.tokens == len(stream) == packed.rows.size + packed.dropped
    assert packed.dropped < length


def test_a_separator_that_is_no_token_does_not_end_the_last_document():
    some = [np.array([1, 2, 0], np.uint8), np.array([3, 0], np.uint8)]
    assert packing.concatenated(some, 2, DTYPE, closed=False).rows.tolist() == [[1, 2], [0, 3]]
    assert packing.streamed(some, 2, 1, END, DTYPE, closed=False).stream == 4


@given(documents, st.integers(1, 12), st.sampled_from(["cut", "split", "drop"]))
def test_one_document_a_row(some, length, long):
    """What stands before the first end of a row is a document, or L tokens of one; nothing is lost unsaid."""
    packed = packing.one_a_row(some, length, END, long, DTYPE)
    assert packed.tokens + packed.padding == packed.rows.size + packed.dropped
    read = []
    for row in packed.rows.tolist():
        end = row.index(END) if END in row else length
        assert row[end:] == [END] * (length - end)
        read.append(row[:end])
    kept = [(number, one.tolist()) for number, one in enumerate(some) if number not in packed.too_long]
    assert packed.padding == sum(max(0, length - len(row) - 1) for row in read)
    if long == "split":
        wanted = [one[at : at + length] for _, one in kept for at in range(0, max(1, len(one)), length)]
    else:
        wanted = [one[:length] for _, one in kept]
    assert read == wanted
    assert packed.too_long == [n for n, one in enumerate(some) if long == "drop" and len(one) > length]
    assert packed.dropped == (sum(max(0, len(one) - length) for one in some) if long == "cut" else 0)


# -- windows ---------------------------------------------------------------------------------------------------------

streams = st.lists(st.integers(0, 90), min_size=1, max_size=4)


@given(streams, st.integers(2, 12), st.data())
def test_every_window_is_a_slice_of_its_stream(sizes, length, data):
    stride = data.draw(st.integers(1, length))
    texts = [np.random.default_rng(size).integers(0, 90, size).astype(np.uint8) for size in sizes]
    packed = [packing.streamed([text] if len(text) else [], length, stride, END, DTYPE) for text in texts]
    wanted = [text[at : at + length] for text in texts for at in range(0, len(text) - length + 1, stride)]
    stored = np.concatenate([one.rows for one in packed])
    windows = Windows(tuple(one.stream for one in packed if one.stream is not None), length, stride)
    assert sum(count(size, length, stride) for size in sizes) == windows.rows == len(wanted)
    ids = np.array(data.draw(st.permutations(range(len(wanted)))), np.int64)
    found = windows.read(ids, lambda rows: stored[rows])
    assert [row.tolist() for row in found] == [wanted[i].tolist() for i in ids]
    for text, one in zip(texts, packed, strict=True):
        seen = {at + i for at in range(0, len(text) - length + 1, stride) for i in range(length)}
        assert one.dropped == len(text) - len(seen)


def test_the_windows_of_text8_are_as_many_as_published():
    assert count(90_000_000, 256, 1) == 90_000_000 - 255
    assert Windows((90_000_000,), 256, 1).rows == 90_000_000 - 255


def write_windows(root, sizes: list[int], length: int = 8, stride: int = 1, group: int = 4) -> list[np.ndarray]:
    """A prepared set whose training rows are windows over streams of these sizes; returns the streams."""
    rng = np.random.default_rng(1)
    texts = [rng.integers(0, 27, size).astype(np.uint8) for size in sizes]
    packed = [packing.streamed([text], length, stride, 0, DTYPE) for text in texts]
    manifest = write_set(root, [one.rows for one in packed], group)
    train = manifest.splits["train"].model_copy(
        update={"rows": sum(count(size, length, stride) for size in sizes), "streams": sizes}
    )
    manifest = manifest.model_copy(update={"packing": "windows", "stride": stride, "splits": {"train": train}})
    manifest = manifest.model_copy(update={"fingerprint": manifest.content_fingerprint()})
    Folder(root).write(MANIFEST, manifest.model_dump_json().encode())
    return texts


@pytest.mark.parametrize("stride", [1, 3])
def test_sets_and_caches_read_windows(tmp_path, monkeypatch, stride):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "temporary"))
    (tmp_path / "temporary").mkdir()
    texts = write_windows(tmp_path / "set", [83, 8, 41, 64], stride=stride)
    wanted = np.stack([text[at : at + 8] for text in texts for at in range(0, len(text) - 7, stride)])
    opened = ShardSet(tmp_path / "set")
    assert opened.rows == len(wanted)
    assert opened.stored_rows == 11 + 1 + 6 + 8
    rows = np.random.default_rng(0).permutation(opened.rows)
    assert np.array_equal(opened.read(rows), wanted[rows])
    cached = open_rows(tmp_path / "set", "train", opened.fingerprint)
    assert np.array_equal(cached.read_labelled(rows)[0], wanted[rows])
    assert opened.read(np.empty(0, np.int64)).shape == (0, 8)
    with pytest.raises(IndexError):
        opened.read(np.array([opened.rows]))
    # Tokens that only fill up are in no count.
    blocks = shards.blocks(tmp_path / "set", opened.manifest.splits["train"], 8)
    assert sum(block.size for block in blocks) == sum(len(text) // 8 * 8 for text in texts)


@settings(max_examples=20, deadline=None)
@given(st.lists(st.integers(8, 60), min_size=1, max_size=3), st.integers(1, 3), st.integers(0, 99))
def test_an_epoch_has_every_window_once(sizes, stride, seed):
    windows = Windows(tuple(sizes), 8, stride)
    order = FullOrder(rows=windows.rows, batch_size=4, slices=2, seed=seed)
    ids = order.rows_at(0, -(-windows.rows // 4)).ravel()[: windows.rows]
    assert sorted(ids.tolist()) == list(range(windows.rows))


def test_windows_are_planned_in_the_full_order(tmp_path):
    write_windows(tmp_path, [4000, 900])
    manifest = Manifest.load(tmp_path)
    order = plan(DataConfig(), [manifest], 16, 8, seed=0).orders[0]
    assert isinstance(order, FullOrder)
    assert order.rows == 4000 + 900 - 14
    with pytest.raises(UserError, match="lanes cannot serve packing=windows"):
        plan(DataConfig(order="lanes"), [manifest], 16, 8, seed=0)
    with pytest.raises(UserError, match=r"cache_mb=0 allows less: set it higher, or data.order=full"):
        plan(DataConfig(cache_mb=0), [manifest], 16, 8, seed=0)
    assert plan(DataConfig(cache_mb=0, order="full"), [manifest], 16, 8, seed=0).orders[0] == order


def test_a_fingerprint_covers_packing_stride_and_streams_and_older_ones_stay(prepared):
    old = Manifest.load(prepared)
    assert old.fingerprint == "17cc9a117646493bf7376d3b17ba667aca338795ff16ecb185670422efc8930a"
    prints = {old.content_fingerprint()}
    train = old.splits["train"].model_copy(update={"streams": [321, 264, 170]})
    for change in (
        {"packing": "document"},
        {"packing": "windows"},
        {"packing": "windows", "stride": 2},
        {"packing": "windows", "splits": {"train": train}},
        {"vocabulary_digest": "other"},
    ):
        prints.add(old.model_copy(update=change).content_fingerprint())
    assert len(prints) == 6


def test_joined_splits_keep_their_streams():
    one = Split(documents=1, characters=9, tokens=9, dropped_tokens=0, rows=2, streams=[9], shards=[])
    assert Split.joined([one, one.model_copy(update={"streams": [11], "rows": 4})]).streams == [9, 11]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"stride": 2}, "stride=2 is for packing=windows"),
        ({"packing": "windows", "stride": 300}, "at most the length of a row, 256"),
        ({"long": "cut"}, "long=cut is for packing=document"),
        ({"packing": "windows", "order": "lanes"}, "order=lanes cannot serve packing=windows"),
        ({"source": "digits", "packing": "windows"}, "packing=windows is for text"),
        ({"packing": "document", "mixture": [{"weight": 1}, {"weight": 1, "packing": "concat"}]}, "mixes only with"),
    ],
)
def test_settings_that_make_no_sense(settings, message):
    with pytest.raises(ValueError, match=message):
        DataConfig(**settings)


def test_settings_that_change_nothing_do_not_rename_sets():
    """Sets that earlier versions prepared are found again."""
    assert not {"packing", "clean", "deduplicate", "long", "stride", "max_chars"} & set(DataConfig().content())
    assert DataConfig(packing="windows", stride=2).content()["stride"] == 2
