"""Requests to S3, each tried again while its failure looks like one that passes. Used by `pipelines.storage` alone.

Where the endpoint is and who asks follows from the standard AWS chain (environment, profile, role of the machine) and
from nothing else: AWS_ENDPOINT_URL, AWS_PROFILE, AWS_ACCESS_KEY_ID, AWS_CA_BUNDLE... An object is written by one
request, hence visible completely or not at all.
"""

import asyncio
import base64
import functools
import hashlib
import os
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

import aiohttp
import fsspec.asyn
from botocore import exceptions as boto
from s3fs import S3FileSystem

from md4.errors import Failed, UserError
from pipelines.storage import Retries

T = TypeVar("T")
_PASSING_CODES = {
    "SlowDown", "Throttling", "ThrottlingException", "RequestLimitExceeded", "RequestTimeout", "InternalError",
    "ServiceUnavailable", "BadDigest", "IncompleteBody", "XAmzContentSHA256Mismatch", "XAmzContentChecksumMismatch",
}  # fmt: skip
_PASSING_ERRORS = (
    boto.HTTPClientError,  # connections refused, closed, timed out
    boto.IncompleteReadError,
    boto.FlexibleChecksumError,
    aiohttp.ClientError,  # bodies that end too early
    ConnectionError,
    TimeoutError,
)
_UNREACHABLE = (boto.EndpointConnectionError, boto.ConnectTimeoutError, boto.ProxyConnectionError)
_REFUSED = {"AccessDenied", "InvalidAccessKeyId", "SignatureDoesNotMatch", "ExpiredToken", "InvalidToken", "403"}
_FIRST_CONTACT = 3  # attempts at an endpoint that has never answered: likely it is misspelt
_AT_ONCE = 16  # requests of one call
_PAGE = 1000  # entries of one answer to a listing
_READ_BACK_BYTES = 2**26  # larger objects are checked by their size alone


class _Passing(Exception):
    """A failure that another attempt may not have: an answer that is not what was asked for."""


class Bucket:
    """The objects of one bucket. Errors name the url; FileNotFoundError for an object that is not there."""

    def __init__(self, name: str, retries: Retries):
        self.name, self.retries = name, retries

    def get(self, key: str) -> bytes:
        """The whole object."""
        return self._run(lambda: self._get(key, None))

    def ranges(self, key: str, spans: list[tuple[int, int]]) -> list[bytes]:
        """The bytes `start..stop-1` of each span, by a request for each, several at once."""

        async def all_of_them() -> list[bytes]:
            gate = asyncio.Semaphore(_AT_ONCE)

            async def one(span: tuple[int, int]) -> bytes:
                async with gate:
                    return await self._get(key, span)

            return list(await asyncio.gather(*map(one, spans)))

        return self._run(all_of_them)

    def put(self, key: str, data: bytes) -> None:
        """Write an object, and read it back."""
        self._run(lambda: self._put(key, data))

    def put_if(self, key: str, data: bytes, tag: str | None) -> bool:
        """Write an object only if the one there still has this tag, or there is none (None). Says whether it did."""
        condition = {"IfNoneMatch": "*"} if tag is None else {"IfMatch": tag}
        tried = 0

        async def write(client: Any) -> bool:
            nonlocal tried
            tried += 1
            try:
                await client.put_object(Bucket=self.name, Key=key, Body=data, **condition)
            except boto.ClientError as error:
                if _status(error) in (409, 412):
                    return False
                if tag is not None and _status(error) == 404:  # it is gone
                    return False
                raise
            return True

        async def attempts() -> bool:
            written = await self._attempts(key, write)
            # An attempt whose answer was lost may have written what the next one was refused for.
            return written or (tried > 1 and await self._get(key, None) == data)

        try:
            return self._run(attempts)
        except FileNotFoundError:
            return False

    def tagged(self, key: str) -> tuple[bytes, str] | None:
        """The whole object, and the tag that names this version of it; None if it is not there."""

        async def read(client: Any) -> tuple[bytes, str]:
            answer = await client.get_object(Bucket=self.name, Key=key)
            async with answer["Body"] as body:
                data = await body.read()
            if len(data) != answer["ContentLength"]:
                raise _Passing(f"{len(data)} bytes came instead of {answer['ContentLength']}")
            return data, answer["ETag"]

        try:
            return self._run(lambda: self._attempts(key, read))
        except FileNotFoundError:
            return None

    def size(self, key: str) -> int:
        """Bytes of an object. UserError if there is no such bucket."""
        return self.facts(key)[0]

    def facts(self, key: str) -> tuple[int, float]:
        """Bytes of an object, and its time of writing (s since 1970). UserError if there is no such bucket."""

        async def look(client: Any) -> tuple[int, float]:
            try:
                answer = await client.head_object(Bucket=self.name, Key=key)
                return answer["ContentLength"], answer["LastModified"].timestamp()
            except boto.ClientError as error:
                if _status(error) == 404:  # which of the two is missing, this answer does not say
                    await client.head_bucket(Bucket=self.name)
                raise

        return self._run(lambda: self._attempts(key, look))

    def find(self, prefix: str) -> dict[str, tuple[int, float]]:
        """Size and time of writing (s since 1970) of every object below a prefix, by key."""

        async def pages() -> dict[str, tuple[int, float]]:
            found: dict[str, tuple[int, float]] = {}
            more: dict[str, str] = {}
            while True:
                page = await self._attempts(
                    prefix,
                    lambda client: client.list_objects_v2(Bucket=self.name, Prefix=prefix, MaxKeys=_PAGE, **more),
                )
                for entry in page.get("Contents", ()):
                    found[entry["Key"]] = entry["Size"], entry["LastModified"].timestamp()
                if not page.get("IsTruncated"):
                    return found
                more["ContinuationToken"] = page["NextContinuationToken"]

        return self._run(pages)

    def remove(self, key: str) -> None:
        """Delete an object, if it is there."""
        self._run(lambda: self._attempts(key, lambda client: client.delete_object(Bucket=self.name, Key=key)))

    # -- one request, several attempts -----------------------------------------------------------------------------

    async def _get(self, key: str, span: tuple[int, int] | None) -> bytes:
        if span and span[0] == span[1]:
            return b""

        async def read(client: Any) -> bytes:
            wanted = {} if span is None else {"Range": f"bytes={span[0]}-{span[1] - 1}"}
            answer = await client.get_object(Bucket=self.name, Key=key, **wanted)
            async with answer["Body"] as body:
                data = await body.read()
            if span and int(answer["ContentRange"].rpartition("/")[2]) < span[1]:
                raise OSError(f"s3://{self.name}/{key} ends before byte {span[1]}")
            expected = answer["ContentLength"] if span is None else span[1] - span[0]
            if len(data) != expected:
                raise _Passing(f"{len(data)} bytes came instead of {expected}")
            return data

        return await self._attempts(key, read)

    async def _put(self, key: str, data: bytes) -> None:
        md5 = base64.b64encode(hashlib.md5(data, usedforsecurity=False).digest()).decode()
        for _ in range(self.retries.attempts):
            # The server refuses a body that is not the one that the checksum is of.
            await self._attempts(
                key, lambda client: client.put_object(Bucket=self.name, Key=key, Body=data, ContentMD5=md5)
            )
            if len(data) > _READ_BACK_BYTES:
                facts = await self._attempts(key, lambda client: client.head_object(Bucket=self.name, Key=key))
                if facts["ContentLength"] == len(data):
                    return
            elif await self._get(key, None) == data:
                return
        raise UserError(f"s3://{self.name}/{key}: what is read back is not what was written; do others write there?")

    async def _attempts(self, key: str, call: Callable[[Any], Awaitable[T]]) -> T:
        url, connection = f"s3://{self.name}/{key}", _connection(self.retries.timeout, _environment())
        failures = 0
        while True:
            try:
                result = await call(await connection.client())
                connection.answered = True
                return result
            except Exception as error:
                if isinstance(error, boto.ClientError):
                    connection.answered = True
                failures += 1
                attempts = self.retries.attempts
                if not connection.answered and isinstance(error, _UNREACHABLE):
                    attempts = min(attempts, _FIRST_CONTACT)
                if not passes(error) or failures >= attempts:
                    raise _told(error, url, self.name, failures) from error
            await asyncio.sleep(self.retries.wait(failures))

    def _run(self, call: Callable[[], Awaitable[T]]) -> T:
        files = _connection(self.retries.timeout, _environment()).files
        return fsspec.asyn.sync(files.loop, call)  # type: ignore[return-value]


def passes(error: Exception) -> bool:
    """May another attempt succeed where this error came?"""
    if isinstance(error, boto.ClientError):
        return _status(error) >= 500 or _status(error) == 429 or _code(error) in _PASSING_CODES
    return isinstance(error, (*_PASSING_ERRORS, _Passing)) or type(error).__name__ == "ResponseParserError"


def _code(error: boto.ClientError) -> str:
    return str(error.response.get("Error", {}).get("Code", ""))


def _status(error: boto.ClientError) -> int:
    return int(error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))


def _told(error: Exception, url: str, bucket: str, attempts: int) -> Exception:
    """What to raise instead of an error of the client's: the same said of the url, in one line."""
    what = next(iter(str(error).splitlines()), "") or type(error).__name__
    if isinstance(error, boto.ClientError) and not passes(error):
        if _code(error) == "NoSuchBucket" or (_status(error) == 404 and error.operation_name == "HeadBucket"):
            return UserError(f"{url}: the bucket {bucket!r} does not exist")
        if _status(error) == 404:
            return FileNotFoundError(f"{url} does not exist")
        if _status(error) == 416:
            return OSError(f"{url} is shorter than it should be")
        if _code(error) in _REFUSED or _status(error) == 403:
            return UserError(f"{url}: access was denied ({what})")
    elif isinstance(error, boto.NoCredentialsError | boto.PartialCredentialsError | boto.CredentialRetrievalError):
        return UserError(
            f"{url}: no AWS credentials were found ({what}); set AWS_PROFILE, or AWS_ACCESS_KEY_ID and "
            "AWS_SECRET_ACCESS_KEY, in the environment of every machine that takes part"
        )
    elif isinstance(error, _UNREACHABLE):
        return Failed(f"{url}: the endpoint cannot be reached ({what}); AWS_ENDPOINT_URL says where it is")
    if passes(error):
        return Failed(f"{url}: given up after {attempts} attempts, the last of which failed so: {what}")
    if isinstance(error, boto.BotoCoreError | boto.ClientError | ValueError):
        return UserError(f"{url}: {what}")
    return error


# -- the connection --------------------------------------------------------------------------------------------------


class _Connection:
    """A client of S3, with its pool of sockets, on the thread of fsspec."""

    def __init__(self, timeout: float):
        # Attempts are counted here: the client below makes one for each.
        config = {"connect_timeout": min(timeout, 10.0), "read_timeout": timeout, "retries": {"total_max_attempts": 1}}
        self.files = S3FileSystem(
            config_kwargs={**config, "max_pool_connections": 2 * _AT_ONCE}, skip_instance_cache=True
        )
        self.answered = False  # has the endpoint ever?
        self._lock = asyncio.Lock()

    async def client(self) -> Any:
        """The client, made by whoever asks first."""
        async with self._lock:
            return await self.files.set_session()


@functools.lru_cache(8)
def _connection(timeout: float, environment: tuple[tuple[str, str], ...]) -> _Connection:
    return _Connection(timeout)


def _environment() -> tuple[tuple[str, str], ...]:
    """What the AWS chain reads first: with another environment goes another connection."""
    return tuple(sorted((name, value) for name, value in os.environ.items() if name.startswith("AWS_")))


def arrow_files(retries: Retries) -> S3FileSystem:
    """s3fs for other programs, such as Ray and pyarrow, which make their requests themselves.

    Attempts and waits are then up to the AWS client: as many as ours, with backoff and jitter of its own.
    """
    config = {"connect_timeout": 10.0, "read_timeout": retries.timeout}
    return S3FileSystem(
        config_kwargs={**config, "retries": {"mode": "standard", "total_max_attempts": retries.attempts}},
        use_listings_cache=False,
    )
