"""Promote, try, confirm, roll back: with Ray Serve, two replicas, HTTP clients, and a registry on disk."""

import os
import signal
from collections import Counter
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from itertools import count
from pathlib import Path

import httpx
import pytest

from md4.errors import UserError
from orchestration.registry import Registry
from orchestration.sampling import sample
from orchestration.serving import app
from orchestration.serving.config import CanaryConfig, EngineConfig, ServingConfig
from orchestration.serving.sources import load_version
from tests.orchestration.driver import wait_for
from tests.orchestration.serving.processes import replicas
from tests.orchestration.serving.versions import MODEL, NAME, export

ENOUGH = 24


@pytest.fixture
def registry(tmp_path) -> Registry:
    """With version 1 as production."""
    found = Registry(tmp_path / "registry")
    add(found, tmp_path, "1")
    found.promote(MODEL, 1, NAME, by="ada")
    return found


def add(registry: Registry, folder: Path, kind: str) -> int:
    return registry.add(MODEL, export(folder, kind), by="ada", say=lambda text: None).number


class Story:
    """A service of the name, and what happens to it."""

    def __init__(self, server: app.Server, registry: Registry, folder: Path) -> None:
        self.server, self.registry, self.folder = server, registry, folder
        self.client = httpx.Client(base_url=server.url, timeout=60)
        self.seeds = count(1)

    def attempt(self, kind: str, share: float = 0.5) -> int:
        """A new version with a share; its number."""
        number = add(self.registry, self.folder, kind)
        self.registry.promote(MODEL, number, NAME, share=share, by="ada")
        return number

    def ask(self, seeds: Iterable[int]) -> dict[int, dict]:
        """Answers by seed, many at once; all of them are answers."""
        with ThreadPoolExecutor(8) as pool:
            wanted = list(seeds)
            found = dict(zip(wanted, pool.map(self._ask, wanted), strict=True))
        assert {one.status_code for one in found.values()} == {200}, [one.text for one in found.values()]
        for one in found.values():
            assert one.headers["x-model-version"] == str(one.json()["model"]["model_version"])
        return {seed: one.json() for seed, one in found.items()}

    def _ask(self, seed: int) -> httpx.Response:
        return self.client.post("/v1/samples", json={"seed": seed})

    def ask_until(self, action: str) -> Counter:
        """Ask on until the name has that in its history; how often which version has answered."""
        versions: Counter = Counter()

        def done() -> bool:
            answers = self.ask(next(self.seeds) for _ in range(16))
            versions.update(one["model"]["model_version"] for one in answers.values())
            return self.last == action

        wait_for(done, 60, action)
        return versions

    @property
    def last(self) -> str:
        change = self.registry.name(MODEL, NAME).history[-1]
        return f"{change.action} {change.version}"

    @property
    def why(self) -> str:
        return self.registry.name(MODEL, NAME).history[-1].why

    def served(self) -> set[tuple[int, int | None]]:
        """Version and candidate, as both replicas tell them."""
        found = (self.client.get("/healthz").json() for _ in range(4))
        return {
            (one["models"][MODEL]["model_version"], one["candidates"].get(MODEL, {}).get("model_version"))
            for one in found
        }

    def figure(self, name: str, version: int) -> float:
        lines = httpx.get(self.server.metrics_url or "").text.splitlines()
        own = (line for line in lines if line.startswith(f"ray_md4_serving_{name}{{"))
        return sum(float(line.rsplit(" ", 1)[1]) for line in own if f'version="{version}"' in line)


@pytest.mark.ray
@pytest.mark.timeout(300)
def test_from_candidate_to_version_and_back(ray_cluster, registry, tmp_path):
    held_out = tmp_path / "held-out.txt"
    held_out.write_text("\n".join(["the end of the line", "a cat sat on the mat", "one and two", "what was it"]))
    config = ServingConfig(
        port=0,
        num_cpus=0.5,
        replicas=2,
        refresh_s=0.2,
        engine=EngineConfig(max_rows=8),
        canary=CanaryConfig(min_requests=ENOUGH, entropy_margin=2.0, texts=str(held_out), quality_margin=4.0),
    )
    server = app.serve_run(f"{MODEL}@{NAME}", config, registry=str(registry.folder))
    try:
        story = Story(server, registry, tmp_path)
        _a_sound_one_takes_the_name(story)
        _a_broken_one_is_dropped_and_nobody_notices(story)
        _a_worse_one_is_dropped_before_it_has_answered_much(story)
        _a_damaged_one_is_never_served(story)
        _a_replica_that_is_killed_costs_nothing(story)
        # The agent of the node gathers figures every few seconds.
        wait_for(lambda: story.figure("broken_total", 3) > 0, 40, "figures of the broken version")
        assert story.figure("broken_total", 1) == story.figure("broken_total", 2) == 0
        assert story.figure("answered_total", 2) > ENOUGH
    finally:
        server.stop()


def _a_sound_one_takes_the_name(story: Story) -> None:
    expected = {}
    assert story.served() == {(1, None)}
    assert story.attempt("2") == 2
    wait_for(lambda: story.served() == {(1, 2)}, 30, "the candidate")
    for version in (1, 2):
        loaded = load_version(story.registry.version(MODEL, version))
        expected[version] = sample(loaded, seed=0, settings=loaded.config.sampling).samples[0].text
        pinned = story.client.post("/v1/samples", json={"seed": 0, "model": f"{MODEL}@{version}"}).json()
        assert (pinned["model"]["model_version"], pinned["samples"][0]["text"]) == (version, expected[version])
    refused = story.client.post("/v1/samples", json={"seed": 0, "model": f"{MODEL}@9"})
    assert (refused.status_code, "allowed: small, small@1, small@2" in refused.json()["detail"]) == (404, True)
    seeds = [next(story.seeds) for _ in range(16)]  # fewer of the candidate's than are enough
    once, again = story.ask(seeds), story.ask(seeds)
    assert once.keys() == again.keys()
    assert all(once[seed]["samples"] == again[seed]["samples"] for seed in seeds)
    assert {one["model"].get("trial", False) for one in once.values()} == {True, False}
    models = story.client.get("/v1/models").json()["data"]
    assert models[0]["info"]["candidate"]["share"] == 0.5
    story.ask_until("confirm 2")
    wait_for(lambda: story.served() == {(2, None)}, 30, "the new version")
    assert {one["model"].get("trial", False) for one in story.ask(seeds).values()} == {False}


def _a_broken_one_is_dropped_and_nobody_notices(story: Story) -> None:
    assert story.attempt("nan", share=0.3) == 3
    answered = story.ask_until("drop 3")
    assert set(answered) == {2}
    assert "can't be scored: the network answered with NaN" in story.why or story.why.startswith("errors: ")


def _a_worse_one_is_dropped_before_it_has_answered_much(story: Story) -> None:
    assert story.attempt("sharp", share=0.01) == 4
    story.ask_until("drop 4")
    assert story.why.startswith("quality: +")


def _a_damaged_one_is_never_served(story: Story) -> None:
    number = add(story.registry, story.folder, "5")
    file = Path(story.registry.version(MODEL, number).folder.path("model.safetensors"))
    file.write_bytes(file.read_bytes()[:-1])
    story.registry.promote(MODEL, number, NAME, share=0.9, by="ada")
    assert set(story.ask_until("drop 5")) == {2}
    assert "model.safetensors has" in story.why


def _a_replica_that_is_killed_costs_nothing(story: Story) -> None:
    assert story.attempt("6") == 6
    wait_for(lambda: story.served() == {(2, 6)}, 30, "the candidate")
    with ThreadPoolExecutor(1) as pool:
        asking = pool.submit(story.ask, [next(story.seeds) for _ in range(48)])
        os.kill(replicas()[0].pid, signal.SIGKILL)
        asking.result()
    story.ask_until("confirm 6")
    wait_for(lambda: len(replicas()) == 2 and story.served() == {(6, None)}, 60, "both replicas")


def test_what_is_not_in_the_registry_is_refused(registry):
    with pytest.raises(UserError, match="nothing is signed off as staging; names there: production"):
        app.serve_run(f"{MODEL}@staging", registry=str(registry.folder))
    with pytest.raises(UserError, match="has no model 'large'; models there: small"):
        app.serve_run("large@production", registry=str(registry.folder))


def test_the_written_file_says_where_the_registry_is(registry, monkeypatch, tmp_path):
    import yaml

    monkeypatch.chdir(tmp_path)
    folder = export(tmp_path, "1")
    models = app.named(f"{MODEL}@{NAME}", {"chat": f"{MODEL}@1", "folder": folder})
    tree = yaml.safe_load(app.describe_deployment(models, ServingConfig(), "registry"))
    arguments = app.Arguments.model_validate(tree["applications"][0]["args"])
    assert arguments.models == {"small": "small@production", "chat": "small@1", "folder": str(folder)}
    assert arguments.registry == str(registry.folder)
