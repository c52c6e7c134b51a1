"""A real HTTP server of a folder, which can break connections, and answers as the Hugging Face hub does."""

import hashlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path


class Web(ThreadingHTTPServer):
    """Serves `folder`; below /api/datasets and /datasets, its datasets/ORG/NAME as the hub would. Use as a context."""

    daemon_threads = True

    def __init__(self, folder: Path):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.folder = folder
        self.url = f"http://127.0.0.1:{self.server_address[1]}"
        self.asked: list[str] = []  # method, path and range of every request
        self.breaks = 0  # so many answers from now on end after half of their body

    def __enter__(self) -> "Web":
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.shutdown()
        self.server_close()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Web

    def log_message(self, format: str, *arguments: object) -> None:
        pass

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        self.server.asked.append(f"{self.command} {path} {self.headers.get('Range', '')}".strip())
        if found := re.fullmatch(r"/api/datasets/([^/]+/[^/]+)/(?:revision|tree)/([^/]+)(?:/.*)?", path):
            return self.about(*found.groups())
        if found := re.fullmatch(r"/datasets/([^/]+/[^/]+)/resolve/[^/]+/(.+)", path):
            return self.file(self.server.folder / "datasets" / found[1] / found[2], {"X-Repo-Commit": _COMMIT})
        return self.file(self.server.folder / path.lstrip("/"), {})

    do_HEAD = do_GET

    def about(self, name: str, revision: str) -> None:
        """What the hub says of a dataset: its files, and the commit that a revision is."""
        root = self.server.folder / "datasets" / name
        files = sorted(path for path in root.rglob("*") if path.is_file())
        if not files:
            return self.answer(404, b"", {"X-Error-Code": "RepoNotFound"})
        if "/tree/" in self.path:
            facts = [
                {
                    "type": "file",
                    "path": path.relative_to(root).as_posix(),
                    "size": path.stat().st_size,
                    "oid": hashlib.sha1(path.read_bytes()).hexdigest(),
                }
                for path in files
            ]
        else:
            names = [{"rfilename": path.relative_to(root).as_posix()} for path in files]
            facts = {"id": name, "sha": _COMMIT, "private": False, "siblings": names}
        return self.answer(200, json.dumps(facts).encode(), {"Content-Type": "application/json"})

    def file(self, path: Path, headers: dict[str, str]) -> None:
        if not path.is_file():
            return self.answer(404, b"", {**headers, "X-Error-Code": "EntryNotFound"})
        data = path.read_bytes()
        headers["ETag"] = f'"{hashlib.sha256(data).hexdigest()}"'
        wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if wanted and self.headers.get("If-Range", headers["ETag"]) == headers["ETag"]:
            start = int(wanted[1])
            if start >= len(data):
                return self.answer(416, b"", headers)
            stop = int(wanted[2]) + 1 if wanted[2] else len(data)
            headers["Content-Range"] = f"bytes {start}-{min(stop, len(data)) - 1}/{len(data)}"
            return self.answer(206, data[start:stop], headers)
        return self.answer(200, data, headers)

    def answer(self, status: int, data: bytes, headers: dict[str, str]) -> None:
        self.send_response_only(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command == "HEAD":
            return
        if self.server.breaks and data:
            self.server.breaks -= 1
            self.wfile.write(data[: len(data) // 2])
            self.close_connection = True
        else:
            self.wfile.write(data)


_COMMIT = "0123456789abcdef0123456789abcdef01234567"
