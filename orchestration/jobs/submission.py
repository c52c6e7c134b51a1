"""One name, one job at a time: what runs already is followed, what ended badly is tried again under the next number."""

from collections.abc import Callable
from dataclasses import dataclass

from md4.errors import UserError
from orchestration.jobs import package
from orchestration.jobs.client import Jobs, Known
from orchestration.jobs.spec import Job, State

Say = Callable[[str], None]


@dataclass(frozen=True)
class Submitted:
    """The job that stands for what was submitted."""

    id: str
    state: State | None  # None: it was submitted just now


def submit(jobs: Jobs, job: Job, say: Say, *, again: bool = False, install: bool = False) -> Submitted:
    """Submit a job under its name, unless the same runs or, but for `again`, has succeeded already.

    Raises:
        UserError: another job of this name runs.
    """
    asked = package.digest(job)
    while True:
        attempts = jobs.known(job.name)
        for one in attempts:
            if one.state.over:
                continue
            if one.digest == asked:
                say(f"{one.id} is the same, and {one.state.lower()}: nothing new is submitted")
                return Submitted(one.id, one.state)
            raise UserError(
                f"{one.id} is {one.state.lower()}, and another job:\n  there  {one.command}\n  here   {job.typed}\n"
                f"stop it (md4 jobs stop {job.name}), or submit this one under another --name"
            )
        last = attempts[-1] if attempts else None
        if last is not None and last.state == State.SUCCEEDED and last.digest == asked and not again:
            say(f"{last.id} is the same, and has succeeded: nothing is submitted (--again does it once more)")
            return Submitted(last.id, last.state)
        submission_id = f"{job.name}-{_next(attempts)}"
        if jobs.submit(job, submission_id, install=install):
            before = f", after {last.id} ({last.state.lower()})" if last else ""
            say(f"submitted: {submission_id}{before}")
            return Submitted(submission_id, None)
        # Somebody else has just taken this number: look again.


def resubmit(jobs: Jobs, which: str, say: Say) -> str:
    """Submit once more what was sent for a job that is over; gives the new id."""
    found = jobs.find(which)
    for one in jobs.known(found.name):
        if not one.state.over:
            raise UserError(f"{one.id} is {one.state.lower()}: it is followed by md4 jobs logs {one.id}")
    if not jobs.has_files(found.environment):
        raise UserError(f"the cluster has not kept the files of {found.id}: submit it again with md4 submit")
    number = _next(jobs.known(found.name))
    submission_id = f"{found.name}-{number}"
    metadata = {**found.metadata, package.ATTEMPT: str(number)}
    resources = {name: float(metadata[key]) for key, name in package.RESOURCES.items() if key in metadata}
    if not jobs.send(submission_id, found.entrypoint, found.environment, metadata, **resources):
        raise UserError(f"{submission_id} was submitted by somebody else just now")
    say(f"submitted: {submission_id}, the same as {found.id} ({found.state.lower()})")
    return submission_id


def _next(attempts: list[Known]) -> int:
    return 1 + max((one.attempt or 0 for one in attempts), default=0)
