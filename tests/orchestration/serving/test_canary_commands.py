"""What the command line says of names that are served and versions that are tried."""

import sys
from pathlib import Path

import pytest
import yaml

from orchestration.cli import main
from orchestration.registry import Registry
from orchestration.serving import trial_record
from orchestration.serving.canary import Figures, Quality
from orchestration.serving.trial_record import Part
from tests.orchestration.serving.versions import MODEL, NAME, export


@pytest.fixture(scope="module")
def exports(tmp_path_factory) -> list[Path]:
    folder = tmp_path_factory.mktemp("exports")
    return [export(folder, kind) for kind in ("1", "2")]


@pytest.fixture
def registry(tmp_path, exports, monkeypatch) -> Registry:
    """Version 1 is production, 2 is tried."""
    monkeypatch.chdir(tmp_path)
    found = Registry("registry")
    for folder in exports:
        found.add(MODEL, folder, by="ada", say=lambda text: None)
    found.promote(MODEL, 1, NAME, by="ada")
    found.promote(MODEL, 2, NAME, share=0.25, by="ada")
    return found


@pytest.fixture
def md4(monkeypatch, capsys):
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
        return said.err

    return do


def test_the_figures_of_a_trial_are_shown(registry, md4):
    assert "nothing is known of it yet" in md4("models", "show", MODEL)
    part = Part(
        present=Figures(answered=8, seconds=4.0, entropy=32.0, entropy_squares=129.0),
        candidate=Figures(answered=2, errors=1, seconds=3.0, entropy=7.0, entropy_squares=24.58),
        quality=Quality(texts=64, difference=-0.0123, standard_error=0.004),
    )
    for key, replica in enumerate("ab"):
        own = part.model_copy(update={"candidate_failed": (key,)})
        trial_record.write(registry, registry.name(MODEL, NAME), replica, own)
    said = " ".join(md4("models", "show", MODEL).split())
    assert "version 2 is tried as production with 25% of the requests" in said
    assert "version 1 16 0 0.500 4.000 ± 0.091" in said
    assert "version 2 4 2 1.500 3.500 ± 0.115" in said
    assert "version 2 less version 1: -0.0123 ± 0.0040 bits per token on 64 held-out texts" in said
    registry.rollback(MODEL, NAME, "no", by="ada")
    assert "is tried" not in md4("models", "show", MODEL)


def test_a_name_is_written_into_the_file_for_a_cluster(registry, md4, tmp_path, exports):
    md4("serve", f"{MODEL}@{NAME}", "canary.min_requests=50", "--model", f"own={exports[0]}", "--write", "serve.yaml")
    (application,) = yaml.safe_load((tmp_path / "serve.yaml").read_text())["applications"]
    assert application["args"] == {
        "models": {"small": "small@production", "own": str(exports[0])},
        "registry": str(tmp_path / "registry"),
        "serving": {"canary": {"min_requests": 50}},
    }


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ((f"{MODEL}@{NAME}", "canary.min_request=5"), "did you mean 'serving.canary.min_requests'?"),
        ((f"{MODEL}@{NAME}", "canary.error_alpha=0.7"), "serving.canary.error_alpha=0.7: input should be less than"),
        ((f"{MODEL}@{NAME}", "--model", f"{MODEL}=x@1"), "two models are called 'small'"),
        ((f"{MODEL}@",), "after the @ goes a version's number, a name such as production, or latest"),
        (("small",), "small is not a run's folder"),
    ],
)
def test_mistakes_are_one_message(registry, md4, arguments, expected):
    said = md4("serve", *arguments, "--write", "serve.yaml", fails=True)
    assert expected in " ".join(said.split())
    assert not Path("serve.yaml").exists()
