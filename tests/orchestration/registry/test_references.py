"""MODEL@REF where a folder is asked for."""

import sys

import pytest

from md4.errors import UserError
from orchestration import results
from orchestration.cli import main
from orchestration.registry import Registry
from orchestration.registry.references import folder, reference
from tests.orchestration.small_run import LENGTH
from tests.pipelines.small import some_rows, write_set


def test_what_is_a_reference(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a@b").mkdir()
    assert reference("small@production") == ("small", "production")
    for text in ("small", "runs/a@b", "s3://bucket/a@b", "a@b"):
        assert reference(text) is None
        assert folder(text, tmp_path / "absent") == text
    with pytest.raises(UserError, match="after the @ goes a version's number"):
        reference("small@")


def test_a_suite_on_whatever_is_signed_off(place, exports, tmp_path, monkeypatch, capsys):
    """Its figures are those of the version; in S3 the model is fetched, and verified."""
    registry = Registry(place)
    for seed in (1, 2):
        registry.add("small", exports(seed), by="ada", say=lambda text: None)
    registry.promote("small", 2, "production", by="ada")
    write_set(tmp_path / "set", [some_rows(12, LENGTH)], 4, split="validation")
    (tmp_path / "nightly.yaml").write_text(f"likelihood: [{{data: {tmp_path / 'set'}, rows: 4, draws: 1}}]")
    monkeypatch.setenv("MD4_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("MD4_REGISTRY", place)
    monkeypatch.setenv("MD4_RESULTS", str(tmp_path / "results"))

    def md4(*arguments: str) -> int:
        monkeypatch.setattr(sys, "argv", ["md4", *arguments])
        try:
            main()
        except SystemExit as end:
            return int(end.code or 0)
        return 0

    assert md4("evaluate", "small@production", "--suite", str(tmp_path / "nightly.yaml")) == 0
    (found,) = results.read(tmp_path / "results")
    assert (found.model, found.version) == ("small", 2)
    assert found.weights_hash in registry.version("small", 2).manifest.weights
    capsys.readouterr()
    assert md4("card", "small@1") == 0
    assert registry.version("small", 1).manifest.files["model.safetensors"].sha256 in capsys.readouterr().out
    assert md4("evaluate", "small@staging", "--suite", str(tmp_path / "nightly.yaml")) == 2
    assert "nothing is signed off as staging; names there: production" in capsys.readouterr().err
