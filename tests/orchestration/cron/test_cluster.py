"""The service and a real cluster: jobs that Ray keeps, a service that is killed at the worst moment."""

import os
import signal
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path

import pytest

from orchestration.cron import Service, Store
from orchestration.jobs import Jobs
from tests.nodes import ROOT
from tests.orchestration.cron.world import SetClock, entry, utc
from tests.orchestration.driver import wait_for
from tests.orchestration.jobs.conftest import cache, head, sender  # noqa: F401

pytestmark = pytest.mark.slow
SOON = 180.0
# Submits, and is killed before it can note that.
KILLED = """
import os, signal, sys
from datetime import datetime
from orchestration.cron import Service, Store
from orchestration.jobs.client import Jobs
from tests.orchestration.cron.world import SetClock

class Killed(Jobs):
    def submit(self, job, submission_id):
        assert super().submit(job, submission_id)
        os.kill(os.getpid(), signal.SIGKILL)

Service(Store(sys.argv[1]), Killed(), SetClock(datetime.fromisoformat(sys.argv[2]))).look()
"""


def absent(schedule: str):
    """Of a run that is not there: the cluster says so after a second."""
    one = entry(schedule)
    return one.model_copy(update={"job": one.job.model_copy(update={"arguments": ("/absent/run",)})})


def test_killed_between_submission_and_record_it_runs_once(sender, tmp_path):  # noqa: F811
    store, due = Store(str(tmp_path / "cron")), utc("2026-11-30T02:00:01")
    store.add(absent("0 2 * * *"), utc("2026-11-30T01:00"))
    killed = subprocess.run(
        [sys.executable, "-c", KILLED, str(store), due.isoformat()],
        cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=SOON,
    )  # fmt: skip
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    (record,) = store.history("nightly")
    assert record.status == "waiting"
    assert record.first_attempt == due

    said: list[str] = []
    both = [Service(store, Jobs(), SetClock(due), said.append) for _ in range(2)]

    def ended() -> bool:
        for service in both:
            service.look()
        return not store.history("nightly")[0].status.open

    wait_for(ended, SOON, "the end of the job")
    assert [one.id for one in Jobs().known()] == ["cron-nightly-20261130T020000Z"]
    (record,) = store.history("nightly")
    assert (record.status, Jobs().look(record.submission_id).exit_code) == ("failed", 2)  # type: ignore[union-attr]
    assert said[-1] == "nightly 2026-11-30 02:00 UTC: failed"
    assert said[:-1] in ([], ["nightly 2026-11-30 02:00 UTC: submitted"])  # found there, and followed


def test_the_command_by_the_real_clock(sender, tmp_path):  # noqa: F811
    """Added, run as a process of its own until a minute has come, ended by a signal."""
    store = Store(str(tmp_path / "cron"))
    store.add(absent("* * * * *"), datetime.now(UTC))
    log = Path(tmp_path / "log")
    with log.open("w") as out:
        running = subprocess.Popen(
            [sys.executable, "-m", "orchestration", "cron", "run", "--store", str(store)],
            cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, stdout=out, stderr=subprocess.STDOUT,
        )  # fmt: skip
    try:
        wait_for(lambda: ": failed" in log.read_text() or running.poll() is not None, SOON, "a run")
        running.send_signal(signal.SIGTERM)
        assert running.wait(30) == 0, log.read_text()
    finally:
        running.kill()
        running.wait()
    record = store.history("nightly")[-1]
    assert (record.status, record.planned.second) == ("failed", 0)
    assert record.submitted is not None
    assert 0 <= (record.submitted - record.planned).total_seconds() < 60
    jobs = {one.id: one.state for one in Jobs().known()}
    assert jobs[record.submission_id] == "FAILED"


def test_a_cluster_that_is_not_there_is_said(tmp_path, monkeypatch):
    store = Store(str(tmp_path / "cron"))
    store.add(absent("0 2 * * *"), utc("2026-11-30T01:00"))
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    said: list[str] = []
    service = Service(store, Jobs("http://127.0.0.1:9"), SetClock(utc("2026-11-30T02:00:01")), said.append)
    service.look()
    assert "no dashboard of Ray answers at http://127.0.0.1:9" in service.trouble
    assert store.history("nightly")[0].status == "waiting"
    assert store.history("nightly")[0].reason == service.trouble
    assert len(said) == 2  # that it waits, and why
