"""Jobs on a real cluster with a token: submitted, followed, lost, stopped, refused."""

import os
import shlex
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from md4.errors import UserError
from orchestration.cli import main
from orchestration.jobs import Job, Jobs, State, following
from orchestration.jobs.connection import Refused
from orchestration.jobs.package import pack
from orchestration.jobs.submission import resubmit
from orchestration.runs import Run
from tests.nodes import ROOT
from tests.orchestration.conftest import tiny_settings
from tests.orchestration.driver import wait_for
from tests.orchestration.jobs.conftest import SECRET
from tests.orchestration.jobs.door import Door
from tests.orchestration.jobs.head import CPUS

SOON = 120.0  # seconds: for what takes one on a machine that is not busy
# A real job of the cluster that says a line whenever a file appears.
LINES = "for n in 1 2 3; do while [ ! -e {folder}/$n ]; do sleep 0.05; done; echo line $n; done"


def md4(*arguments: object, **environment: str) -> subprocess.Popen[str]:
    """A command of its own, as a person at another machine gives it."""
    return subprocess.Popen(
        [sys.executable, "-m", "orchestration", *map(str, arguments)],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1", **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def said(command: subprocess.Popen[str], seconds: float = SOON) -> tuple[int, str]:
    """Exit code and all that was printed."""
    out, _ = command.communicate(timeout=seconds)
    return command.returncode, out


@pytest.fixture
def here(capsys, monkeypatch):
    """`here("jobs", "list")` -> exit code and all that was printed, of a command in this process, which has imported
    what it needs."""

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


def read_until(command: subprocess.Popen[str], text: str) -> None:
    """Read what a command prints, up to the line with this text."""
    assert command.stdout is not None
    before = []
    for line in command.stdout:
        before.append(line)
        if text in line:
            return
    raise AssertionError(f"{text!r} was not said: {''.join(before)}")


class Follower:
    """Follows a job from a thread."""

    def __init__(self, jobs: Jobs, submission_id: str):
        self.lines: list[str] = []
        self.outcome: State | Exception | None = None
        self._thread = threading.Thread(target=self._follow, args=(jobs, submission_id), daemon=True)
        self._thread.start()

    def _follow(self, jobs: Jobs, submission_id: str) -> None:
        try:
            self.outcome = jobs.follow(submission_id, self.lines.append)
        except Exception as error:
            self.outcome = error

    def wait_for(self, line: str) -> None:
        wait_for(lambda: any(line in one for one in self.lines) or self.outcome, SOON, line)
        assert any(line in one for one in self.lines), (self.outcome, self.lines)

    def end(self) -> State | Exception | None:
        self._thread.join(SOON)
        return self.outcome


def send_lines(jobs: Jobs, submission_id: str, folder: Path, **resources: float) -> None:
    facts = {"md4/name": submission_id, "md4/verb": "train"}
    assert jobs.send(submission_id, LINES.format(folder=folder), {}, facts, **resources)


def test_an_id_is_there_once_and_a_mistake_is_not_tried_again(sender):
    jobs = Jobs()
    job = Job(verb="evaluate", arguments=("/absent/run",), name="absent", labels={"owner": "anna"}, num_cpus=0.5)
    assert jobs.state("absent-1") is None
    assert jobs.submit(job, "absent-1")
    assert not jobs.submit(job, "absent-1")
    lines: list[str] = []
    state = jobs.follow("absent-1", lines.append)
    assert (state, jobs.exit_code("absent-1", state)) == (State.FAILED, 2)
    (found,) = jobs.known("absent")
    assert (found.attempt, found.verb, found.labels) == (1, "evaluate", {"owner": "anna"})
    assert [line for line in lines if line.startswith("md4: /absent/run is not a run's folder")]
    assert not [line for line in lines if "attempt" in line]
    # The wheel's code ran, not the one that is installed here.
    assert [line for line in lines if line.startswith("job: md4 evaluate /absent/run (md4 0.1.0+code.")]
    # What was sent is still there, and can be sent once more.
    again = resubmit(jobs, "absent", lambda _: None)
    assert again == "absent-2"
    assert jobs.follow(again, lambda _: None) == State.FAILED
    first, second = jobs.known("absent")
    assert first.metadata["md4/cpus"] == second.metadata["md4/cpus"] == "0.5"


def test_the_log_goes_on_after_a_lost_connection_and_a_new_token(sender, tmp_path, monkeypatch):
    token = tmp_path / "token"
    token.write_text("the first token")
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(token))
    with Door(sender.address, sender.token.read_text(), "the first token") as door:
        jobs = Jobs(door.address)
        send_lines(jobs, "lines-1", tmp_path)
        follower = Follower(jobs, "lines-1")
        (tmp_path / "1").touch()
        follower.wait_for("line 1")

        door.shut()
        follower.wait_for("the connection is lost")
        (tmp_path / "2").touch()
        door.open()
        follower.wait_for("line 2")

        door.rotate("the second token")
        wait_for(lambda: door.refused >= 2, SOON, "a request with the old token")
        token.write_text("the second token")
        (tmp_path / "3").touch()
        assert follower.end() == State.SUCCEEDED
    log = [line for line in follower.lines if line.startswith("line")]
    assert log == ["line 1", "line 2", "line 3"]


def test_a_token_that_is_wrong_or_missing_is_named(sender, tmp_path, monkeypatch):
    wrong = tmp_path / "wrong"
    wrong.write_text("of another cluster")
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(wrong))
    with pytest.raises(Refused, match=f"does not accept the token of {wrong}"):
        Jobs().known()
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(tmp_path / "absent"))
    with pytest.raises(Refused, match=r"absent.*RAY_AUTH_TOKEN_PATH names the file"):
        Jobs().known()
    wrong.write_text("")
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(wrong))
    with pytest.raises(Refused, match="is empty"):
        Jobs().known()
    monkeypatch.delenv("RAY_AUTH_TOKEN_PATH")
    monkeypatch.delenv("RAY_AUTH_MODE")
    with pytest.raises(Refused, match="asks for a token: set RAY_AUTH_MODE=token"):
        Jobs().known()


def test_who_follows_a_job_that_has_not_begun_is_told_why(sender, tmp_path, monkeypatch):
    monkeypatch.setattr(following, "_LOOK_SECONDS", 0.2)
    jobs = Jobs()
    send_lines(jobs, "first-1", tmp_path, entrypoint_num_cpus=CPUS)
    wait_for(lambda: jobs.state("first-1") == State.RUNNING, SOON, "the job that takes all CPUs")
    assert jobs.send("second-1", "true", {}, {"md4/name": "second"}, entrypoint_num_cpus=1)
    follower = Follower(jobs, "second-1")
    follower.wait_for("md4: second-1 is pending: Job has not started yet. It may be waiting for resources")
    for name in "123":
        (tmp_path / name).touch()
    assert follower.end() == State.SUCCEEDED
    assert len([line for line in follower.lines if "is pending" in line]) == 1


def test_a_job_that_the_cluster_does_not_know_is_named(sender):
    jobs = Jobs()
    for ask in (jobs.find, jobs.stop, lambda which: jobs.follow(which, print)):
        with pytest.raises(UserError, match="knows no job 'never-sent'"):
            ask("never-sent")


def test_a_job_whose_files_cannot_be_made_says_why(sender):
    jobs = Jobs()
    jobs.send("broken-1", "true", {"working_dir": "gcs://_ray_pkg_0123456789abcdef.zip"}, {"md4/name": "broken"})
    lines: list[str] = []
    assert jobs.follow("broken-1", lines.append) == State.FAILED
    assert jobs.exit_code("broken-1", State.FAILED) == 1
    assert any("_ray_pkg_0123456789abcdef" in line for line in lines)
    with pytest.raises(UserError, match="has not kept the files of broken-1"):
        resubmit(jobs, "broken", lambda _: None)


def test_a_secret_reaches_the_workers_and_is_nowhere_written(sender):
    jobs = Jobs()
    packed = pack(Job(verb="train", name="secret", secrets=("OURS=env:TEAM_KEY",)), "secret-1")
    program = (
        "import os, ray; ray.init(); look = ray.remote(lambda: os.environ['OURS'][::-1]); print(ray.get(look.remote()))"
    )
    jobs.send("secret-1", shlex.join(["python", "-c", program]), packed.environment, packed.metadata)
    lines: list[str] = []
    assert jobs.follow("secret-1", lines.append) == State.SUCCEEDED, lines
    assert SECRET[::-1] in lines
    kept = jobs.ask(lambda client: client.get_job_info("secret-1")).model_dump_json()
    assert "OURS=env:TEAM_KEY" in kept
    assert SECRET not in kept


def test_a_wrong_bucket_is_one_message_and_one_attempt(sender, here, s3, corpus, data_directory, tmp_path):
    settings = tiny_settings(corpus, data_directory, tmp_path / "runs")
    wrong = ["name=nobucket", "checkpoint.directory=s3://absent-bucket/x"]
    code, out = here("submit", "--wait", "0", "train", "pydocs-tiny", *settings, *wrong)
    assert code == 2, out
    assert "the bucket 'absent-bucket' does not exist" in out
    assert "failure 1 of" not in out
    assert "Traceback" not in out
    assert not (tmp_path / "runs").exists()


def test_plain_ray_gives_the_same_run_and_a_lost_client_loses_nothing(sender, here, corpus, data_directory, tmp_path):
    def settings(runs: str) -> list[str]:
        return [
            *tiny_settings(corpus, data_directory, tmp_path / runs),
            "train.steps=4",
            "train.workers=1",
            "train.spare=false",
        ]

    ours = ["submit", "--label", "owner=anna", "train", "pydocs-tiny", *settings("ours")]
    first = md4(*ours)
    read_until(first, "job: md4 train")
    first.kill()  # the client is lost
    first.wait()

    # Other settings under the same name are refused while it runs; the same ones follow it to its end.
    code, out = here(*ours, "train.steps=5")
    assert code == 2, out
    assert "tiny-1 is running, and another job" in out
    code, out = here(*ours)
    assert code == 0, out
    assert "tiny-1 is the same, and running: nothing new is submitted" in out
    assert "done: step 4" in out
    code, out = here(*ours)
    assert code == 0, out
    assert "tiny-1 is the same, and has succeeded" in out

    # What --dry-run prints as the plain command does the same.
    code, out = here("submit", "--dry-run", "train", "pydocs-tiny", *settings("plain"), "name=plain")
    assert code == 0, out
    plain = next(line for line in out.splitlines() if line.strip().startswith("ray job submit"))
    done = subprocess.run(plain, shell=True, env=os.environ, capture_output=True, text=True, timeout=2 * SOON)
    assert done.returncode == 0, done.stdout + done.stderr

    mine, other = Run(tmp_path / "ours" / "tiny"), Run(tmp_path / "plain" / "plain")
    assert figures(mine) == figures(other)
    assert weights(mine) == weights(other)
    code, out = here("jobs", "list", "--label", "owner=anna", "--name", "tiny")
    assert code == 0, out
    assert [word for word in ("tiny", "train", "succeeded", "owner=anna", str(mine.path)) if word not in out] == []


def test_a_stopped_job_ends_with_its_own_code(sender, here, corpus, data_directory, tmp_path):
    settings = [*tiny_settings(corpus, data_directory, tmp_path / "runs"), "name=stopped", "train.steps=100000"]
    command = md4("submit", "train", "pydocs-tiny", *settings)
    read_until(command, "job: md4 train")
    code, out = here("jobs", "stop", "stopped")
    assert code == 0, out
    assert "stopped-1 was asked to end" in out
    code, out = said(command)
    assert code == 143, out
    assert "job: stopped: the command is asked to end" in out
    assert Jobs().state("stopped-1") == State.STOPPED


def test_ctrl_c_leaves_the_job_running(sender, tmp_path):
    jobs = Jobs()
    send_lines(jobs, "patient-1", tmp_path)
    command = md4("jobs", "logs", "patient-1")
    (tmp_path / "1").touch()
    read_until(command, "line 1")
    command.send_signal(signal.SIGINT)
    code, out = said(command)
    assert code == 130, out
    assert "patient-1 goes on; follow it with: md4 jobs logs patient-1" in out
    assert jobs.state("patient-1") == State.RUNNING
    for name in "23":
        (tmp_path / name).touch()
    assert jobs.follow("patient-1", lambda _: None) == State.SUCCEEDED


def figures(run: Run) -> list[tuple]:
    """What training and evaluation measured, but for times."""
    keys = ("kind", "step", "bits_per_token", "standard_error", "gradient_norm", "learning_rate")
    return [tuple(row.get(key) for key in keys) for row in run.metrics() if row["kind"] in ("train", "evaluation")]


def weights(run: Run) -> str:
    from orchestration import checkpoints

    found = checkpoints.newest(run.checkpoints, pytest.fail)
    assert found is not None
    return found.weights_hash("weights")
