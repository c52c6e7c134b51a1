"""The command line: `python -m tests.chaos`."""

import argparse
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from orchestration.runs import Run
from tests import chaos
from tests.chaos import judge
from tests.chaos.attempts import Attempts, Trouble
from tests.chaos.cases import CASES, EVERY, Case, Scene
from tests.nodes import Nodes, set_environment, signal_all, wait_until_gone
from tests.orchestration.conftest import tiny_settings, write_corpus
from tests.s3 import S3, reserve

_COUNT = 2  # workers, and nodes


class Theatre:
    """The cluster, the store and the undisturbed runs, for all cases."""

    def __init__(self, folder: Path, nodes: Nodes, s3: S3, seed: int, kills: int, patience: float):
        self.nodes, self.s3 = nodes, s3
        self._folder, self._seed, self._kills, self._patience = folder, seed, kills, patience
        self._corpus = write_corpus(folder / "words.txt")
        self._expected: dict[tuple[int, tuple[str, ...]], Run] = {}  # by steps and settings

    def play(self, case: Case) -> str:
        """What happened, as a line. Trouble if it is not what should happen."""
        steps = case.steps(self._kills)
        expected = self.undisturbed(case)
        folder = self._make_folder(case.name)
        scene = Scene(
            self.nodes, self.s3, folder, random.Random(f"{self._seed}/{case.name}"), self._kills,
            lambda *settings: self._attempts(folder, steps, *case.settings, *settings),
        )  # fmt: skip
        self.s3.reset()
        self.nodes.ensure(_COUNT)
        try:
            case.run(scene)
            run = scene.attempts
            assert run is not None
            run.metrics("checkpoint")
            equal = judge.compare(Run(run.path), expected, case.exact)
            told = judge.check_checkpoints(run)
            return f"{_recoveries(run)}  {equal}  {told} checkpoints told of"
        except Trouble as trouble:
            raise Trouble(f"{trouble}\n{_context(scene.attempts)}") from None
        finally:
            self._clear(scene)

    def undisturbed(self, case: Case) -> Run:
        """The run of as many steps and the same settings that nothing happens to."""
        key = steps, settings = case.steps(self._kills), case.settings
        if key not in self._expected:
            began = time.monotonic()
            attempts = self._attempts(self._make_folder(f"undisturbed-{len(self._expected)}"), steps, *settings)
            try:
                attempts.start()
                attempts.finish()
            except Trouble as trouble:
                raise Trouble(f"the undisturbed run: {trouble}\n{_context(attempts)}") from None
            finally:
                attempts.close()
            told = " ".join([f"{steps} steps", *settings])
            print(f"      undisturbed run of {told} ({time.monotonic() - began:.0f} s)", flush=True)
            self._expected[key] = Run(attempts.path)
        return self._expected[key]

    def _attempts(self, folder: Path, steps: int, *settings: str) -> Attempts:
        own = [f"train.steps={steps}", f"checkpoint.every={EVERY}", f"train.workers={_COUNT}", "train.zero_stage=2"]
        own += ["evaluation.every=0", "train.max_restarts=4"]
        base = tiny_settings(self._corpus, self._folder / "data", folder)
        return Attempts(self.nodes, [*base, *own, *settings], folder, self._patience)

    def _make_folder(self, name: str) -> Path:
        folder = self._folder / "".join(letter if letter.isalnum() else "-" for letter in name)
        folder.mkdir()
        return folder

    def _clear(self, scene: Scene) -> None:
        """Nothing of a case is left for the next one."""
        if scene.attempts is not None:
            scene.attempts.close()
        self.s3.reset()
        workers = self.nodes.workers()
        try:
            wait_until_gone(workers)
        except TimeoutError:
            signal_all(workers, signal.SIGKILL)
        for action in scene.at_end:
            action()


def _recoveries(run: Attempts) -> str:
    done = [one for one in run.recoveries if one.seconds is not None]
    if not done:
        return "no recovery needed"
    seconds = "/".join(f"{one.seconds:.1f}" for one in done)
    return f"recovery {seconds} s  lost {'/'.join(str(one.lost) for one in done)} steps"


def _context(run: Attempts | None) -> str:
    """The last that a failed run said and saw."""
    if run is None:
        return ""
    events = run.path / "events.jsonl"
    lines = [*run.said().splitlines()[-12:], *(events.read_text().splitlines()[-8:] if events.exists() else [])]
    return "\n".join(f"      | {line}" for line in lines)


@contextmanager
def theatre(seed: int, kills: int, patience: float, keep: bool) -> Iterator[Theatre]:
    """Everything that the cases need, and its end, whatever happens."""
    folder = Path(tempfile.mkdtemp(prefix="md4-"))
    reserved = reserve()  # before processes inherit the environment
    set_environment(folder)
    s3 = nodes = None
    try:
        s3 = S3(reserved)
        nodes = Nodes(_COUNT)
        yield Theatre(folder, nodes, s3, seed, kills, patience)
    finally:
        if nodes is not None:
            nodes.close()
        if s3 is not None:
            s3.close()
        if keep:
            print(f"files are in {folder}")
        else:
            shutil.rmtree(folder, ignore_errors=True)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tests.chaos", description=chaos.__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--seed", type=int, default=0, help="of steps, victims and failures that are drawn (0)")
    parser.add_argument("--kills", type=int, default=10, help="kills of the case 'random kills' (10)")
    parser.add_argument("--only", action="append", metavar="WORDS", help="only cases whose names begin so; repeatable")
    parser.add_argument("--list", action="store_true", help="name the cases and end")
    parser.add_argument("--keep", action="store_true", help="keep the runs and Ray's logs, and say where")
    parser.add_argument("--patience", type=float, default=300, help="s after which what is waited for has failed (300)")
    told = parser.parse_args(arguments)
    chosen = [one for one in CASES if not told.only or any(one.name.startswith(words) for words in told.only)]
    width = max(len(one.name) for one in CASES)
    if told.list:
        for one in chosen:
            print(f"{one.name:{width}}  {one.about}")
        return 0
    if not chosen or told.kills < 1:
        print("no case was selected: see --list", file=sys.stderr)
        return 2
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # as Ctrl-C: clean up first
    failed = 0
    with theatre(told.seed, told.kills, told.patience, told.keep) as stage:
        print(f"{len(chosen)} cases, seed {told.seed}, {os.cpu_count()} cores", flush=True)
        for one in chosen:
            began = time.monotonic()
            try:
                stage.undisturbed(one)
                began = time.monotonic()
                outcome, line = "PASS", stage.play(one)
            except Trouble as trouble:
                outcome, line = "FAIL", str(trouble)
                failed += 1
            print(f"{outcome}  {one.name:{width}}  {time.monotonic() - began:4.0f} s  {line}", flush=True)
    print(f"{len(chosen) - failed} passed, {failed} failed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
