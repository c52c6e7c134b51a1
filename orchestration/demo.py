"""`make demo`: the whole line as a newcomer would type it, from Python's own documentation to served samples.

    python -m orchestration.demo

Every phase is one `md4` command, shown before it runs. At the end: a summary on the screen and in
`runs/demo/reports/summary.json`, and the loss curve in `runs/demo/reports/loss.png`. An earlier demo is kept aside.
"""

import json
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any

import httpx
from rich.console import Console

from orchestration.config import load
from orchestration.curves import draw_loss
from orchestration.runs import Run
from pipelines.prepare import prepared_path
from pipelines.shards import Manifest

PRESET, RUN = "pydocs-tiny", Path("runs/demo")
HOLES = "the function returns a ______ of ____ elements"
SEED = 7
_console = Console(highlight=False, soft_wrap=True)
_seconds: dict[str, float] = {}


@contextmanager
def phase(name: str, title: str) -> Iterator[None]:
    """Announce a phase and take its time."""
    _console.rule(f"[bold]{title}")
    began = time.perf_counter()
    yield
    _seconds[name] = round(time.perf_counter() - began, 1)
    _console.print(f"({name}: {_seconds[name]} s)", style="dim")


def md4(*arguments: str) -> None:
    """Run one command of ours, visibly; end the demo if it fails."""
    _console.print(f"$ md4 {shlex.join(arguments)}", style="bold cyan")
    done = subprocess.run([*_command(), *arguments])
    if done.returncode:
        sys.exit(done.returncode)


def _command() -> list[str]:
    return [sys.executable, "-m", "orchestration"]


def keep_earlier(run: Path) -> None:
    """Move the run of an earlier demo out of the way."""
    if run.exists():
        aside = run.with_name(f"{run.name}-{datetime.fromtimestamp(run.stat().st_mtime):%Y%m%d-%H%M%S}")
        run.rename(aside)
        _console.print(f"the run of an earlier demo is kept as {aside}")


def ask_server() -> dict[str, Any]:
    """Start the service, send it one request over HTTP, stop it; returns the answer."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    arguments = ["serve", str(RUN), "--port", str(port)]
    _console.print(f"$ md4 {shlex.join(arguments)}", style="bold cyan")
    server = subprocess.Popen([*_command(), *arguments])
    try:
        url = f"http://127.0.0.1:{port}"
        _wait_for(f"{url}/healthz", server)
        body = {"prompt": HOLES, "count": 2, "seed": SEED, "length": len(HOLES)}
        _console.print(f"$ curl {url}/v1/samples --json '{json.dumps(body)}'", style="bold cyan")
        reply = httpx.post(f"{url}/v1/samples", json=body, timeout=120)
        reply.raise_for_status()
        answer = reply.json()
        _console.print_json(data=answer)
        return answer
    finally:
        server.send_signal(signal.SIGINT)
        server.wait(timeout=60)


def _wait_for(url: str, server: subprocess.Popen, seconds: float = 180) -> None:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if server.poll() is not None:
            sys.exit(f"the server ended with exit code {server.returncode}")
        try:
            if httpx.get(url, timeout=2).status_code == 200:
                return
        except httpx.TransportError:
            time.sleep(0.5)
    sys.exit(f"the server did not answer at {url} within {seconds:.0f} s")


def main() -> None:
    began = time.perf_counter()
    keep_earlier(RUN)
    with phase("prepare", "1. Python's documentation becomes shards of characters"):
        md4("prepare", PRESET)
    with phase("train", "2. two Ray Train workers learn from them with DeepSpeed ZeRO-2"):
        md4("train", PRESET, f"name={RUN.name}")
    with phase("evaluate", "3. how many bits does a character of unseen documentation cost?"):
        md4("evaluate", str(RUN))
    with phase("sample", "4. the model writes"):
        md4("sample", str(RUN), "--count", "3", "--seed", str(SEED))
    with phase("infill", "5. the model fills holes"):
        md4("sample", str(RUN), "--prompt", HOLES, "--length", str(len(HOLES)), "--count", "3", "--seed", "100")
    with phase("serve", "6. the model answers over HTTP"):
        answer = ask_server()
    summary = summarise(Run(RUN), answer, time.perf_counter() - began)
    (RUN / "reports" / "summary.json").write_text(json.dumps(summary, indent=1) + "\n", encoding="utf-8")
    show(summary)


def summarise(run: Run, answer: dict[str, Any], seconds: float) -> dict[str, Any]:
    """The facts of the demo, all read from what the run left behind; draws the loss curve."""
    ngrams = Manifest.load(prepared_path(load(PRESET).data)).ngrams
    assert ngrams is not None  # 27 characters are few enough
    draw_loss(run, run.reports / "loss.png", ngrams.model_dump())
    final = json.loads(max(run.reports.glob("likelihood-*.json"), key=lambda file: file.stat().st_mtime).read_text())
    rates = sorted(row["tokens_per_second"] for row in run.metrics("train"))
    samples = json.loads((run.samples / f"step-{run.config.train.steps:08d}-seed-{SEED}.json").read_text())
    return {
        "bits_per_char_before": run.metrics("evaluation")[0]["bits_per_token"],
        "bits_per_char_after": final["bits_per_token"],
        "standard_error": final["standard_error"],
        "unigram_bits": ngrams.unigram,
        "bigram_bits": ngrams.bigram,
        "trigram_bits": ngrams.trigram,
        "train_tokens_per_second": rates[len(rates) // 2],
        "seconds": {**_seconds, "total": round(seconds, 1)},
        "sample": samples["samples"][0]["text"],
        "infill": answer["samples"][0]["text"],
    }


def show(summary: dict[str, Any]) -> None:
    after, bigram, trigram = (summary[key] for key in ("bits_per_char_after", "bigram_bits", "trigram_bits"))
    place = "below" if after < bigram else "NOT below"
    seconds = summary["seconds"]["train"]
    lines = [
        f"bits per character   {summary['bits_per_char_before']:.3f} before training, "
        f"{after:.3f} ± {summary['standard_error']:.3f} after (upper bound, unseen documents)",
        f"the corpus's own     {summary['unigram_bits']:.3f} unigram, {bigram:.3f} bigram, {trigram:.3f} trigram",
        f"                     {place} the bigram entropy; {after - trigram:+.3f} bits from the trigram's",
        f"training             {summary['train_tokens_per_second']:,.0f} tokens/s, {seconds:.0f} s with start and stop",
        f"a sample             {summary['sample'][:100]}",
        f"holes                {HOLES}",
        f"filled               {summary['infill']}",
        f"everything is in     {RUN}/ (loss curve: {RUN}/reports/loss.png)",
        "",
        f"next: .venv/bin/md4 sample {RUN} --prompt 'import ______ from' --count 5",
        f"      .venv/bin/md4 serve {RUN}",
        f"      .venv/bin/md4 train {PRESET} name=longer train.steps=4000",
        f"      .venv/bin/md4 train {PRESET} name=mine data.source=text data.path=FILE_OR_FOLDER",
    ]
    _console.rule("[bold]what happened")
    _console.print("\n".join(lines), markup=False)


if __name__ == "__main__":
    main()
