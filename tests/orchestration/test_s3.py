"""The commands with a prepared set in S3: the same as with one on this machine."""

import json
import sys

import pytest

from orchestration.cli import main
from orchestration.config import load
from pipelines.config import prepared_path
from pipelines.manifest import Manifest
from tests.orchestration.conftest import tiny_settings
from tests.s3 import BUCKET


def md4(monkeypatch, *arguments: str) -> None:
    monkeypatch.setattr(sys, "argv", ["md4", *arguments])
    main()


def test_mistakes_are_said_before_anything_starts(s3, monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    cases = [
        (["prepare", "pydocs-tiny", "data.directory=s3://absent/x"], "the bucket 'absent' does not exist"),
        (["train", "pydocs-tiny", "--dry-run", "data.directory=s3://absent/x"], "the bucket 'absent' does not exist"),
        (["prepare", "pydocs-tiny", "data.directory=s3:/bucket/x"], "neither a local path nor a url of the form s3://"),
        (["data", "verify", f"s3://{BUCKET}/x"], f"'s3://{BUCKET}/x' is not a prepared set"),
    ]
    for arguments, message in cases:
        with pytest.raises(SystemExit) as left:
            md4(monkeypatch, *arguments)
        assert left.value.code == 2
        said = capsys.readouterr().err
        assert message in said
        assert said.count("\n") == 1


@pytest.mark.ray
@pytest.mark.slow
def test_prepare_train_evaluate_verify(ray_cluster, s3, corpus, data_directory, tmp_path, monkeypatch, capsys):
    """Through a proxy at which a tenth of the requests fail; the losses are those of the set on this machine."""
    there, here = (
        tiny_settings(corpus, f"s3://{BUCKET}/data", tmp_path / "there"),
        tiny_settings(corpus, data_directory, tmp_path / "here"),
    )  # type: ignore[arg-type]
    s3.fails(0.1, seed=1)
    md4(monkeypatch, "prepare", "pydocs-tiny", *there)
    root = str(prepared_path(load("pydocs-tiny", there).data))
    assert root.startswith(f"s3://{BUCKET}/data/")
    losses = []
    for overrides in (there, here):
        md4(monkeypatch, "train", "pydocs-tiny", *overrides, "train.steps=6", "train.log_every=1", "train.workers=1")
        run = load("pydocs-tiny", overrides).directory
        rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        losses.append([row["bits_per_token"] for row in rows if row["kind"] == "train"])
    assert len(losses[0]) == 6
    assert losses[0] == losses[1]
    capsys.readouterr()
    md4(monkeypatch, "evaluate", str(run), "--data", root, "--rows", "8", "--draws", "1")
    assert "bits" in capsys.readouterr().out
    md4(monkeypatch, "data", "verify", root)
    assert f"{root} is sound" in capsys.readouterr().out
    assert Manifest.load(root) == Manifest.load(prepared_path(load("pydocs-tiny", here).data))
    assert sum(s3.failed.values()) >= 1
