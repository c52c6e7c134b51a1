"""The folder of a study: what is searched, and what became of each trial. It is all that a study knows.

study.yaml            the settings that the trials share, the space, how it is searched
trials/000.json       a trial's record: its values, its runs, how it ended
trials/000/           its run, as `md4 train` makes it; 000.1, 000.2 of a trial that went on from another's checkpoint
"""

import fcntl
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict

from md4.errors import UserError
from orchestration import checkpoints
from orchestration.config import Config, lay, read_yaml, validate
from orchestration.runs import Run
from orchestration.search import space as spaces
from orchestration.search.budget import Budget, budget
from orchestration.search.space import Space
from pipelines.storage import Folder, write_atomically

FILE = "study.yaml"
# What a study says of each trial's run, by key: an override of it would be in vain.
FOLLOWS = {
    "name": "--name, and trials have numbers",
    "runs": "the study's folder",
    "train.steps": "search.budget",
    "train.start_from": "the study",
    "evaluation.every": "search.rounds",
    "evaluation.suite": "the study: a suite beside a trial would take the place of another one",
    "checkpoint.every": "search.rounds",
    "checkpoint.seconds": "search.rounds",
    "checkpoint.directory": "the study's folder",
    "checkpoint.keep": "the study",
    "checkpoint.keep_every": "the study",
    "checkpoint.keep_best": "the study",
    "tracking.prometheus_port": "the study: trials would share it",
}


class Begin(BaseModel):
    """The checkpoint of another trial that a run goes on from."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    trial: int
    round: int
    checkpoint: str


class Segment(BaseModel):
    """One run of a trial."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    run: str  # its folder below trials/
    values: dict[str, Any]
    begins: Begin | None = None


class Ended(BaseModel):
    """How a trial came to its end."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    how: Literal["finished", "stopped", "failed"]
    round: int | None = None  # after which it was stopped; what its trainer did until it heard of it does not count
    why: str | None = None


class Record(BaseModel):
    """A trial, as its file says."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    number: int
    segments: tuple[Segment, ...]
    ended: Ended | None = None

    @property
    def values(self) -> dict[str, Any]:
        """Of its newest run."""
        return self.segments[-1].values


@dataclass(frozen=True)
class Round:
    """A trial's evaluation after so many rounds."""

    number: int
    step: int
    tokens: int
    bits: float  # per token, an upper bound
    error: float  # its standard error
    run: str
    checkpoint: str | None = None  # of this step, if it is known

    def at(self, checkpoint: str) -> "Round":
        """The same with its checkpoint."""
        return replace(self, checkpoint=checkpoint)


@dataclass(frozen=True)
class Trial:
    """One trial of a study, which may not have begun."""

    study: "Study"
    number: int

    @property
    def file(self) -> str:
        return f"trials/{self.number:03d}.json"

    def record(self) -> Record | None:
        """What is known of it; None: it has not begun."""
        try:
            return Record.model_validate_json(self.study.folder.read(self.file))
        except FileNotFoundError:
            return None

    def begin(self, values: Mapping[str, Any]) -> Record:
        """Its record, made if there is none."""
        segment = Segment(run=f"{self.number:03d}", values=dict(values))
        fresh = Record(number=self.number, segments=(segment,))
        self.study.folder.update(self.file, lambda found: _bytes(fresh) if found is None else None)
        record = self.record()
        assert record is not None
        return record

    def fork(self, values: Mapping[str, Any], begins: Begin) -> Record:
        """Note that it goes on from another trial's checkpoint, in a new run."""

        def change(record: Record) -> Record:
            segment = Segment(run=f"{self.number:03d}.{len(record.segments)}", values=dict(values), begins=begins)
            return record.model_copy(update={"segments": (*record.segments, segment), "ended": None})

        return self._change(change)

    def end(
        self, how: Literal["finished", "stopped", "failed"], why: str | None = None, round: int | None = None
    ) -> None:
        """Note its end, unless one is noted."""
        ended = Ended(how=how, why=why, round=round)
        self._change(lambda one: one if one.ended else one.model_copy(update={"ended": ended}))

    def reopen(self) -> Record:
        """Note that a trial that failed is tried again."""
        return self._change(lambda one: one.model_copy(update={"ended": None}))

    def _change(self, change: Any) -> Record:
        self.study.folder.update(
            self.file, lambda found: None if found is None else _bytes(change(Record.model_validate_json(found)))
        )
        record = self.record()
        if record is None:
            raise UserError(f"trial {self.number} of {self.study.path} has no record")
        return record

    def run_of(self, segment: Segment) -> Path:
        """The folder of one of its runs."""
        return self.study.path / "trials" / segment.run

    def config(self, segment: Segment) -> Config:
        """The configuration of one of its runs."""
        start = segment.begins and segment.begins.checkpoint
        return self.study.config(segment.values, segment.run, start)

    def rounds(self, upto_checkpoint: bool = False) -> list[Round]:
        """Its evaluations in order. Where it went on from another trial, what it had measured beyond is left out.

        upto_checkpoint: of the newest run only those that it will not make again when it is resumed.
        """
        record = self.record()
        found: dict[int, Round] = {}
        for segment in record.segments if record else ():
            folder = self.run_of(segment)
            if segment.begins is not None:
                found = {number: one for number, one in found.items() if number <= segment.begins.round}
            if not (folder / "config.yaml").exists():
                continue
            run = Run(folder)
            known = None
            if upto_checkpoint and record and segment is record.segments[-1]:
                kept = checkpoints.committed_in(run.checkpoints)
                known = checkpoints.step_of(kept[0]) if kept else 0
            for one in measured(run):
                if known is None or one.step <= known:
                    found[one.number] = one
        last = record.ended.round if record and record.ended and record.ended.round else self.study.space.search.rounds
        return [found[number] for number in sorted(found) if number <= last]


def measured(run: Run) -> Iterator[Round]:
    """The rounds in the metrics of a trial's run."""
    for row in run.metrics("evaluation"):
        if (one := as_round(row, run.config)) is not None:
            yield one


def as_round(row: Mapping[str, Any], config: Config) -> Round | None:
    """A row of metrics, if it is the evaluation at the end of a round."""
    step, every = row["step"], config.evaluation.every
    if row["kind"] != "evaluation" or not step or step % every:
        return None
    tokens = step * config.train.batch_size * config.data.length
    return Round(step // every, step, tokens, row["bits_per_token"], row["standard_error"], config.name)


def _bytes(record: Record) -> bytes:
    return record.model_dump_json(indent=1).encode()


class Study:
    """A study's folder, which exists."""

    def __init__(self, path: str | Path):
        self.path = Path(path).absolute()
        self.folder = Folder(self.path)
        if not (self.path / FILE).is_file():
            near = sorted(one.parent.name for one in self.path.parent.glob(f"*/{FILE}"))
            raise UserError(
                f"{path} is not a study's folder (it has no {FILE})"
                + (f"; studies there: {', '.join(near)}" if near else "")
            )
        tree = read_yaml((self.path / FILE).read_text("utf-8"), f"{self.path}/{FILE}")
        self.name, self.preset = self.path.name, str(tree["preset"])
        self.base: dict[str, Any] = tree["base"]
        self.space: Space = spaces.validate({"space": tree["space"], "search": tree["search"]}, f"{self.path}/{FILE}")

    @classmethod
    def create(cls, path: Path, preset: str, base: Mapping[str, Any], space: Space) -> "Study":
        """Make the folder of a new study; UserError when it is taken."""
        if (path / FILE).exists():
            raise UserError(f"study {path} exists already: continue it with --resume, or choose another --name")
        write_atomically(path / FILE, _describe(preset, base, space).encode())
        return cls(path)

    @classmethod
    def resume(cls, path: Path, preset: str, base: Mapping[str, Any], space: Space) -> "Study":
        """The study in a folder, to be continued; UserError unless it is the given one. `concurrent` may be another."""
        if cls(path).check(preset, base, space):
            write_atomically(path / FILE, _describe(preset, base, space).encode())
        return cls(path)

    def check(self, preset: str, base: Mapping[str, Any], space: Space) -> list[str]:
        """Keys that differ from what is given, and may; UserError if others do."""
        before, now = (
            dict(_leaves(read_yaml(text, FILE)))
            for text in (_describe(self.preset, self.base, self.space), _describe(preset, base, space))
        )
        differ = [key for key in dict.fromkeys([*now, *before]) if now.get(key) != before.get(key)]
        if fixed := [key for key in differ if key != "search.concurrent"]:
            lines = [f"{key}: the study has {before.get(key)!r}, given is {now.get(key)!r}" for key in fixed]
            raise UserError(f"study {self.path} can't be resumed with other settings:\n" + "\n".join(lines))
        return differ

    def config(self, values: Mapping[str, Any], run: str = "000", start_from: str | None = None) -> Config:
        """The configuration of a trial's run with these values; UserError if they do not fit together."""
        return trial_config(self.base, self.space, values, self.path, run, start_from)

    def budget_of(self, config: Config) -> Budget:
        """What a trial with this configuration gets."""
        return budget(config, self.space.search)

    @cached_property
    def trials(self) -> list[Trial]:
        """All of them, begun or not."""
        return [Trial(self, number) for number in range(self.space.trials)]

    @contextmanager
    def locked(self) -> Iterator[None]:
        """One process at a time runs a study; UserError for the second. The lock ends with its process."""
        handle = os.open(self.path / ".lock", os.O_RDWR | os.O_CREAT, 0o644)
        try:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                owner = os.read(handle, 100).decode() or "another process"
                raise UserError(f"study {self.path} is being run by {owner}") from None
            os.ftruncate(handle, 0)
            os.write(handle, f"process {os.getpid()}".encode())
            yield
        finally:
            os.close(handle)


def trial_config(
    base: Mapping[str, Any],
    space: Space,
    values: Mapping[str, Any],
    study: Path,
    run: str = "000",
    start_from: str | None = None,
) -> Config:
    """The configuration of a trial's run in the folder `study`; UserError if values do not fit together."""
    search = space.search
    try:
        tree = {"name": run, **lay(dict(base), values)}
        given = budget(validate(tree), search)
        population = search.scheduler == "pbt"
        settings = {
            "name": run,
            "runs": str(study.absolute() / "trials"),
            "train.steps": given.steps,
            "train.start_from": start_from,
            "train.spare": tree.get("train", {}).get("spare", False),  # a trial is not worth a process that waits
            "evaluation.every": given.every,
            "evaluation.suite": None,
            "checkpoint.every": given.every,
            "checkpoint.seconds": 0,
            "checkpoint.directory": None,
            "checkpoint.keep": 2,
            "checkpoint.keep_every": given.every if population else 0,  # any of them may be gone on from
            "checkpoint.keep_best": 0,
            "tracking.prometheus_port": 0,
        }
        return validate(lay(tree, settings))
    except UserError as error:
        told = ", ".join(f"{key}={value}" for key, value in values.items())
        raise UserError(f"trial with {told}: {error}") from None


def _describe(preset: str, base: Mapping[str, Any], space: Space) -> str:
    tree = {"preset": preset, **space.model_dump(mode="json", by_alias=True, exclude_none=True), "base": dict(base)}
    return yaml.safe_dump(json.loads(json.dumps(tree)), sort_keys=False)


def _leaves(tree: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield prefix + str(key), value
