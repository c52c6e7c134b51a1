"""SIGKILL in the middle: nothing half-done is visible, and the same command goes on."""

import multiprocessing
import os
import re
import shutil
import signal
import time
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest

from orchestration.registry import Registry
from orchestration.registry.audit import check
from tests.orchestration.registry import killed_program
from tests.orchestration.registry.test_names import chain


@pytest.fixture(scope="module")
def start() -> Callable[..., BaseProcess]:
    """Start an operation in a process of its own, forked from one that has everything imported and no threads."""
    context = multiprocessing.get_context("forkserver")
    own = ["orchestration.runs", "orchestration.cards", "pipelines.s3"]
    imported = [killed_program.__name__, *own, "torch._dynamo", "huggingface_hub.repocard"]  # what an addition uses
    context.set_forkserver_preload(imported)

    def begin(*arguments) -> BaseProcess:
        process = context.Process(target=killed_program.run, args=arguments)
        process.start()
        return process

    return begin


def killed_at_every_step(start, every: int, operation: str, prepare: Callable[[], Path], source: str):
    """Kill the operation before each `every`th of its file operations; gives the registry after each kill."""
    for kill_at in range(1, 1000, every):
        place = prepare()
        process = start(operation, str(place), source, kill_at)
        process.join(60)
        if process.exitcode == 0:
            assert kill_at > 1
            return
        assert process.exitcode == -signal.SIGKILL
        yield Registry(place)
        shutil.rmtree(place)
    raise AssertionError("it never ends")


@pytest.mark.parametrize("every", [13, pytest.param(1, marks=pytest.mark.slow)])
def test_an_addition_killed(start, tmp_path, exports, every):
    def prepare() -> Path:
        return tmp_path / "registry"

    for registry in killed_at_every_step(start, every, "add", prepare, str(exports(1))):
        there = registry.versions("small")
        assert len(there) <= 1
        assert registry.models() == ["small"] * len(there)
        version = registry.add("small", exports(1), say=lambda text: None)
        assert [one.number for one in registry.versions("small")] == [version.number]
        assert check(registry, None, print).damage == []
        assert registry.add("small", exports(2)).number == version.number + 1


@pytest.mark.parametrize("operation", ["promote", "rollback"])
def test_a_changed_name_killed(start, tmp_path, exports, operation):
    kept = Registry(tmp_path / "kept")
    for seed in (1, 2):
        kept.add("small", exports(seed))
    kept.promote("small", 1, "production")
    if operation == "rollback":
        kept.promote("small", 2, "production")
    before = kept.name("small", "production")

    def prepare() -> Path:
        return shutil.copytree(kept.folder.url, tmp_path / "registry")

    for registry in killed_at_every_step(start, 1, operation, prepare, str(tmp_path)):
        found = registry.name("small", "production")
        assert found == before or len(found.history) == len(before.history) + 1
        killed_program.operations[operation](registry, str(tmp_path))
        after = registry.name("small", "production")
        assert after.version == (2 if operation == "promote" else 1)
        assert chain(after)[len(before.history) :] == [f"{operation} 2"]  # once
        assert registry.names("small") == ["production"]  # whatever lies beside it


ADDITION = ("versions.json", "00001/config.json", "00001/model.safetensors", "00001/manifest.json", "versions.json")
SLOW = [pytest.param(step, arrives, marks=pytest.mark.slow) for step in (0, 1, 2) for arrives in (False, True)]


@pytest.mark.parametrize(("step", "arrives"), [*SLOW, (3, True), (4, False), (4, True)])
def test_an_addition_to_s3_killed(start, exports, s3, step, arrives):
    """The request of a step reaches S3, or not, and whoever sent it is dead either way."""
    _kill(start, s3, "add", str(exports(1)), ADDITION[step], nth=2 if step == len(ADDITION) - 1 else 1, arrives=arrives)
    registry = Registry("s3://bucket/registry")
    committed = step == len(ADDITION) - 1 and arrives
    assert len(registry.versions("small")) == committed
    version = registry.add("small", exports(1), say=lambda text: None)
    assert [one.number for one in registry.versions("small")] == [version.number]
    assert check(registry, None, print).damage == []


@pytest.mark.parametrize("arrives", [False, True])
@pytest.mark.parametrize("operation", ["promote", "rollback"])
def test_a_changed_name_in_s3_killed(start, exports, s3, operation, arrives):
    registry = Registry("s3://bucket/registry")
    for seed in (1, 2):
        registry.add("small", exports(seed))
    registry.promote("small", 1, "production")
    if operation == "rollback":
        registry.promote("small", 2, "production")
    before = registry.name("small", "production")
    _kill(start, s3, operation, "s3://bucket/none", "names/production.json", nth=1, arrives=arrives)
    assert (registry.name("small", "production") != before) is arrives
    killed_program.operations[operation](registry, "s3://bucket/none")
    after = registry.name("small", "production")
    assert chain(after)[len(before.history) :] == [f"{operation} 2"]


def _kill(start, s3, operation: str, source: str, file: str, *, nth: int, arrives: bool) -> None:
    """Kill it when its nth PUT of a file is at the proxy; the request is passed on or lost."""
    held = s3.hold(f"PUT /bucket/registry/small/.*{file}")
    process = start(operation, "s3://bucket/registry", source, None)
    for _ in range(nth - 1):
        assert held.came.wait(60)
        following = s3.hold(f"PUT /bucket/registry/small/.*{file}")
        held.release()
        held = following
    assert held.came.wait(60)
    os.kill(process.pid, signal.SIGKILL)
    process.join(60)
    before = _state(s3)
    held.release(passes=arrives)
    deadline = time.monotonic() + 20
    while arrives and _state(s3) == before:
        assert time.monotonic() < deadline
        time.sleep(0.01)


def _state(s3) -> list[tuple[str, str]]:
    """What the server has, by key and hash."""
    return re.findall(r"<Key>([^<]*)</Key>.*?<ETag>([^<]*)</ETag>", s3.ask("GET", "/bucket?list-type=2").decode(), re.S)
