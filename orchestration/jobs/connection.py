"""The connection to a cluster's dashboard. Requests have a limit of time; tokens are read anew when they are refused.

The token is the one of Ray's own settings: with RAY_AUTH_MODE=token what RAY_AUTH_TOKEN says, or the file at
RAY_AUTH_TOKEN_PATH, or ~/.ray/auth_token.
"""

import logging
import os
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from md4.errors import Failed, UserError

T = TypeVar("T")
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


class Answer(Failed):
    """An answer of the server's that is no success."""

    def __init__(self, address: str, status: int, text: str):
        self.status, self.text = status, text
        super().__init__(f"{address} answers with {status}: {self.last_line}")

    @classmethod
    def of(cls, error: RuntimeError, address: str) -> "Answer | None":
        """The answer that Ray's client makes such an error of."""
        before, middle, rest = str(error).partition("Request failed with status code ")
        status, colon, text = rest.partition(":")
        return (
            cls(address, int(status), text.strip(" ."))
            if middle and not before and colon and status.isdecimal()
            else None
        )

    @property
    def last_line(self) -> str:
        """Of a stack trace, what it is about."""
        return next((line for line in reversed(self.text.splitlines()) if line.strip()), "").strip()


def dashboard(address: str | None) -> str | None:
    """The address given, or the one that the environment says; None when there is none."""
    return address or next((found for one in _VARIABLES if (found := os.environ.get(one))), None)


class Connection:
    """To the dashboard of one cluster.

    address: http(s)://HOST:PORT; None = what RAY_API_SERVER_ADDRESS or RAY_ADDRESS says.

    Raises:
        UserError: there is no address, or it can't be one; of every request `Away`, `Refused`, `Answer` that is no
            success, or what Ray's client says.
    """

    def __init__(self, address: str | None = None):
        found = dashboard(address)
        if found is None:
            raise UserError("which cluster? --address http://HOST:8265, or RAY_API_SERVER_ADDRESS, says it")
        self.address = _url(found)
        self._client: Any = None
        self._token: str | None = None

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
            if answer := Answer.of(error, self.address):
                raise answer from None
            raise UserError(f"{self.address}: {_first_line(error)}") from None

    def away(self, error: BaseException) -> Away:
        """The exception for a request that nobody answered."""
        why = _first_line(error).rpartition(": ")[2].strip("'\")>] ")  # of the many that each have the next inside
        more = "" if self.address in why else f" ({why})"
        return Away(f"no dashboard of Ray answers at {self.address}{more}")

    def refused(self) -> Refused:
        """The exception for a token that was not accepted, or not given."""
        if self._token is None:
            return Refused(
                f"{self.address} asks for a token: set RAY_AUTH_MODE=token, and RAY_AUTH_TOKEN_PATH to the file that "
                "holds the cluster's"
            )
        return Refused(f"{self.address} does not accept the token of {_token_source()[1]}: is it this cluster's?")


def _url(address: str) -> str:
    """The dashboard's url; of a cluster that is named by the address of its own protocol, what that says."""
    if address.startswith(("http://", "https://")):
        return address.rstrip("/")
    if "://" in address and not address.startswith("ray://"):
        raise UserError(f"address {address!r} must be http://HOST:PORT or https://HOST:PORT of the cluster's dashboard")
    if re.fullmatch(r"[^:/]+:\d+", address) and _is_http(address):
        return f"http://{address}"
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


def _is_http(address: str) -> bool:
    """Does HOST:PORT speak HTTP, as a dashboard does? `Away` when nobody is there: Ray itself would wait for long."""
    import http.client

    connection = http.client.HTTPConnection(address, timeout=_TIMEOUT[0])
    try:
        connection.connect()
    except OSError as error:
        raise Away(f"nobody answers at {address} ({error})") from None
    try:
        connection.request("GET", "/api/version")
        return bool(connection.getresponse().status)
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()


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
