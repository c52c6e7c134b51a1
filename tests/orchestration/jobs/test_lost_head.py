"""The head of a cluster is lost in the middle of a run: submitted again, that goes on to the undisturbed one's bits."""

import signal

import pytest

from orchestration.runs import Run
from tests.orchestration.conftest import tiny_settings
from tests.orchestration.driver import wait_for
from tests.orchestration.jobs.conftest import TOKEN
from tests.orchestration.jobs.head import Head
from tests.orchestration.jobs.test_cluster import SOON, md4, read_until, said, weights

STEPS = 30


def environment(head: Head, cache) -> dict[str, str]:
    """Of a sender whose file with the token is not the cluster's own, which may go."""
    token = cache / "token"
    token.write_text(head.token.read_text())
    return {**Head.access(token), "RAY_API_SERVER_ADDRESS": head.address, "MD4_CACHE": str(cache)}


def steps(run) -> list[int]:
    """Of its committed checkpoints."""
    folder = run / "checkpoints"
    return sorted(int(path.parent.name.split("-")[1]) for path in folder.glob("step-*/manifest.json"))


@pytest.mark.slow
def test_submitted_again_after_a_lost_head_a_run_is_resumed(corpus, data_directory, cache, tmp_path):
    def settings(runs: str) -> list[str]:
        own = [f"train.steps={STEPS}", "train.workers=1", "checkpoint.every=5", "checkpoint.keep=99"]
        return [*tiny_settings(corpus, data_directory, tmp_path / runs), *own]

    head = Head(TOKEN)
    try:
        ours = ["submit", "train", "pydocs-tiny", *settings("ours")]
        first = md4(*ours, **environment(head, cache))
        run = tmp_path / "ours" / "tiny"
        wait_for(lambda: steps(run), 4 * SOON, "a checkpoint")
        head.kill()
        reached = steps(run)[-1]
        assert reached < STEPS
        first.send_signal(signal.SIGINT)
        code, out = said(first)
        assert code == 130, out
        assert "the connection is lost, the job goes on without it" in out
    finally:
        head.close()

    head = Head("another-token-of-another-cluster")
    try:
        code, out = said(md4(*ours, **environment(head, cache)), 4 * SOON)
        assert code == 0, out
        assert f"run {run} exists: it is resumed" in out
        assert f"continuing {run} from step" in out
        code, out = said(
            md4("submit", "train", "pydocs-tiny", *settings("other"), **environment(head, cache)), 4 * SOON
        )
        # The same name, and another job: it has ended, so this is the next attempt of that name.
        assert code == 0, out
        assert "submitted: tiny-2, after tiny-1 (succeeded)" in out
    finally:
        head.close()
    assert weights(Run(run)) == weights(Run(tmp_path / "other" / "tiny"))


@pytest.mark.slow
def test_who_follows_learns_that_the_head_was_lost_and_stopped_training_goes_on(
    corpus, data_directory, cache, tmp_path
):
    settings = [*tiny_settings(corpus, data_directory, tmp_path / "runs"), f"train.steps={STEPS}", "train.workers=1"]
    settings += ["checkpoint.every=5"]
    run = tmp_path / "runs" / "tiny"
    head = Head(TOKEN)
    ports = head.ports
    try:
        command = md4("submit", "train", "pydocs-tiny", *settings, **environment(head, cache))
        wait_for(lambda: steps(run), 4 * SOON, "a checkpoint")
        code, out = said(md4("jobs", "stop", "tiny", **environment(head, cache)))
        assert code == 0, out
        code, out = said(command)
        assert code == 143, out
        assert "stopped: the command is asked to end" in out, out
        reached = steps(run)[-1]
        again = md4("submit", "train", "pydocs-tiny", *settings, **environment(head, cache))
        read_until(again, f"continuing {run} from step {reached}")
    finally:
        head.kill()
        head.close()
    head = Head(TOKEN, ports)
    try:
        code, out = said(again, 2 * SOON)
        assert code == 1, out
        assert "no longer knows job tiny-2: its head was lost" in out
    finally:
        head.close()
