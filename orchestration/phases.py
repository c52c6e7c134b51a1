"""What the demos share: phases with their times, one visible `md4` command after the other, a summary at the end."""

import json
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any

import httpx
from rich.console import Console

from orchestration.runs import Run


class Demo:
    """One run of a demo: its commands, shown before they run, and the seconds that its phases took."""

    def __init__(self, run: Path):
        self.run = run
        self.seconds: dict[str, float] = {}
        self.console = Console(highlight=False, soft_wrap=True)
        self._began = time.perf_counter()

    @contextmanager
    def phase(self, name: str, title: str) -> Iterator[None]:
        """Announce a phase and take its time."""
        self.console.rule(f"[bold]{title}")
        began = time.perf_counter()
        yield
        self.seconds[name] = round(time.perf_counter() - began, 1)
        self.console.print(f"({name}: {self.seconds[name]} s)", style="dim")

    def md4(self, *arguments: str, code: int = 0) -> None:
        """Run one command of ours; end the demo if it does not end with this exit code."""
        self.show_command(f"md4 {shlex.join(arguments)}")
        if (found := self.run_command(arguments)) != code:
            sys.exit(found or f"it was to end with exit code {code}")

    def run_command(self, arguments: Sequence[str]) -> int:
        """As a process of its own; gives its exit code."""
        return subprocess.run([*self.command(), *arguments]).returncode

    @contextmanager
    def serving(self, *arguments: str) -> Iterator[str]:
        """`md4 serve ...` while the block lasts, once it answers; gives its url."""
        arguments = ("serve", *arguments, "--port", str(*free_ports(1)))
        self.show_command(f"md4 {shlex.join(arguments)}")
        server = subprocess.Popen([*self.command(), *arguments])
        url = f"http://127.0.0.1:{arguments[-1]}"
        try:
            wait_for(f"{url}/healthz", server)
            yield url
        finally:
            server.send_signal(signal.SIGINT)
            server.wait(timeout=120)

    def show_command(self, command: str) -> None:
        self.console.print(f"$ {command}", style="bold cyan")

    @staticmethod
    def command() -> list[str]:
        """What `md4` stands for, whether or not it is on the path."""
        return [sys.executable, "-m", "orchestration"]

    def keep_earlier(self) -> None:
        """Move the run of an earlier demo out of the way."""
        if self.run.exists():
            aside = self.run.with_name(
                f"{self.run.name}-{datetime.fromtimestamp(self.run.stat().st_mtime):%Y%m%d-%H%M%S}"
            )
            self.run.rename(aside)
            self.console.print(f"the run of an earlier demo is kept as {aside}")

    def results(self) -> dict[str, Any]:
        """What every demo's summary says, read from what the run left behind."""
        run = Run(self.run)
        rates = sorted(row["tokens_per_second"] for row in run.metrics("train"))
        return {
            "standard_error": newest_report(run)["standard_error"],
            "train_tokens_per_second": rates[len(rates) // 2],
            "seconds": {**self.seconds, "total": round(time.perf_counter() - self._began, 1)},
        }

    def finish(self, summary: dict[str, Any], lines: Sequence[str]) -> None:
        """Write the summary into the run's reports, and print its lines."""
        file = Run(self.run).reports / "summary.json"
        file.write_text(json.dumps(summary, indent=1) + "\n", encoding="utf-8")
        self.console.rule("[bold]what happened")
        self.console.print("\n".join(lines), markup=False)


def free_ports(count: int) -> list[int]:
    """Ports of this machine that nobody listens on."""
    sockets = [socket.socket() for _ in range(count)]
    try:
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]
    finally:
        for one in sockets:
            one.close()


def wait_for(url: str, server: subprocess.Popen, headers: Mapping[str, str] = {}, seconds: float = 180) -> None:
    """Return when a server answers at `url`; end the demo if it ends, or doesn't in time."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if server.poll() is not None:
            sys.exit(f"the server ended with exit code {server.returncode}")
        try:
            if httpx.get(url, headers=dict(headers), timeout=2).status_code == 200:
                return
        except httpx.TransportError:
            pass
        time.sleep(0.5)
    sys.exit(f"the server did not answer at {url} within {seconds:.0f} s")


def newest_report(run: Run) -> dict[str, Any]:
    """The likelihood report that was written last."""
    return json.loads(max(run.reports.glob("likelihood-*.json"), key=lambda file: file.stat().st_mtime).read_text())


def bits_before(run: Run) -> float:
    """Bits per token of the validation split before the first step."""
    return run.metrics("evaluation")[0]["bits_per_token"]
