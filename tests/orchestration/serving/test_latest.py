"""MODEL@latest: newer versions are taken without being asked to, as far as the same engine can serve them."""

import asyncio
from pathlib import Path

import pytest

from orchestration.registry import Registry
from orchestration.runs import load_model
from orchestration.serving import config, sources
from orchestration.serving.config import EngineConfig, ServingConfig
from orchestration.serving.deployments import hold
from orchestration.serving.held import Held
from tests.orchestration.serving.versions import MODEL, export

CONFIG = ServingConfig(engine=EngineConfig(max_rows=8))


@pytest.fixture(scope="session")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("exports")


@pytest.fixture
def registry(tmp_path, folder) -> Registry:
    found = Registry(tmp_path / "registry")
    add(found, folder, "1")
    return found


def add(registry: Registry, folder: Path, kind: str) -> None:
    registry.add(MODEL, export(folder, kind), by="ada", say=lambda text: None)


async def version(held: Held, wanted: int) -> int | None:
    """That is served, once it is the one that is wanted, or has not become so for long."""
    for _ in range(400):
        if (found := held.describe().model_version) == wanted:
            break
        await asyncio.sleep(0.02)
    return found


@pytest.mark.parametrize(
    ("text", "moves", "follows"),
    [("small@latest", True, False), ("small@production", True, True), ("small@3", False, False), ("x", False, False)],
)
def test_what_is_looked_at_by_itself(text, moves, follows):
    assert (sources.moves(text), sources.follows(text)) == (moves, follows)
    assert CONFIG.look_s(sources.moves(text)) == (5 if moves else 0)
    assert CONFIG.model_copy(update={"refresh_s": 7.0}).look_s(sources.moves(text)) == 7


def test_newer_versions_of_the_same_network_are_taken(registry, folder, monkeypatch, caplog):
    monkeypatch.setattr(config, "_MOVING_S", 0.02)
    loads: list[int] = []
    sound = sources.load_version
    monkeypatch.setattr(sources, "load_version", lambda version: loads.append(version.number) or sound(version))

    async def work() -> None:
        place = str(registry.folder)
        latest = await hold("latest", f"{MODEL}@latest", CONFIG, load_model, place)
        first = await hold("first", f"{MODEL}@1", CONFIG, load_model, place)
        try:
            add(registry, folder, "2")
            assert await version(latest, 2) == 2
            add(registry, folder, "wide")
            while loads[-1] != 3:
                await asyncio.sleep(0.02)
            await asyncio.sleep(0.3)  # more looks, which load it no more
            assert latest.describe().model_version == 2
            assert "are of another model" in caplog.text
            add(registry, folder, "3")
            assert await version(latest, 4) == 4
            assert first.describe().model_version == 1
            assert loads == [1, 1, 2, 3, 4]
        finally:
            await latest.close()
            await first.close()

    asyncio.run(asyncio.wait_for(work(), 60))
