"""A cluster's jobs, over HTTP (Ray Jobs). Requests have a limit of time; tokens are read anew when they are refused.

The token is the one of Ray's own settings: with RAY_AUTH_MODE=token what RAY_AUTH_TOKEN says, or the file at
RAY_AUTH_TOKEN_PATH, or ~/.ray/auth_token.
"""

import dataclasses
import logging
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeVar

from md4.errors import Failed, UserError
from orchestration.jobs import package
from orchestration.jobs.spec import Job, State

T = TypeVar("T")
STOPPED = 143  # exit code of a job that was stopped
_VARIABLES = ("RAY_API_SERVER_ADDRESS", "RAY_ADDRESS")
_TIMEOUT = (10.0, 60.0)  # seconds: to connect, and without a byte
# What they upload is no news to the user.
_CHATTY = (
    "ray.dashboard.modules.dashboard_sdk",
    "ray.dashboard.modules.job.sdk",
    "ray._private.runtime_env.packaging",
)
_ALONE = threading.Lock()  # Ray's client reads the environment, which is the whole process's


class Away(Failed):
    """Nobody answers: the cluster is down, or the way to it."""


class Refused(UserError):
    """The token is missing or wrong."""


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


def dashboard(address: str | None) -> str | None:
    """The address given, or the one that the environment says; None when there is none."""
    return address or next((found for one in _VARIABLES if (found := os.environ.get(one))), None)


class Jobs:
    """The jobs of one cluster.

    address: http(s)://HOST:PORT of the dashboard; None = what RAY_API_SERVER_ADDRESS or RAY_ADDRESS says.

    Raises:
        UserError: of every method; nobody answers (`Away`), the token is missing or wrong (`Refused`), or the cluster
            doesn't want what it was asked for.
    """

    def __init__(self, address: str | None = None):
        found = dashboard(address)
        if found is None:
            raise UserError("which cluster? --address http://HOST:8265, or RAY_API_SERVER_ADDRESS, says it")
        self.address = _url(found)
        self._client: Any = None
        self._token: str | None = None

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
        except _Answer as answer:
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
        except _Answer as answer:
            if answer.status == 404:
                return None
            raise answer.told(self.address) from None

    def known(self, name: str | None = None) -> list[Known]:
        """All jobs that md4 has sent, or those of one name; oldest first."""
        try:
            every = self.ask(lambda client: client.list_jobs())
        except _Answer as answer:
            raise answer.told(self.address) from None
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
        except _Answer as answer:
            if answer.status == 404:
                raise UserError(f"{self.address} knows no job {submission_id!r}") from None
            raise answer.told(self.address) from None

    def log(self, submission_id: str) -> str:
        """All that a job has printed so far."""
        try:
            return self.ask(lambda client: client.get_job_logs(submission_id))
        except _Answer as answer:
            raise answer.told(self.address) from None

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

    # -- requests ---------------------------------------------------------------------------------------------------

    def ask(self, question: Callable[[Any], T]) -> T:
        """Ask the cluster; with a token that it refuses, once more if there is another one by now."""
        try:
            return self._ask(question)
        except Refused:
            if not self.renew():
                raise
        return self._ask(question)

    def renew(self) -> bool:
        """Read the token again; was it another one?"""
        before, self._client = self._token, None
        return _token() != before

    @property
    def headers(self) -> dict[str, str]:
        """What every request carries."""
        return {} if self._token is None else {"Authorization": f"Bearer {self._token}"}

    def _ask(self, question: Callable[[Any], T]) -> T:
        import requests
        from ray.exceptions import AuthenticationError

        try:
            if self._client is None:
                self._token = _token()
                self._client = _connect(self.address, self.headers)
            return question(self._client)
        except AuthenticationError:
            raise self.refused() from None
        except (requests.exceptions.RequestException, ConnectionError) as error:
            raise self.away(error) from None
        except RuntimeError as error:
            if answer := _Answer.of(error):
                raise answer from None
            raise UserError(f"{self.address}: {_first_line(error)}") from None

    def away(self, error: BaseException) -> Away:
        """The exception for a request that nobody answered."""
        why = _first_line(error).rpartition(": ")[2].strip("'\")>] ")  # of the many that each have the next inside
        return Away(f"no dashboard of Ray answers at {self.address} ({why})")

    def refused(self) -> Refused:
        """The exception for a token that was not accepted, or not given."""
        if self._token is None:
            return Refused(
                f"{self.address} asks for a token: set RAY_AUTH_MODE=token, and RAY_AUTH_TOKEN_PATH to the file that "
                "holds the cluster's"
            )
        return Refused(f"{self.address} does not accept the token of {_token_source()[1]}: is it this cluster's?")


class _Answer(Exception):
    """An answer of the server's that is no success."""

    def __init__(self, status: int, text: str):
        super().__init__(status, text)
        self.status, self.text = status, text

    @classmethod
    def of(cls, error: RuntimeError) -> "_Answer | None":
        """The answer that Ray's client makes such an error of."""
        before, middle, rest = str(error).partition("Request failed with status code ")
        status, colon, text = rest.partition(":")
        return cls(int(status), text.strip(" .")) if middle and not before and colon and status.isdecimal() else None

    @property
    def last_line(self) -> str:
        """Of a stack trace, what it is about."""
        return next((line for line in reversed(self.text.splitlines()) if line.strip()), "").strip()

    def told(self, address: str) -> Failed:
        return Failed(f"{address} answers with {self.status}: {self.last_line}")


def _url(address: str) -> str:
    """The dashboard's url; of a cluster that is named by the address of its own protocol, what that says."""
    if address.startswith(("http://", "https://")):
        return address.rstrip("/")
    if "://" in address and not address.startswith("ray://"):
        raise UserError(f"address {address!r} must be http://HOST:PORT or https://HOST:PORT of the cluster's dashboard")
    from ray.dashboard.utils import get_address_for_submission_client

    try:
        with _environment(RAY_API_SERVER_ADDRESS=None, RAY_ADDRESS=None):
            found = get_address_for_submission_client(address)
    except Exception as error:  # of Ray's many
        raise UserError(
            f"address {address!r} must be http://HOST:PORT of the cluster's dashboard, or that of a running cluster "
            f"({_first_line(error)})"
        ) from None
    return found if "://" in found else f"http://{found}"


def _connect(address: str, headers: dict[str, str]) -> Any:
    from ray.job_submission import JobSubmissionClient

    for name in _CHATTY:
        logging.getLogger(name).setLevel(logging.WARNING)

    class Client(JobSubmissionClient):
        """Ray's, whose requests end some day."""

        def _do_request(self, method: str, endpoint: str, **options: Any) -> Any:  # type: ignore[override]
            return super()._do_request(method, endpoint, **{"timeout": _TIMEOUT, **options})

    # Ray lets these variables win over the address that it is given, and takes a token of its own if none is given.
    with _environment(RAY_API_SERVER_ADDRESS=address):
        return Client(address, headers=dict(headers))


@contextmanager
def _environment(**changes: str | None) -> Iterator[None]:
    with _ALONE:
        before = {name: os.environ.get(name) for name in changes}
        try:
            _set(changes)
            yield
        finally:
            _set(before)


def _set(variables: dict[str, str | None]) -> None:
    for name, value in variables.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value


def _token_source() -> tuple[str | None, str]:
    """The token, and where it is from; it goes nowhere unless Ray's settings say so."""
    mode = os.environ.get("RAY_AUTH_MODE", "").lower()
    if mode not in ("", "token"):
        return None, ""
    if token := os.environ.get("RAY_AUTH_TOKEN"):
        return token.strip(), "RAY_AUTH_TOKEN"
    path = os.environ.get("RAY_AUTH_TOKEN_PATH")
    if not path and not mode:
        return None, ""
    file = Path(path) if path else Path.home() / ".ray" / "auth_token"
    try:
        token = file.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise Refused(
            f"the cluster's token can't be read ({error}): RAY_AUTH_TOKEN_PATH names the file that holds it"
        ) from None
    if not token:
        raise Refused(f"{file}, which should hold the cluster's token, is empty")
    return token, str(file)


def _token() -> str | None:
    return _token_source()[0]


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).splitlines()), "") or type(error).__name__


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
