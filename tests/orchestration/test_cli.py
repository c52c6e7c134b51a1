"""The command line: what it prints, and its exit codes."""

import os
import subprocess
import sys

import pytest

from orchestration.cli import main
from orchestration.config import load
from orchestration.serving.keys import Keys


def md4(*arguments: str, cwd=None, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", "from orchestration.cli import main; main()", *arguments]
    return subprocess.run(
        command, cwd=cwd, env={**os.environ, **environment}, capture_output=True, text=True, timeout=120
    )


def test_config_prints_the_resolved_tree_and_the_size():
    done = md4("config", "text8", "train.workers=2")
    assert done.returncode == 0, done.stderr
    assert "workers: 2" in done.stdout
    assert "parameters: 88,734,272" in done.stdout


def test_dry_run_checks_everything_and_starts_nothing(tmp_path, monkeypatch, capsys):
    overrides = [f"runs={tmp_path}/runs", f"data.directory={tmp_path}/data"]
    monkeypatch.setattr(sys, "argv", ["md4", "train", "pydocs-tiny", "--dry-run", *overrides])
    main()
    said = capsys.readouterr().out
    assert "929,568 parameters" in said
    assert "nothing was started" in said
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["train", "pydoc-tiny"], "did you mean 'pydocs-tiny'"),
        (["train", "pydocs-tiny", "train.stepz=1"], "did you mean 'train.steps'"),
        (["train", "pydocs-tiny", "train.workers=16", "--dry-run"], "train.slices=8"),
        (["train", "pydocs-tiny", "name=never-made", "--resume", "--dry-run"], "not a run's folder"),
        (["evaluate", "runs/absent"], "not a run's folder"),
        (["sample", "runs/absent"], "not a run's folder"),
        (["serve", "runs/absent"], "not a run's folder"),
        (["export", "runs/absent", "out"], "not a run's folder"),
        (["prepare", "pydocs-tiny", "data.source=jsonl"], "data.path"),
        (["prepare", "text8", "data.path=absent.txt"], "absent.txt"),
        (["trian"], "Did you mean 'train'"),
    ],
)
def test_mistakes_are_one_message_and_exit_code_2(tmp_path, monkeypatch, capsys, arguments, expected):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["md4", *arguments])
    with pytest.raises(SystemExit) as left:
        main()
    said = capsys.readouterr().err
    assert left.value.code == 2
    assert expected in said
    assert "Traceback" not in said
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("port", "allowed"), [("-1", "greater than or equal to 0"), ("70000", "less than or equal to 65535")]
)
def test_a_port_of_serve_is_checked_as_the_setting_is(tmp_path, monkeypatch, capsys, port, allowed):
    (tmp_path / "config.yaml").write_text(load("pydocs-tiny").to_yaml())
    said = []
    for arguments in (["serve", str(tmp_path), "--port", port], ["config", "pydocs-tiny", f"serving.port={port}"]):
        monkeypatch.setattr(sys, "argv", ["md4", *arguments])
        with pytest.raises(SystemExit) as left:
            main()
        assert left.value.code == 2
        said.append(capsys.readouterr().err)
    assert said[0] == said[1] == f"md4: serving.port={port}: input should be {allowed}\n"


def test_a_stranger_among_the_packages_is_named(tmp_path):
    intruder = tmp_path / "pipelines"
    intruder.mkdir()
    (intruder / "__init__.py").write_text("")
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    done = md4("config", "text8", cwd=elsewhere, PYTHONPATH=str(tmp_path))
    assert done.returncode == 2
    assert str(tmp_path) in done.stderr
    assert "'pipelines'" in done.stderr


def test_a_key_is_shown_once_and_its_hash_kept(tmp_path, monkeypatch, capsys):
    file = tmp_path / "keys"
    for name in ("alice", "bob"):
        monkeypatch.setattr(sys, "argv", ["md4", "key", name, "--file", str(file)])
        main()
        key = capsys.readouterr().out.split()[0]
        assert Keys(file).name_of(key) == name
        assert key not in file.read_text()
    with pytest.raises(SystemExit) as caught:
        main()
    assert caught.value.code == 2
    assert "has a key of 'bob' already" in capsys.readouterr().err
    assert len(file.read_text().splitlines()) == 2


def test_ctrl_c_ends_with_its_own_code(tmp_path):
    (tmp_path / "config.yaml").write_text(load("pydocs-tiny").to_yaml())
    program = "from orchestration import status\ndef interrupted(run): raise KeyboardInterrupt\n"
    program += "status.status = interrupted\nfrom orchestration.cli import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", program, "status", str(tmp_path)], capture_output=True, text=True, timeout=120
    )
    assert (done.returncode, done.stderr.strip()) == (130, "md4: interrupted")
