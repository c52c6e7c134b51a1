"""The sources from outside: paths that make no sense, and digests that tell changes."""

import pytest

from md4.errors import UserError
from pipelines.images import digest, open_source
from tests.pipelines.pictures import write_mnist


@pytest.mark.parametrize("kind", ["idx", "cifar", "npz", "images", "webdataset", "image-parquet"])
def test_wrong_paths(tmp_path, kind):
    with pytest.raises(UserError, match=f"the source '{kind}' needs the path"):
        open_source(kind, None)
    with pytest.raises(UserError, match="does not exist"):
        open_source(kind, str(tmp_path / "nowhere")).list_units(1)
    with pytest.raises(UserError, match=r"no (idx images|CIFAR|\.npz files|images|tars|parquet files) in"):
        open_source(kind, str(tmp_path)).list_units(1)


def test_digits_take_no_path():
    with pytest.raises(UserError, match="takes no path"):
        open_source("digits", "/tmp")


def test_digest_tells_changed_contents(tmp_path):
    write_mnist(tmp_path, end="")
    unit = next(u for u in open_source("idx", str(tmp_path)).list_units(10**6) if u.split == "train")
    before = digest(unit)
    assert digest(unit) == before
    labels = tmp_path / "train-labels-idx1-ubyte"
    labels.write_bytes(labels.read_bytes()[:-1] + b"\x09")
    assert digest(unit) != before
