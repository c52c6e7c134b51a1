"""A real S3 server in a process of its own, and a real HTTP proxy before it that fails as networks do.

The proxy's port is fixed before Ray starts, for its processes inherit the environment: one endpoint serves all tests,
and what goes wrong there is set from one test to the next.
"""

import http.client
import os
import random
import re
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

BUCKET = "bucket"
KINDS = ("slow down", "error", "no answer", "lost answer", "truncated", "late")
LATE = 0.1  # seconds
_SERVER = """
import sys, threading
from moto.server import ThreadedMotoServer
server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
server.start()
print(server.get_host_and_port()[1], flush=True)
sys.stdin.read()
"""


def reserve() -> socket.socket:
    """A port of this machine that nobody else gets, and which refuses connections until the proxy listens there.

    The environment is made to point there, and to nowhere else.
    """
    reserved = socket.socket()
    reserved.bind(("127.0.0.1", 0))
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        del os.environ[name]
    os.environ |= {
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{reserved.getsockname()[1]}",
        "AWS_ACCESS_KEY_ID": "tests",
        "AWS_SECRET_ACCESS_KEY": "tests",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
        "AWS_CONFIG_FILE": os.devnull,
        "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
    }
    return reserved


class S3:
    """The server and the proxy. Use as a context."""

    def __init__(self, reserved: socket.socket):
        self._process = subprocess.Popen(
            [sys.executable, "-c", _SERVER],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
        )  # fmt: skip
        assert self._process.stdout is not None
        self.port = int(self._process.stdout.readline())
        self._proxy = _Proxy(reserved, self.port)
        self._thread = threading.Thread(target=self._proxy.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._proxy.shutdown()
        self._proxy.server_close()
        self._process.communicate(timeout=20)

    def reset(self) -> None:
        """An empty bucket, and a proxy that only passes on."""
        self.fails(0)
        self._proxy.holds.clear()
        self.ask("POST", "/moto-api/reset")
        self.ask("PUT", f"/{BUCKET}")

    def ask(self, method: str, path: str, body: bytes = b"") -> bytes:
        """A request to the server, around the proxy."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=20)
        connection.request(method, path, body, {"Host": "s3.amazonaws.com", "Content-Length": str(len(body))})
        answer = connection.getresponse()
        data = answer.read()
        connection.close()
        assert answer.status < 300, (method, path, answer.status, data)
        return data

    def objects(self) -> list[str]:
        """The keys of all objects, as the server has them."""
        return sorted(re.findall(r"<Key>([^<]*)</Key>", self.ask("GET", f"/{BUCKET}?list-type=2").decode()))

    def fails(self, rate: float, kinds: tuple[str, ...] = KINDS, seed: int = 0, only: str = "") -> None:
        """From now on, this share of requests fail, by one of these kinds; of those whose line matches `only`.

        A kind that is none of `KINDS`, for it does not pass: "denied".
        """
        self._proxy.rule = rate, kinds, re.compile(only)
        self._proxy.draws = random.Random(seed)
        self._proxy.failed.clear()
        self._proxy.asked.clear()

    def hold(self, pattern: str) -> "Hold":
        """Have the first request from now on whose line ("PUT /bucket/key") matches wait before it is passed on."""
        held = Hold(re.compile(pattern))
        with self._proxy.lock:
            self._proxy.holds.append(held)
        return held

    @property
    def failed(self) -> Counter[str]:
        """How many requests failed since, by kind."""
        return self._proxy.failed

    @property
    def asked(self) -> list[str]:
        """The requests that came since: method, path, and the range of bytes, if any."""
        return list(self._proxy.asked)


class Hold:
    """One request that waits at the proxy: whoever sent it is in a state that is known, and lasts."""

    def __init__(self, pattern: re.Pattern[str]):
        self.pattern = pattern
        self.came = threading.Event()
        self._answered = threading.Event()
        self._passes = True

    def release(self, passes: bool = True) -> None:
        """Pass the request on to the server, or lose it. Without a request yet, the one to come is treated so."""
        self._passes = passes
        self._answered.set()

    def wait(self) -> bool:
        """In the proxy: tell that the request is here, and wait for the word whether it goes on."""
        self.came.set()
        self._answered.wait()
        return self._passes


class _Proxy(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128

    def __init__(self, reserved: socket.socket, port: int):
        super().__init__(reserved.getsockname(), _Handler, bind_and_activate=False)
        self.socket.close()
        self.socket = reserved
        self.server_activate()
        self.port = port
        self.rule: tuple[float, tuple[str, ...], re.Pattern[str]] = 0.0, KINDS, re.compile("")
        self.draws = random.Random(0)
        self.failed: Counter[str] = Counter()
        self.asked: list[str] = []
        self.holds: list[Hold] = []
        self.lock = threading.Lock()

    def held(self, line: str) -> Hold | None:
        """The hold that a request falls under, if any; each takes one request."""
        with self.lock:
            for hold in self.holds:
                if hold.pattern.search(line):
                    self.holds.remove(hold)
                    return hold
        return None

    def draw(self, line: str) -> str:
        """What goes wrong with a request; "" for nothing."""
        rate, kinds, only = self.rule
        with self.lock:
            self.asked.append(line)
            if not only.search(line) or self.draws.random() >= rate:
                return ""
            kind = self.draws.choice(kinds)
            self.failed[kind] += 1
            return kind

    def handle_error(self, request, client_address) -> None:  # type: ignore[no-untyped-def]
        pass  # connections that we or the client broke


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: _Proxy
    disable_nagle_algorithm = True

    def log_message(self, format: str, *arguments: object) -> None:
        pass

    def do_GET(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        line = " ".join([self.command, self.path, self.headers.get("Range", "")]).strip()
        hold = self.server.held(line)
        if hold is not None and not hold.wait():
            return self.hang_up()
        what = self.server.draw(line)
        if what == "slow down":
            return self.answer(503, {}, b"<Error><Code>SlowDown</Code><Message>Reduce your rate.</Message></Error>")
        if what == "error":
            return self.answer(500, {}, b"<Error><Code>InternalError</Code><Message>Try again.</Message></Error>")
        if what == "denied":
            return self.answer(403, {}, b"<Error><Code>AccessDenied</Code><Message>Access Denied</Message></Error>")
        if what == "no answer":
            return self.hang_up()
        if what == "late":
            time.sleep(LATE)
        connection = http.client.HTTPConnection("127.0.0.1", self.server.port, timeout=60)
        connection.request(self.command, self.path, body, dict(self.headers.items()))
        answer = connection.getresponse()
        data = answer.read()
        connection.close()
        if what == "lost answer":
            return self.hang_up()
        headers = {name: value for name, value in answer.getheaders() if name.lower() not in _OWN}
        length = answer.headers.get("Content-Length", str(len(data))) if self.command == "HEAD" else str(len(data))
        if what == "truncated" and data:
            self.answer(answer.status, headers, data[: len(data) // 2], length)
            return self.hang_up()
        return self.answer(answer.status, headers, data, length)

    do_HEAD = do_PUT = do_POST = do_DELETE = do_GET

    def answer(self, status: int, headers: dict[str, str], data: bytes, length: str | None = None) -> None:
        self.send_response_only(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", length or str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def hang_up(self) -> None:
        self.close_connection = True
        self.wfile.flush()
        self.connection.shutdown(socket.SHUT_RDWR)


_OWN = {"content-length", "transfer-encoding", "connection", "keep-alive"}
