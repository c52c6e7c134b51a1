"""A cluster's jobs, over HTTP (Ray Jobs)."""

import dataclasses
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

from md4.errors import UserError
from orchestration.jobs import package
from orchestration.jobs.connection import Answer, Connection
from orchestration.jobs.spec import Job, State

STOPPED = 143  # exit code of a job that was stopped


@dataclasses.dataclass(frozen=True)
class Known:
    """A job that a cluster knows. Times are s since 1970."""

    id: str
    state: State
    name: str
    attempt: int | None
    verb: str
    command: str
    digest: str
    place: str | None
    labels: dict[str, str]
    began: float | None
    ended: float | None
    exit_code: int | None
    message: str | None
    # As Ray keeps them: what it takes to submit the same again.
    entrypoint: str
    environment: dict[str, Any]
    metadata: dict[str, str]

    def as_tree(self) -> dict[str, Any]:
        """For JSON; times in ISO 8601, in UTC."""
        tree = dataclasses.asdict(self)
        for key in ("entrypoint", "environment", "metadata"):
            del tree[key]
        for key in ("began", "ended"):
            tree[key] = tree[key] and datetime.fromtimestamp(tree[key], UTC).isoformat(timespec="seconds")
        return tree


class Jobs(Connection):
    """The jobs of one cluster.

    address: http(s)://HOST:PORT of the dashboard; None = what RAY_API_SERVER_ADDRESS or RAY_ADDRESS says.

    Raises:
        UserError: of every method; nobody answers (`Away`), the token is missing or wrong (`Refused`), or the cluster
            doesn't want what it was asked for.
    """

    def submit(self, job: Job, submission_id: str, *, install: bool = False) -> bool:
        """Submit a job; False when that id is there already: nothing is started twice."""
        packed = package.pack(job, submission_id, install=install)
        return self.send(
            submission_id,
            packed.entrypoint,
            packed.environment,
            packed.metadata,
            entrypoint_num_cpus=job.num_cpus,
            entrypoint_num_gpus=job.num_gpus,
        )

    def send(
        self,
        submission_id: str,
        entrypoint: str,
        environment: dict[str, Any],
        metadata: dict[str, str],
        **resources: Any,
    ) -> bool:
        """The same of what is packed already."""
        try:
            self.ask(
                lambda client: client.submit_job(
                    submission_id=submission_id,
                    entrypoint=entrypoint,
                    runtime_env=environment,
                    metadata=dict(metadata),
                    **resources,
                )
            )
        except Answer as answer:
            if "already exists" in answer.text:
                return False
            raise UserError(f"{self.address} doesn't take job {submission_id}: {answer.last_line}") from None
        return True

    def state(self, submission_id: str) -> State | None:
        """None: the cluster doesn't know it."""
        found = self.look(submission_id)
        return found and found.state

    def look(self, submission_id: str) -> Known | None:
        """What the cluster knows of one job."""
        try:
            found = self.ask(lambda client: client.get_job_info(submission_id))
            return _known(found) if found.submission_id else None
        except Answer as answer:
            if answer.status == 404:
                return None
            raise

    def known(self, name: str | None = None) -> list[Known]:
        """All jobs that md4 has sent, or those of one name; oldest first."""
        every = self.ask(lambda client: client.list_jobs())
        ours = [_known(one) for one in every if one.submission_id and package.NAME in (one.metadata or {})]
        return sorted((one for one in ours if name in (None, one.name)), key=lambda one: (one.began or 0, one.id))

    def find(self, which: str) -> Known:
        """The job of that id, or the newest of that name; UserError when there is none."""
        if (found := self.look(which)) is not None:
            return found
        if named := self.known(which):
            return named[-1]
        names = ", ".join(sorted({one.name for one in self.known()})) or "none"
        raise UserError(f"{self.address} knows no job {which!r}; names there: {names}")

    def stop(self, submission_id: str) -> None:
        """Have a job end: it is asked first, and killed a minute later."""
        try:
            self.ask(lambda client: client.stop_job(submission_id))
        except Answer as answer:
            if answer.status == 404:
                raise UserError(f"{self.address} knows no job {submission_id!r}") from None
            raise

    def log(self, submission_id: str) -> str:
        """All that a job has printed so far."""
        return self.ask(lambda client: client.get_job_logs(submission_id))

    def follow(self, submission_id: str, say: Callable[[str], None]) -> State:
        """Say the log's lines until the job's end, over lost connections; gives how it ended.

        Raises:
            Failed: nobody answers for long, or the cluster has forgotten the job, for its head was lost.
        """
        from orchestration.jobs.following import Following

        return Following(self, submission_id, say).to_the_end()

    def exit_code(self, submission_id: str, state: State) -> int:
        """What a command that ends with the job ends with."""
        if state == State.SUCCEEDED:
            return 0
        if state == State.STOPPED:
            return STOPPED
        found = self.look(submission_id)
        code = found and found.exit_code
        return code if code is not None and 0 < code < 256 else 1

    def has_files(self, environment: dict[str, Any]) -> bool:
        """Are the files of a job that was sent still there?"""
        places = [environment.get("working_dir"), *environment.get("py_modules", ())]
        return all(
            self.ask(lambda client, one=one: client._package_exists(one))
            for one in places
            if isinstance(one, str) and one.startswith("gcs://")
        )


def _known(details: Any) -> Known:
    facts: dict[str, str] = details.metadata or {}
    number = facts.get(package.ATTEMPT)
    return Known(
        id=details.submission_id,
        state=State(str(getattr(details.status, "value", details.status))),
        name=facts.get(package.NAME) or "",
        attempt=int(number) if number else None,
        verb=facts.get(package.VERB, ""),
        command=facts.get(package.COMMAND) or details.entrypoint,
        digest=facts.get(package.DIGEST, ""),
        place=facts.get(package.PLACE),
        labels={
            key.removeprefix(package.LABEL): value for key, value in facts.items() if key.startswith(package.LABEL)
        },
        began=details.start_time and details.start_time / 1000,
        ended=details.end_time and details.end_time / 1000,
        exit_code=details.driver_exit_code,
        message=details.message,
        entrypoint=details.entrypoint,
        environment=details.runtime_env or {},
        metadata=facts,
    )
