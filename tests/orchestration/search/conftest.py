"""Small studies: the tiny network of `tests.orchestration.conftest`, a few rounds of a few steps."""

import pytest
import yaml

from orchestration.search.run import Plan, make_plan
from tests.orchestration.conftest import tiny_settings

STEP_TOKENS = 16 * 32  # of the tiny network


@pytest.fixture
def given(corpus, data_directory, tmp_path) -> list[str]:
    """The overrides of the tiny network that a search takes."""
    settings = tiny_settings(corpus, data_directory, tmp_path)
    return [one for one in settings if not one.startswith(("name=", "runs=", "optimizer.learning_rate="))]


@pytest.fixture
def planned(given, tmp_path):
    """`planned(space, search, "key=value", ...)` -> Plan of a study in tmp_path; `every` are the steps of a round."""

    def make(space: dict, search: dict, *overrides: str, every: int = 4, name: str = "study") -> Plan:
        search = {"rounds": 3, **search}
        search.setdefault("budget", search["rounds"] * every * STEP_TOKENS)
        file = tmp_path / f"{name}.yaml"
        file.write_text(yaml.safe_dump({"space": space, "search": search}))
        settings = [one for one in given if one.partition("=")[0] not in space]
        every_one = [*settings, "train.workers=1", *overrides]
        return make_plan("pydocs-tiny", file, every_one, None, name, tmp_path / "studies")

    return make
