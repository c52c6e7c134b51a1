"""A cluster's jobs, over HTTP (Ray Jobs)."""

from collections.abc import Callable

from orchestration.jobs.spec import Job, State


class Jobs:
    """The jobs of one cluster. Every method raises UserError when nobody answers or the token is wrong.

    address: http(s)://HOST:PORT of the dashboard; None = what RAY_API_SERVER_ADDRESS or RAY_ADDRESS says.
    """

    def __init__(self, address: str | None = None):
        raise NotImplementedError

    def submit(self, job: Job, submission_id: str) -> bool:
        """Submit a job; False when that id is there already (nothing is started twice)."""
        raise NotImplementedError

    def state(self, submission_id: str) -> State | None:
        """None: the cluster doesn't know it."""
        raise NotImplementedError

    def stop(self, submission_id: str) -> None:
        raise NotImplementedError

    def follow(self, submission_id: str, say: Callable[[str], None]) -> State:
        """Say the log's lines until the job's end; survives lost connections."""
        raise NotImplementedError
