"""`make demo-loop`: search, train, evaluate on a schedule, promote by rule, serve by name, refuse, roll back.

    python -m orchestration.demo_loop

Every step is a command, shown before it runs, on a Ray cluster of this machine that the demo starts and ends. All of it
lies in `loop/`: studies, runs, results, registry. At the end: a summary on the screen and in `loop/summary.json`.
"""

import json
import os
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import httpx
import yaml

from orchestration.phases import Demo, free_ports, wait_for

FOLDER = Path("loop")
MODEL, NAME = "pydocs", "production"
RULES = {
    "name": NAME,
    "require": [
        {"metric": "likelihood/*", "better_by": 2},  # standard errors of the difference
        {"metric": "quality/entropy", "within": [1.5, 3.0]},  # nats: samples that repeat themselves have less
    ],
}
_PORTS = ("port", "dashboard-port", "dashboard-agent-listen-port", "ray-client-server-port")


@dataclass(frozen=True)
class Sizes:
    """How much is done."""

    preset: str = "pydocs-tiny"
    settings: tuple[str, ...] = ("train.workers=1", "optimizer.warmup=20", "optimizer.ema=0.95")
    # Scheduler, space, and settings of its own.
    searches: tuple[tuple[str, ...], ...] = (("asha", "schedules", "search.concurrent=4"), ("pbt", "population"))
    search: tuple[str, ...] = ("search.trials=8", "search.budget=1310720", "search.rounds=4")
    longer: tuple[str, ...] = ("train.steps=800", "train.workers=2")  # what the winner is trained with
    suite: str = "pydocs"
    requests: int = 40  # answered by a candidate before it is signed off
    share: float = 0.5  # of the requests, that it gets
    cpus: int = 8  # of the cluster, at least; logical ones: a population trains all its trials at once


class Loop:
    """The story, in the current folder: it needs the cluster that the environment names, and says what it finds."""

    def __init__(self, sizes: Sizes, demo: Demo):
        self.sizes, self.demo = sizes, demo
        self.found: dict[str, Any] = {}

    def play(self) -> dict[str, Any]:
        """All of it; returns the facts. Ends the process if a step does not come out as it should."""
        with self.demo.phase("search", "1. Ray Tune searches"):
            studies = [self._search(*one) for one in self.sizes.searches]
        with self.demo.phase("train", "2. the winner is trained for longer"):
            winner, worst, best = self._train(studies)
        with self.demo.phase("evaluate", "3. a clock has it evaluated"):
            self._evaluate_by_the_clock(winner)
        with self.demo.phase("promote", "4. the first version is signed off, and served by its name"):
            self._first(best)
        with self.demo.serving(f"{MODEL}@{NAME}", *self._serving()) as url:
            with self.demo.phase("canary", "5. the winner is promoted by rule: a share of the requests, then all"):
                self._promote_the_winner(winner, url)
            with self.demo.phase("refuse", "6. a worse one is refused"):
                self._refuse(worst)
            with self.demo.phase("rollback", "7. a broken one, promoted by force, is rolled back"):
                self._roll_back(winner, url)
        return self.found

    # -- the steps -----------------------------------------------------------------------------------------------------

    def _search(self, scheduler: str, space: str, *own: str) -> Path:
        name = f"loop-{scheduler}"
        settings = [f"search.scheduler={scheduler}", *own, *self.sizes.search, *self.sizes.settings]
        self.demo.md4("search", self.sizes.preset, "--space", space, "--name", name, *settings)
        return Path("studies") / name

    def _train(self, studies: list[Path]) -> tuple[Path, Path, Path]:
        """The run of the best settings; those of the worst trial, maybe one that was stopped early, and of the best."""
        everything = [(study, trial) for study in studies for trial in _ranked(study)]
        judged = [one for one in everything if one[1]["state"] != "failed" and one[1]["bits"] is not None]
        trials = [(one["bits"], _run_of(study, one)) for study, one in judged]
        bits, study = min((_ranked(study)[0]["bits"], study) for study in studies)
        self.demo.md4("train", str(study / "winner.yaml"), "name=winner", *self.sizes.longer)
        self.found |= {"trials": len(everything), "winner_of": study.name, "searched_bits": bits}
        return Path("runs/winner"), max(trials)[1], min(trials)[1]

    def _evaluate_by_the_clock(self, run: Path) -> None:
        from orchestration.cron import Store

        self.demo.md4(
            "cron", "add", "evaluation", "--at", "* * * * *", "--", "evaluate", str(run), "--suite", self.sizes.suite
        )
        wait_for_the_next_minute()
        self.demo.md4("cron", "run", "--once")
        self.demo.md4("cron", "pause", "evaluation")
        job = next(one.submission_id for one in Store("cron").history("evaluation") if one.submitted)
        self.demo.md4("jobs", "logs", job)
        self.demo.md4("cron", "run", "--once")
        self.demo.md4("cron", "history", "evaluation")
        self.found["job"] = job

    def _first(self, run: Path) -> None:
        Path("registry").mkdir(exist_ok=True)
        Path("registry/rules.yaml").write_text(yaml.safe_dump(RULES, sort_keys=False))
        self.demo.show_command(f"cat registry/rules.yaml\n{Path('registry/rules.yaml').read_text()}")
        self._add(run)
        self.demo.md4("models", "promote", MODEL, "1", NAME)

    def _promote_the_winner(self, run: Path, url: str) -> None:
        self.demo.md4("models", "add", MODEL, str(run))
        self.demo.md4("models", "promote", MODEL, "2", NAME, "--dry-run")
        self.demo.md4("models", "promote", MODEL, "2", NAME, "--share", str(self.sizes.share))
        self.found["canary"] = self._ask_until(url, lambda name: name.version == 2)
        self.demo.md4("models", "show", MODEL)

    def _refuse(self, run: Path) -> None:
        self._add(run)
        self.demo.md4("models", "promote", MODEL, "3", NAME, code=2)
        assert self._name().version == 2

    def _roll_back(self, run: Path, url: str) -> None:
        self.demo.md4("export", str(run), "exported")
        spoil(Path("exported"), Path("broken"))
        self.demo.console.print("(broken/ is a copy whose weights are no numbers)")
        self.demo.md4("models", "add", MODEL, "broken", "--note", "broken on purpose")
        why = "to see what becomes of it"
        share = str(self.sizes.share)
        self.demo.md4("models", "promote", MODEL, "4", NAME, "--share", share, "--force", "--why", why)
        self.found["rollback"] = self._ask_until(url, lambda name: name.rejected(4) is not None)
        change = self._name().rejected(4)
        assert change is not None
        self.found["why"] = change.why
        self.demo.md4("models", "show", MODEL)

    # -- what they share -----------------------------------------------------------------------------------------------

    def _add(self, run: Path) -> None:
        """Measure a run and make it a version."""
        self.demo.md4("evaluate", str(run), "--suite", self.sizes.suite)
        self.demo.md4("models", "add", MODEL, str(run))

    def _serving(self) -> list[str]:
        return [f"canary.min_requests={self.sizes.requests}", "refresh_s=1"]

    def _name(self) -> Any:
        from orchestration.registry import Registry

        return Registry().name(MODEL, NAME)

    def _ask_until(self, url: str, done: Callable[[Any], bool], seconds: float = 300) -> dict[str, int]:
        """Ask the service again and again until the name is as it should be; how many answers came from each version.

        Each of them must be a good one."""
        self.demo.show_command(
            f'curl {url}/v1/samples --json \'{{"prompt": "import ______ from", "seed": 0}}\'   # 1, 2, ...'
        )
        answers: dict[str, int] = {}
        end = time.monotonic() + seconds
        with httpx.Client(timeout=120) as client:
            while not done(self._name()):
                if time.monotonic() > end:
                    sys.exit(f"the service did not come to a decision within {seconds:.0f} s; answers: {answers}")
                seed = self.found["asked"] = self.found.get("asked", 0) + 1
                reply = client.post(f"{url}/v1/samples", json={"prompt": "import ______ from", "seed": seed})
                reply.raise_for_status()
                version = str(reply.json()["model"]["model_version"])
                answers[version] = answers.get(version, 0) + 1
        self.demo.console.print(f"answers by version: {answers}; all were good ones")
        return answers


def wait_for_the_next_minute() -> None:
    now = datetime.now(UTC)
    time.sleep((now.replace(second=0, microsecond=0) + timedelta(minutes=1, seconds=1) - now).total_seconds())


def spoil(source: Path, folder: Path) -> None:
    """A copy of an exported folder, whose network answers what is no number."""
    import torch

    from md4 import weights

    found = weights.load(source)
    with torch.no_grad():
        next(found.model.parameters()).fill_(torch.nan)
    card = found.card
    weights.export(
        folder, found.model, card.model, sampling=card.sampling, vocabulary=card.vocabulary, symbols=card.symbols
    )


def _ranked(study: Path) -> list[dict[str, Any]]:
    return json.loads((study / "report.json").read_text())["trials"]


def _run_of(study: Path, trial: dict[str, Any]) -> Path:
    """The run that a trial ended with."""
    return study / "trials" / trial["runs"][-1]["run"]


@contextmanager
def cluster(folder: Path, cpus: int) -> Iterator[dict[str, str]]:
    """A Ray cluster of this machine, as `ray start --head` makes it, with a token; gives its users' environment."""
    token = folder / "token"
    token.touch(mode=0o600)
    token.write_text(secrets.token_hex(32))
    ports = dict(zip(_PORTS, free_ports(len(_PORTS)), strict=True))
    access = {
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(token.resolve()),
        "RAY_ADDRESS": f"127.0.0.1:{ports['port']}",
        "RAY_API_SERVER_ADDRESS": f"http://127.0.0.1:{ports['dashboard-port']}",
    }
    command = [sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block", f"--num-cpus={cpus}"]
    command += [
        "--node-ip-address=127.0.0.1",
        "--disable-usage-stats",
        *(f"--{name}={port}" for name, port in ports.items()),
    ]
    with (folder / "ray.log").open("w") as log:
        head = subprocess.Popen(command, env=os.environ | access, stdout=log, stderr=subprocess.STDOUT)
    try:
        wait_for(
            f"{access['RAY_API_SERVER_ADDRESS']}/api/jobs/", head, {"Authorization": f"Bearer {token.read_text()}"}
        )
        yield access
    finally:
        head.send_signal(signal.SIGTERM)
        with suppress(subprocess.TimeoutExpired):
            head.wait(timeout=60)
        head.kill()


def describe(found: dict[str, Any]) -> list[str]:
    """The summary as lines for a reader."""
    return [
        f"searched             {found['trials']} trials, the best {found['searched_bits']:.3f} bits per character",
        f"evaluated by cron    job {found['job']}",
        f"promoted by rule     version 2, after answers by version {found['canary']}",
        "refused              version 3, which is worse",
        f"rolled back          version 4, after answers by version {found['rollback']}: {found['why']}",
        f"everything is in     {FOLDER}/ (studies/, runs/, results/, registry/)",
        "",
        f"next, in {FOLDER}/:   md4 models show {MODEL}; md4 results trend; md4 serve {MODEL}@{NAME}",
    ]


def main(sizes: Sizes = Sizes()) -> None:
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # as Ctrl-C: the cluster ends, too
    demo = Demo(FOLDER)
    demo.keep_earlier()
    FOLDER.mkdir()
    with cluster(FOLDER, cpus=max(sizes.cpus, os.cpu_count() or 1)) as access:
        demo.show_command(f"ray start --head   # its dashboard: {access['RAY_API_SERVER_ADDRESS']}")
        os.chdir(FOLDER)
        os.environ |= {**access, "MD4_PLACE": str(Path.cwd())}
        # A job starts in a folder of Ray's: what it is to find has a whole path.
        data = f"data.directory={Path.cwd() / 'data'}"
        found = Loop(replace(sizes, settings=(*sizes.settings, data)), demo).play()
    found["seconds"] = demo.seconds
    Path("summary.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    demo.console.rule("[bold]what happened")
    demo.console.print("\n".join(describe(found)), markup=False)


if __name__ == "__main__":
    main()
