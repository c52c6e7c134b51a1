"""Manifests: what the fingerprint is of, and those that are missing, torn or edited."""

import json

import numpy as np
import pytest

from md4.errors import UserError
from pipelines.manifest import MANIFEST, Manifest
from pipelines.shards import ShardSet
from tests.pipelines.small import GROUP, write_set


def test_the_fingerprint_is_of_the_rows_and_their_ids(tmp_path, three_files):
    def fingerprint(name: str, files: list[np.ndarray], group: int = GROUP) -> str:
        return write_set(tmp_path / name, files, group).fingerprint

    changed = [rows.copy() for rows in three_files]
    changed[1][7, 3] ^= 1
    base = fingerprint("base", three_files)
    assert base == fingerprint("again", three_files)
    others = [
        fingerprint("changed", changed),
        fingerprint("reordered", three_files[::-1]),
        fingerprint("other groups", three_files, group=5),
        fingerprint("joined", [np.concatenate(three_files)]),
    ]
    assert len({base, *others}) == 5


def edited(root, **changes) -> None:
    file = root / MANIFEST
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def test_not_a_prepared_set(tmp_path):
    with pytest.raises(UserError, match="is not a prepared set: it has no manifest"):
        ShardSet(tmp_path / "nowhere")


def test_a_torn_manifest(prepared):
    file = prepared / MANIFEST
    file.write_bytes(file.read_bytes()[:-40])
    with pytest.raises(UserError, match=r"manifest .* is damaged: it cannot be read"):
        ShardSet(prepared)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format": "something else"}, "format is not 'md4-token-shards'"),
        ({"version": 99}, "format version 99, this program reads up to 1"),
        ({"rows_per_group": 5}, "fingerprint does not match"),
        ({"length": "long"}, "damaged: length"),
        ({"surprise": 1}, "damaged: surprise"),
    ],
)
def test_an_edited_manifest(prepared, changes, message):
    edited(prepared, **changes)
    with pytest.raises(UserError, match=message):
        Manifest.load(prepared)
