"""What the demos share: phases with their times, one visible `md4` command after the other, a summary at the end."""

import json
import shlex
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any

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

    def md4(self, *arguments: str) -> None:
        """Run one command of ours; end the demo if it fails."""
        self.show_command(f"md4 {shlex.join(arguments)}")
        done = subprocess.run([*self.command(), *arguments])
        if done.returncode:
            sys.exit(done.returncode)

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


def newest_report(run: Run) -> dict[str, Any]:
    """The likelihood report that was written last."""
    return json.loads(max(run.reports.glob("likelihood-*.json"), key=lambda file: file.stat().st_mtime).read_text())


def bits_before(run: Run) -> float:
    """Bits per token of the validation split before the first step."""
    return run.metrics("evaluation")[0]["bits_per_token"]
