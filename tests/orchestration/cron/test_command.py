"""`md4 cron` as it is typed."""

import json
import re
import sys

import pytest

from orchestration.cli import main
from orchestration.cron import Store
from orchestration.jobs import Job

EVALUATE = ["--", "evaluate", "s3://bucket/runs/mine", "--rows", "64"]
DAILY = ["add", "n", "--at", "0 0 * * *"]


@pytest.fixture
def md4(tmp_path, monkeypatch, capsys):
    """`md4("cron", ...)` -> (exit code, what was printed)."""
    monkeypatch.chdir(tmp_path)
    for name in ("MD4_CRON", "RAY_API_SERVER_ADDRESS", "RAY_ADDRESS", "MD4_PLACE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("COLUMNS", "200")

    def run(*arguments: str) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["md4", *arguments])
        code = 0
        try:
            main()
        except SystemExit as left:
            code = int(left.code or 0)
        found = capsys.readouterr()
        return code, found.out + found.err

    return run


def test_an_entry_from_its_adding_to_its_removal(md4, monkeypatch):
    add = ["cron", "add", "nightly", "--at", "30 2 * * 1-5", "--zone", "Europe/Berlin"]
    options = ["--catch-up", "6h", "--time-limit", "2h", "--attempts", "2", "--label", "owner=anna"]
    code, said = md4(*add, *options, *EVALUATE)
    assert code == 0, said
    assert len(re.findall(r"\d{4}-\d\d-\d\d 02:30 CES?T", said)) == 3
    entry = Store("cron").entry("nightly").entry
    assert (entry.catch_up_s, entry.overlap, entry.paused) == (6 * 3600, "skip", False)
    assert isinstance(entry.job, Job)
    assert (entry.job.verb, entry.job.name, entry.job.time_limit_s) == ("evaluate", "nightly", 7200)
    assert "s3://bucket/runs/mine" in entry.job.arguments
    assert (entry.job.retry.attempts, entry.job.labels) == (2, {"cron": "nightly", "owner": "anna"})

    assert md4(*add, *options, *EVALUATE)[1].startswith("there already")
    assert md4(*add, *EVALUATE)[0] == 2  # another one
    assert md4(*add, "--replace", *EVALUATE)[1].startswith("added")

    assert md4("cron", "pause", "nightly") == (0, "nightly is paused\n")
    (listed,) = json.loads(md4("cron", "list", "--json")[1])
    assert (listed["name"], listed["paused"], listed["next"]) == ("nightly", True, [])
    assert md4("cron", "resume", "nightly") == (0, "nightly is running\n")
    table = md4("cron", "list")[1]
    assert "30 2 * * 1-5" in table
    assert "md4 evaluate" in table
    assert md4("cron", "history", "nightly") == (0, "nightly: no time has come yet\n")
    assert json.loads(md4("cron", "history", "nightly", "--json")[1]) == []
    assert md4("cron", "remove", "nightly")[0] == 0
    assert md4("cron", "list")[1] == "no entries in cron\n"
    monkeypatch.setenv("MD4_CRON", "elsewhere")
    assert md4("cron", "list")[1] == "no entries in elsewhere\n"


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["add", "n", "--at", "30 2 * *", *EVALUATE], "4 fields instead of 5"),
        (["add", "n", "--at", "0 0 31 2 *", *EVALUATE], "has no times"),
        ([*DAILY, "--zone", "Berlin", *EVALUATE], "zone 'Berlin' is not a time zone"),
        (["add", "N_1", "--at", "0 0 * * *", *EVALUATE], "name 'N_1': at most 40 of a-z 0-9 -"),
        ([*DAILY, "--overlap", "kill", *EVALUATE], "overlap='kill': input should be 'skip' or"),
        ([*DAILY, "--attempts", "2000", *EVALUATE], "retry.attempts=2000: Input should be less than"),
        ([*DAILY, "--catch-up", "soon", *EVALUATE], "--catch-up 'soon' is not a time"),
        ([*DAILY, "--", "serve", "runs/mine"], "md4 serve is no job for a cluster"),
        ([*DAILY, "--", "train", "pydocs-tiny", "train.stepz=1"], "did you mean 'train.steps'"),
        ([*DAILY, "--label", "key=AKIAABCDEFGHIJKLMNOP", *EVALUATE], "secrets go by reference"),
        (["pause", "n"], "no entry 'n' in cron; there are: none"),
        (["history", "n"], "no entry 'n' in cron; there are: none"),
        (["run", "--once"], "which cluster?"),
    ],
)  # fmt: skip
def test_mistakes_are_one_message_and_nothing_is_kept(md4, tmp_path, arguments, says):
    code, said = md4("cron", *arguments)
    assert (code, says in said) == (2, True), said
    assert "Traceback" not in said
    assert not list(tmp_path.rglob("*.json"))
