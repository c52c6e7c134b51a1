"""A job's log, line by line, to the job's end, whatever happens to the connection or to whoever follows.

The log comes over a websocket, and from its beginning whenever that is opened anew: what was said is passed over. A
connection that is lost without a word is noticed by asking for the job's state meanwhile.
"""

import asyncio
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from tenacity import wait_exponential_jitter

from md4.errors import Failed
from orchestration.jobs.attempts import seconds_after
from orchestration.jobs.spec import State

if TYPE_CHECKING:
    from orchestration.jobs.client import Jobs, Known

PATIENCE = 600.0  # seconds without an answer after which following is given up
_TOKEN_PATIENCE = 60.0  # of answers that the token is wrong: another one may be on its way
_LOOK_SECONDS = 10.0  # between two questions how the job is
_WAITS = wait_exponential_jitter(multiplier=0.5, max=15, jitter=0.5)


class Following:
    """One job, followed.

    clock, sleep: seconds; injected.
    """

    def __init__(
        self,
        jobs: "Jobs",
        submission_id: str,
        say: Callable[[str], None],
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ):
        self._jobs, self._id, self._say = jobs, submission_id, say
        self._clock, self._sleep = clock, sleep
        self._taken = 0  # characters of the log that were taken in
        self._line = ""  # the last one, not yet complete
        self._complete = False  # did the log's stream end as it should?
        self._known = False  # has the cluster ever known the job?
        self._waiting = ""  # why it has not begun, as was said last

    def to_the_end(self) -> State:
        """Say every line; returns when the job is over."""
        from orchestration.jobs.connection import Away, Refused

        failures, since = 0, 0.0
        while True:
            try:
                asyncio.run(self._listen())
                found = self._look()
                if found.state.over:
                    return self._finish(found)
                failures = 0  # the stream ended before the job: on with the next
                self._sleep(0.2)
            except (Away, Refused) as error:
                now = self._clock()
                if not failures:
                    since = now
                    self._say(f"md4: the connection is lost, the job goes on without it; trying again ({error})")
                failures += 1
                if now - since > (PATIENCE if isinstance(error, Away) else _TOKEN_PATIENCE):
                    raise type(error)(f"{error}; the job goes on: md4 jobs logs {self._id} follows it") from None
                self._sleep(seconds_after(failures, _WAITS))
                if isinstance(error, Refused):
                    self._jobs.renew()

    async def _listen(self) -> None:
        """Take in the log until its stream ends; raises when nobody answers meanwhile."""
        stream = asyncio.create_task(self._stream())
        try:
            while not stream.done():
                await asyncio.wait({stream}, timeout=_LOOK_SECONDS)
                if not stream.done():
                    found = await asyncio.to_thread(self._look)
                    if found.state.over:  # what is left of the log comes at once, or not at all
                        await asyncio.wait({stream}, timeout=_LOOK_SECONDS)
                        return
                    self._say_why_it_waits(found)
            await stream
        finally:
            stream.cancel()

    async def _stream(self) -> None:
        import aiohttp

        await asyncio.to_thread(self._look)  # who we are, and whether there is such a job
        passed = 0
        url = f"{self._jobs.address}/api/jobs/{self._id}/logs/tail"
        try:
            async with (
                aiohttp.ClientSession(headers=self._jobs.headers) as session,
                session.ws_connect(url, max_msg_size=0, heartbeat=None) as socket,
            ):
                async for message in socket:
                    if message.type != aiohttp.WSMsgType.TEXT:
                        break
                    text: str = message.data
                    new = text[max(0, self._taken - passed) :]
                    passed += len(text)
                    self._take(new)
                self._complete = socket.close_code == aiohttp.WSCloseCode.OK
        except aiohttp.WSServerHandshakeError as error:
            if error.status in (401, 403):
                raise self._jobs.refused() from None
            raise self._jobs.away(error) from None
        except (aiohttp.ClientError, OSError) as error:
            raise self._jobs.away(error) from None

    def _take(self, text: str) -> None:
        self._taken += len(text)
        *lines, self._line = (self._line + text).split("\n")
        for line in lines:
            self._say(line)

    def _say_why_it_waits(self, found: "Known") -> None:
        why = (found.message or "") if found.state == State.PENDING else ""
        if why and why != self._waiting:
            self._say(f"md4: {self._id} is pending: {why.strip()}")
        self._waiting = why

    def _look(self) -> "Known":
        found = self._jobs.look(self._id)
        if found is None:
            if not self._known:
                self._jobs.find(self._id)  # raises, with the names that there are
            raise Failed(
                f"{self._jobs.address} no longer knows job {self._id}: its head was lost, and the job with it. "
                "Submitted again, it goes on from what it has written"
            )
        self._known = True
        return found

    def _finish(self, found: "Known") -> State:
        if not self._complete:
            self._take(self._jobs.log(self._id)[self._taken :])
        if self._line:
            self._take("\n")
        if found.state == State.FAILED and found.exit_code is None:  # the command never ran, or was killed
            self._say(f"md4: {(found.message or 'Ray says no more').strip()}")
        return found.state
