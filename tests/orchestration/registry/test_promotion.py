"""Promotion by rule: asked, refused, forced, written down; and the verbs of `md4 models`."""

import json
import sys
from pathlib import Path

import pytest

from md4.errors import UserError
from orchestration.cli import main
from orchestration.registry import Name, Registry, promotion
from orchestration.registry.promotion import Wanted
from pipelines.storage import Folder
from tests.orchestration.registry.conftest import BITS, ENTROPY

RULES = f"""
- name: production
  require:
    - {{metric: {BITS}, better_by: 2}}
    - {{metric: {ENTROPY}, within: [4, 6]}}
- {{name: gold, from: production}}
"""


@pytest.fixture
def ruled(three, measured) -> Registry:
    """Version 1 is production; 2 is better, 3 is worse; the rules lie beside the model."""
    for version, value in ((1, 2.0), (2, 1.9), (3, 2.5)):
        measured(version, value)
        measured(version, 5.0, metric=ENTROPY, better="neither")
    three.promote("small", 1, "production")
    (three.folder / "small").write("rules.yaml", RULES.encode())
    return three


@pytest.fixture
def promote(ruled, tmp_path):
    def do(version: int, name: str = "production", *, dry_run: bool = False, **wanted) -> promotion.Decision:
        return promotion.promote(
            ruled,
            Wanted(ruled.version("small", version), name, by="ada", **wanted),
            Folder(tmp_path / "results"),
            dry_run=dry_run,
        )

    return do


def test_what_meets_the_rules_is_promoted_with_the_figures(ruled, promote):
    assert promote(2, dry_run=True).allowed
    assert ruled.name("small", "production").version == 1
    decision = promote(2)
    assert decision.changed
    name = ruled.name("small", "production")
    assert name.version == 2
    (rule,) = name.history[-1].figures["rules"]
    assert (rule["rule"]["name"], rule["against"]) == ("production", 1)
    first, second = rule["findings"]
    assert (first["metric"], first["new"]["value"], first["present"]["value"]) == (BITS, 1.9, 2.0)
    assert first["difference"]["value"] == pytest.approx(-0.1)
    assert second["met"]
    assert not promote(2).changed  # again: it is done already
    assert ruled.name("small", "production") == name


def test_what_does_not_is_not(ruled, promote):
    decision = promote(3)
    assert not decision.allowed
    assert [finding.metric for finding in decision.unmet] == [BITS]
    assert ruled.name("small", "production").version == 1


def test_force_needs_a_reason_and_is_written_down(ruled, promote):
    with pytest.raises(UserError, match="say --why"):
        promote(3, force=True, why=" ")
    promote(3, force=True, why="the fair is tomorrow")
    last = ruled.name("small", "production").history[-1]
    assert (last.forced, last.why) == (True, "the fair is tomorrow")
    assert not last.figures["rules"][0]["findings"][0]["met"]


def test_what_was_taken_back_needs_force(ruled, promote):
    promote(2)
    ruled.rollback("small", "production", "it lies", by="eve")
    with pytest.raises(UserError, match=r"taken back from production on 2026-03-01 by eve \(it lies\)"):
        promote(2)
    promote(2, force=True, why="it does not")
    assert ruled.name("small", "production").version == 2


def test_the_first_to_a_name_has_nothing_to_compare_with(ruled, promote, measured):
    (ruled.folder / "small").write("rules.yaml", RULES.replace("production", "first").encode())
    decision = promote(3, "first", dry_run=True)
    assert [finding.why for finding in decision.verdicts[0].findings] == [
        "nothing to compare with: it is the first first",
        "inside",
    ]
    measured(3, 9.0, metric=ENTROPY, better="neither")
    assert [finding.why for finding in promote(3, "first").unmet] == ["above 6"]


def test_rules_of_all_models_of_one_and_of_a_file_all_apply(ruled, promote, tmp_path):
    ruled.folder.write("rules.yaml", b"{name: production, from: staging}")
    own = tmp_path / "own.yaml"
    own.write_text(f"{{name: production, require: [{{metric: {BITS}, within: [0, 1.5]}}]}}")
    decision = promote(2, rules=own)
    assert [[finding.met for finding in verdict.findings] for verdict in decision.verdicts] == [
        [False],
        [True, True],
        [False],
    ]
    with pytest.raises(UserError, match="no rule for gold; it has rules for production"):
        promote(2, "gold", rules=own)
    with pytest.raises(UserError, match=r"absent.yaml can't be read \(No such file"):
        promote(2, rules=tmp_path / "absent.yaml")


def test_a_damaged_version_is_never_signed_off(ruled, promote):
    file = Path(ruled.version("small", 2).folder.path("model.safetensors"))
    file.write_bytes(file.read_bytes()[:-1] + b"!")
    for force in (False, True):
        with pytest.raises(UserError, match="a damaged version is not signed off: small version 2"):
            promote(2, force=force, why="please")


def test_a_decision_is_made_again_if_the_name_moved(ruled, promote, measured, monkeypatch):
    """Version 3 becomes production while version 2 is judged against 1: it is judged against 3."""
    measured(3, 1.0)
    asked, plain = [], ruled.promote

    def slowly(*arguments, **options):
        if not asked:
            asked.append(True)
            plain("small", 3, "production", by="bob")
        return plain(*arguments, **options)

    monkeypatch.setattr(ruled, "promote", slowly)
    decision = promote(2)
    assert not decision.allowed
    assert decision.verdicts[0].against == 3
    assert ruled.name("small", "production").version == 3


# -- on the command line ---------------------------------------------------------------------------------------------


@pytest.fixture
def md4(tmp_path, monkeypatch, capsys):
    """`md4("models", ...)`: what it printed; with `fails=True` its one message, exit code 2."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("USER", "grace")

    def do(*arguments: str, fails: bool = False) -> str:
        monkeypatch.setattr(sys, "argv", ["md4", *map(str, arguments)])
        if not fails:
            main()
            return capsys.readouterr().out
        with pytest.raises(SystemExit) as left:
            main()
        assert left.value.code == 2
        said = capsys.readouterr()
        assert "Traceback" not in said.err
        return said.out + said.err

    return do


def test_a_life_on_the_command_line(md4, exports, ruled):
    assert "version 3 already" in md4("models", "add", "small", exports(3))
    said = md4("models", "add", "small", exports(4), "--note", "seed 4")
    assert said.endswith("registry/small/versions/00004; next: md4 models promote small 4 staging\n")
    assert "has no result of it" in md4("models", "promote", "small", "4", "production", "--dry-run", fails=True)
    said = md4("models", "promote", "small", "3", "production", fails=True)
    assert "NOT MET" in said
    assert "2.5000 ± 0.0100  2.0000 ± 0.0100  +0.5000 ± 0.0141  35.4 s.e. worse" in said
    assert said.endswith("md4: small version 3 is not promoted to production: 1 of 2 requirements are not met\n")
    said = md4("models", "promote", "small", "2", "production", "--share", "0.1")
    assert said.endswith("by hand md4 models confirm small production, or md4 models rollback small production\n")
    listed = md4("models", "list")
    assert "production (10% of the traffic)" in listed
    assert listed.count("\n") == 5
    tree = json.loads(md4("models", "list", "small", "--json"))["small"]
    assert tree["versions"]["4"]["note"] == "seed 4"
    assert tree["names"]["production"]["candidate"]["share"] == 0.1
    assert md4("models", "confirm", "small", "production") == "small version 2 is production now\n"
    assert "nothing is being tried" in md4("models", "confirm", "small", "production", fails=True)
    assert "is production already" in md4("models", "promote", "small", "2", "production")
    said = md4("models", "rollback", "small", "production", "--why", "it broke", "--version", "2")
    assert said == "small version 2 was taken back; production is version 1\n"
    assert "nothing was changed" in md4("models", "rollback", "small", "production", "--version", "2")
    shown = md4("models", "show", "small")
    assert "it broke" in shown
    assert "2 requirements met" in shown
    assert "grace" in shown
    shown = md4("models", "show", "small@production")
    assert "small version 1, production" in shown
    assert "2.0000 ± 0.0100" in shown
    assert md4("models", "fetch", "small@1").strip() == ruled.version("small", 1).folder.url
    assert "is sound: 4 versions" in md4("models", "verify")


def test_two_versions_side_by_side(md4, ruled, measured):
    measured(3, 7.0, metric=ENTROPY, better="neither", settings="s2")
    measured(3, 1.0, metric="zero_shot/ptb")
    said = md4("models", "compare", "small@1", "small@3")
    assert "lineage.weights_sha256" in said
    assert "2.0000 ± 0.0100  2.5000 ± 0.0100  +0.5000 ± 0.0141  worse, z = +35.4" in said
    assert "small version 1 has no result of it" in said
    assert "config.model" not in said  # what is the same is not said
    assert "are both small version 1" in md4("models", "compare", "small@1", "small@production", fails=True)


def test_what_was_never_measured_alike_is_said_by_name(md4, three, measured):
    measured(1, 2.0)
    measured(2, 1.0, data_fingerprint="d2")
    assert "not measured alike: data d2 and d1" in md4("models", "compare", "small@1", "small@2")


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["list", "absent"], "has no model 'absent'"),
        (["verify", "absent"], "has no model 'absent'"),
        (["add", "small", "absent"], "not a run's folder"),
        (["add", "Small", "absent"], "small letters"),
        (["promote", "small", "1", "Production"], "small letters"),
        (["promote", "small", "9", "production"], "no version 9"),
        (["promote", "small", "1", "new", "--share", "0.5"], "has no new yet"),
        (["rollback", "small", "new", "--version", "77"], "small has no version 77; versions there: 1, 2, 3"),
        (["rollback", "small", "new"], "nothing was ever signed off as new"),
        (["list", "--registry", "gs://bucket/x"], "neither a local path nor a url"),
    ],
)
def test_mistakes_are_one_message(md4, three, arguments, expected):
    assert expected in md4("models", *arguments, fails=True)


def test_a_damaged_version_is_neither_confirmed_nor_gone_back_to(md4, three):
    for version in (1, 2):
        three.promote("small", version, "production")
    three.promote("small", 3, "production", share=0.1)
    for version in (1, 3):
        Path(three.version("small", version).folder.path("config.json")).write_text("{}")
    said = md4("models", "confirm", "small", "production", fails=True)
    assert "a damaged version is not signed off: small version 3" in said
    md4("models", "rollback", "small", "production")  # the candidate, to version 2, which is served
    said = md4("models", "rollback", "small", "production", fails=True)
    assert "production would go back to a damaged version: small version 1" in said
    assert "md4 models promote small VERSION production" in said
    assert (three.name("small", "production").version, three.name("small", "production").candidate) == (2, None)


def test_a_rollback_is_looked_at_again_if_the_name_was_changed_meanwhile(three, monkeypatch):
    for version in (1, 2):
        three.promote("small", version, "production")
    said, sound = [], Registry.rollback

    def moved(registry: Registry, *arguments, **options) -> Name:
        if not said:
            registry.promote("small", 3, "production")
        return sound(registry, *arguments, **options)

    monkeypatch.setattr(Registry, "rollback", moved)
    before, after = promotion.rollback(three, "small", "production", "bad", say=said.append)
    assert said == ["small: production was changed meanwhile: looked at again"]
    assert (before.version, after.version) == (3, 2)


def test_damage_is_an_error(md4, three):
    Path(three.version("small", 2).folder.path("config.json")).write_text("{}")
    said = md4("models", "verify", fails=True)
    assert "damaged: small version 2" in said
    assert "is damaged: 1 of what it says is not so" in said


def test_an_empty_registry(md4):
    assert "has no models; next: md4 models add" in md4("models", "list")
    assert "has no models" in md4("models", "verify", fails=True)


def test_the_registry_is_where_the_environment_says(md4, exports, s3, monkeypatch):
    monkeypatch.setenv("MD4_REGISTRY", "s3://bucket/elsewhere")
    md4("models", "add", "small", exports(1))
    assert "small" in md4("models", "list")
    assert "elsewhere/small/versions/00001/manifest.json" in s3.objects()
    monkeypatch.setenv("MD4_REGISTRY", "s3://absent/registry")
    assert "the bucket 'absent' does not exist" in md4("models", "list", fails=True)
