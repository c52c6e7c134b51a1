"""Versions: added once and whole, found by number and name, verified to the byte."""

import json
import shutil
import threading
from datetime import timedelta
from pathlib import Path

import pytest

import md4
from md4.errors import UserError
from md4.samplers import SamplingConfig
from md4.samplers.saved import SavedSettings
from orchestration import results
from orchestration.grids import keep
from orchestration.registry import Registry
from orchestration.registry.audit import check
from orchestration.results import Result
from orchestration.runs import load_model
from pipelines.storage import Folder
from tests.orchestration.registry.conftest import NOW
from tests.orchestration.small_run import LENGTH, write_run


def test_a_version_is_what_the_run_was(place, run, tmp_path, monkeypatch, clock):
    monkeypatch.setenv("MD4_CACHE", str(tmp_path / "cache"))
    version = Registry(place, now=clock).add("small", run, note="the first", by="ada")
    again = Registry(place).find("small@1")
    assert (again.number, again.manifest) == (1, version.manifest)
    loaded, model = load_model(run), md4.load(again.fetch())
    for name, tensor in loaded.model.state_dict().items():
        assert model.model.state_dict()[name].equal(tensor)
    facts, origin = again.manifest, again.lineage
    assert (facts.by, facts.note, facts.created, facts.run, facts.step) == ("ada", "the first", NOW, "small", 7)
    assert facts.parameters == sum(parameter.numel() for parameter in loaded.model.parameters())
    assert origin.weights_hash == loaded.weights_hash
    assert origin.config == loaded.config.model_dump(mode="json")
    assert [one.name for one in origin.data] == ["pydocs"]


def test_lineage_has_what_the_checkpoint_says(tmp_path, registry):
    folder = write_run(tmp_path / "runs")
    (file,) = folder.glob("checkpoints/*/manifest.json")
    said = {
        "created": "2026-02-01T00:00:00+00:00",
        "code_version": "0.1.0",
        "seed": 5,
        "order": {"sets": [{"fingerprint": "f00d", "rows": 99, "weight": 1.0}]},
        "origin": {"run": "donor", "step": 3},
    }
    file.write_text(json.dumps({**json.loads(file.read_text()), **said}))
    origin = registry.add("small", folder).lineage
    assert [(one.fingerprint, one.rows) for one in origin.data] == [("f00d", 99)]
    assert (origin.seed, origin.code_version, origin.trained_at) == (5, "0.1.0", said["created"])
    assert origin.parent == {"run": "donor", "step": 3}


def test_the_same_content_is_one_version(place, exports):
    registry, said = Registry(place), []
    registry.add("small", exports(1), say=said.append)
    assert registry.add("small", exports(1), note="again", say=said.append).number == 1
    assert said == ["small: these weights and this configuration are version 1 already; nothing was added"]
    assert registry.add("small", exports(2)).number == 2
    assert [version.number for version in registry.versions("small")] == [1, 2]
    assert registry.add("other", exports(1)).number == 1  # of another model


def test_other_sampling_settings_are_another_version(registry, exports, tmp_path):
    registry.add("small", exports(1))
    changed = shutil.copytree(exports(1), tmp_path / "changed")
    tree = json.loads((changed / "config.json").read_text())
    tree["sampling"]["steps"] = 11
    (changed / "config.json").write_text(json.dumps(tree))
    assert registry.add("small", changed).number == 2
    tree["source"] = {"told": "by hand"}  # where it comes from is no part of what it is
    (changed / "config.json").write_text(json.dumps(tree))
    assert registry.add("small", changed).number == 2


def test_saved_grids_go_with_it_and_another_grid_is_another_version(tmp_path, registry):
    folder = write_run(tmp_path / "runs")
    for number, times in enumerate([None, (1.0, 0.4, 0.0), (1.0, 0.3, 0.0)], 1):
        if times is not None:
            keep(folder, SavedSettings(name="searched", steps=2, settings=SamplingConfig(grid=times)))
        version = registry.add("small", folder)
        assert version.number == number
        assert len([name for name in version.manifest.files if name.startswith("grids/")]) == (times is not None)
        if times is not None:
            assert md4.load(version.fetch()).sample(1, grid="searched", steps=2).shape == (1, LENGTH)
    assert registry.add("other", version.folder.url).manifest.content == version.manifest.content


def test_reports_and_results_of_these_weights_go_with_it(registry, exports, tmp_path, clock):
    source = shutil.copytree(exports(1), tmp_path / "model")
    own = json.loads((source / "config.json").read_text())["sha256"][:16]
    (source / "reports").mkdir()
    for name, of in (("mine", own), ("foreign", "0" * 16)):
        report = {"kind": "of another program", "model": {"run": None, "step": None, "weights_hash": of}}
        (source / f"reports/{name}.json").write_text(json.dumps(report))
    (source / "reports/torn.json").write_text("{")
    for attempt, of in (("a", own), ("b", "0" * 16)):
        one = {"suite": "s", "model": "m", "metric": "x", "value": 1.0, "standard_error": 0.1, "unit": "bits"}
        found = Result(**one, created=clock(), weights_hash=of, better="lower", settings="s", attempt=attempt)  # pyright: ignore
        results.append(tmp_path / "results", [found])
    version = registry.add("small", source, results=tmp_path / "results")
    kept = {name for name in version.manifest.files if name.startswith("evaluation/")}
    assert kept == {"evaluation/mine.json", "evaluation/results.json"}
    assert [one["attempt"] for one in json.loads(version.read("evaluation/results.json"))["results"]] == ["a"]
    # A version moved to another registry keeps its origin and its reports.
    moved = Registry(tmp_path / "another").add("small", version.folder.url)
    assert "evaluation/mine.json" in moved.manifest.files
    assert moved.lineage.weights_hash == version.lineage.weights_hash


def test_the_card_is_a_part_of_the_version(registry, run, exports):
    for source, training in ((run, True), (exports(1), False)):
        version = registry.add("small", source)
        card = version.read("card.md").decode()
        assert f"# small version {version.number}" in card
        assert str(version.lineage.weights_hash) in card
        assert ("128 examples" in card) is training  # an exported folder knows nothing of it
        assert b"<html" in version.read("card.html")


def test_references(three):
    three.promote("small", 2, "production")
    assert three.find("small").number == 3
    assert three.find("small@latest").number == 3
    assert three.find("small@production").number == 2
    assert three.find("small@00001").number == 1
    assert three.models() == ["small"]


@pytest.mark.parametrize(
    ("ref", "expected"),
    [
        ("smal", "no model 'smal'; models there: small"),
        ("small@9", "has no version 9; versions there: 1, 2, 3"),
        ("small@beta", "nothing is signed off as beta; names there: none"),
        ("small@", "after the @ goes"),
        ("Small", "small letters"),
        ("small@Beta", "small letters"),
        ("../small", "small letters"),
    ],
)
def test_unknown_references(three, ref, expected):
    with pytest.raises(UserError, match=expected):
        three.find(ref)


def test_what_is_no_model_is_refused_and_leaves_nothing(registry, exports, tmp_path):
    with pytest.raises(UserError, match="not a run's folder"):
        registry.add("small", tmp_path)
    damaged = shutil.copytree(exports(1), tmp_path / "damaged")
    weights = damaged / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-4] + b"\0\1\2\3")
    with pytest.raises(UserError, match="damaged"):
        registry.add("small", damaged)
    assert registry.models() == []
    assert Folder(registry.folder).list() == {}


def test_a_failed_addition_leaves_nothing(exports, s3):
    registry = Registry("s3://bucket/registry")
    s3.fails(1.0, ("error",), only="PUT /bucket/registry/small/versions/00001/model")
    with pytest.raises(UserError, match="given up"):
        registry.add("small", exports(1))
    s3.fails(0)
    assert registry.models() == []
    assert s3.objects() == ["registry/small/versions.json"]
    assert registry.add("small", exports(1)).number == 2  # a number is given once


def test_every_damage_is_named(three):
    folder = Path(three.folder.url) / "small/versions"
    (folder / "00001/config.json").unlink()
    weights = folder / "00002/model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"!")
    (folder / "00003/manifest.json").write_text("{}")
    said: list[str] = []
    found = check(three, None, said.append)
    assert found.damage == [
        f"small version 1: {folder}/00001/config.json is missing",
        f"small version 2: {weights} is damaged (its sha256 differs from the manifest's)",
        f"small version 3: {folder}/00003/manifest.json is damaged (its sha256 is not the one listed)",
    ]
    for number in (1, 2, 3):
        with pytest.raises(UserError, match=f"small version {number}"):
            three.version("small", number).fetch()


def test_later_reports_in_the_folder_are_no_damage(three):
    folder = Path(three.version("small", 1).folder.url)
    (folder / "reports").mkdir()
    (folder / "reports/late.json").write_text("{}")
    said: list[str] = []
    assert check(three, "small@1", said.append).damage == []
    assert said == ["small version 1: files beside it were not added with it (1), such as reports/late.json"]


def test_a_copy_of_s3_is_made_once_and_mended(exports, s3, tmp_path, monkeypatch):
    monkeypatch.setenv("MD4_CACHE", str(tmp_path / "cache"))
    version = Registry("s3://bucket/registry").add("small", exports(1))
    there = version.fetch()
    s3.fails(0)  # forgets what was asked
    assert version.fetch() == there
    assert not [line for line in s3.asked if "model.safetensors" in line]
    (there / "model.safetensors").write_bytes(b"broken")
    assert md4.load(version.fetch()).card.sha256 == version.lineage.weights_sha256
    assert [path.name for path in there.parent.iterdir()] == [there.name]


def test_two_copies_at_once(exports, s3, tmp_path, monkeypatch):
    monkeypatch.setenv("MD4_CACHE", str(tmp_path / "cache"))
    version = Registry("s3://bucket/registry").add("small", exports(1))
    held = s3.hold("GET .*model.safetensors")
    first: list[Path] = []
    slow = threading.Thread(target=lambda: first.append(version.fetch()))
    slow.start()
    assert held.came.wait(20)
    there = version.fetch()
    held.release()
    slow.join(20)
    assert first == [there]
    md4.load(there)


@pytest.mark.parametrize("same", [True, False])
def test_two_adders_at_once(exports, s3, same):
    """One is held before its manifest; the other comes from behind and passes."""
    registry = Registry("s3://bucket/registry")
    held, first, said = s3.hold("PUT .*00001/manifest.json"), [], []
    slow = threading.Thread(target=lambda: first.append(registry.add("small", exports(1), say=said.append).number))
    slow.start()
    assert held.came.wait(20)
    assert registry.versions("small") == []  # nothing half-done is visible
    assert registry.add("small", exports(1 if same else 2)).number == 2
    held.release()
    slow.join(20)
    assert first == [2 if same else 1]
    assert [version.number for version in registry.versions("small")] == ([2] if same else [1, 2])
    assert said == (["small: somebody else was just adding the same: it is version 2"] if same else [])
    assert any("/00001/" in key for key in s3.objects()) is not same
    assert check(registry, None, print).damage == []


def test_what_a_dead_adder_left_is_removed_after_a_day(exports, s3, clock):
    registry = Registry("s3://bucket/registry", now=clock)
    held, trouble = s3.hold("PUT .*00001/manifest.json"), []

    def add_slowly() -> None:
        try:
            registry.add("small", exports(1))
        except UserError as error:
            trouble.append(str(error))

    slow = threading.Thread(target=add_slowly)
    slow.start()
    assert held.came.wait(20)
    clock.advance(hours=23)
    registry.add("small", exports(2))
    assert any("/00001/" in key for key in s3.objects())  # it may be slow
    clock.advance(hours=2)
    assert registry.add("small", exports(3)).number == 3
    assert not any("/00001/" in key for key in s3.objects())
    held.release()  # it was not dead, after all: it must not list what was removed
    slow.join(20)
    assert len(trouble) == 1
    assert "was given up: add it again" in trouble[0]
    assert [version.number for version in registry.versions("small")] == [2, 3]
    assert not any("/00001/" in key for key in s3.objects())
    assert registry.versions("small")[1].manifest.created == NOW + timedelta(hours=25)


def test_damaged_files_of_the_registry_are_named(three):
    Path(three.folder.path("small/versions.json")).write_text('{"format": 2}')
    with pytest.raises(UserError, match=r"small/versions.json is damaged \(format"):
        three.find("small")
