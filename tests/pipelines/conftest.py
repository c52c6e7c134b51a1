"""A small prepared set for the tests of its readers."""

import numpy as np
import pytest

from tests.pipelines.small import GROUP, some_rows, write_set


@pytest.fixture
def three_files() -> list[np.ndarray]:
    return np.split(some_rows(95), [40, 73])  # 40, 33 and 22 rows: two short row groups


@pytest.fixture
def prepared(tmp_path, three_files):
    write_set(tmp_path, three_files, GROUP)
    return tmp_path
