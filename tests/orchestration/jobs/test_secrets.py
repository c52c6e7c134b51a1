"""Secrets go by reference: what looks like one is refused with its place, never its value; references are resolved."""

import os

import pytest

from md4.errors import UserError
from orchestration.jobs import secrets
from orchestration.jobs.spec import make

AWS_KEY = "AKIA" + "Q3EXAMPLE7WORDS2"
AWS_SECRET = "wJalrXUtnFEMI/K7MDENG+bPxRfiCYEXAMPLEKEY"
WANDB = "0123456789abcdef0123456789abcdef01234567"


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ([f"data.path={AWS_KEY}"], "data.path"),
        ([f"AWS_SECRET_ACCESS_KEY={AWS_SECRET}"], "AWS_SECRET_ACCESS_KEY"),
        ([f"WANDB_API_KEY={WANDB}"], "WANDB_API_KEY"),
        (["tracking.password=hunter2hunter2"], "tracking.password"),
        (["--token", "hunter2hunter2"], "--token"),
        (["--token=hunter2hunter2"], "--token"),
        (["data.path=https://anna:hunter2hunter2@host/corpus"], "data.path"),
        (["https://anna:hunter2hunter2@host/corpus?page=1"], "argument 1"),
        (["data.path=https://host/corpus?X-Amz-Signature=hunter2hunter2"], "data.path"),
        ([f"judge=hf_{'x' * 34}"], "judge"),
        ([f"note=ghp_{'x' * 36}"], "note"),
    ],
)
def test_an_argument_that_looks_like_a_secret_is_refused_by_its_key(arguments, named):
    with pytest.raises(UserError, match="by reference alone") as refused:
        make(verb="train", arguments=tuple(arguments), name="x")
    assert named in str(refused.value)
    for secret in (AWS_KEY, AWS_SECRET, WANDB, "hunter2", "x" * 30):
        assert secret not in str(refused.value)


@pytest.mark.parametrize(
    ("facts", "named"),
    [
        ({"labels": {"owner": AWS_KEY}}, "labels.owner"),
        ({"labels": {"api-key": "anna"}}, "labels.api-key"),
        ({"files": {"config.yaml": f"tracking:\n  api_key: {WANDB}\n"}}, "config.yaml: tracking.api_key"),
        ({"files": {"notes.txt": f"first\nkey {AWS_KEY}\n"}}, "notes.txt, line 2"),
        ({"files": {"key.pem": "-----BEGIN RSA PRIVATE KEY-----\n"}}, "key.pem, line 1"),
        ({"typed": f"md4 train x {AWS_KEY}"}, "command"),
        ({"secrets": (f"AWS_SECRET_ACCESS_KEY={AWS_SECRET}",)}, "secret AWS_SECRET_ACCESS_KEY is not a reference"),
        ({"secrets": (AWS_SECRET,)}, "a secret is named as NAME=env:VARIABLE"),
    ],
)
def test_so_is_one_anywhere_else(facts, named):
    with pytest.raises(UserError) as refused:
        make(verb="train", name="x", **facts)
    assert named in str(refused.value)
    for secret in (AWS_KEY, AWS_SECRET, WANDB):
        assert secret not in str(refused.value)


def test_settings_that_only_sound_like_secrets_are_none():
    arguments = ("data.vocabulary=words/tokenizer.json", "train.steps=5", "--tokenizer", "gpt2", "grid=keys", "token=")
    make(verb="train", arguments=arguments, name="x", files={"config.yaml": "serving:\n  keys: null\n"})
    make(verb="train", name="x", files={"tokenizer.json": '{"token": 12, "content": "<|endoftext|>"}'})


def test_references_are_resolved_where_they_are_used(tmp_path, monkeypatch):
    file = tmp_path / "key"
    file.write_text("from a file\n")
    monkeypatch.setenv("TEAM_KEY", "from a variable")
    monkeypatch.setenv("POD_KEY", "from the pod")
    references = ["A=env:TEAM_KEY", f"B=file:{file}", "POD_KEY=k8s:team-secrets/key"]
    assert secrets.resolve(references) == {
        "A": "from a variable",
        "B": "from a file",
        "POD_KEY": "from the pod",
    }


@pytest.mark.parametrize(
    ("reference", "message"),
    [
        ("A=env:ABSENT_VARIABLE", "no variable ABSENT_VARIABLE"),
        ("A=file:/absent/key", "file /absent/key can't be read"),
        ("ABSENT_VARIABLE=k8s:team/key", "no variable ABSENT_VARIABLE from the secret team/key"),
    ],
)
def test_a_missing_one_is_named(reference, message):
    with pytest.raises(UserError, match=message):
        secrets.resolve([reference])


def test_a_workers_process_takes_what_its_machine_has(monkeypatch):
    monkeypatch.setenv("TEAM_KEY", "value")
    monkeypatch.setenv(secrets.REFERENCES, "ONE_OF_OURS=env:TEAM_KEY ANOTHER=env:ABSENT_VARIABLE")
    monkeypatch.delenv("ONE_OF_OURS", raising=False)
    secrets.set_up_worker()
    assert os.environ.pop("ONE_OF_OURS") == "value"
    assert "ANOTHER" not in os.environ
