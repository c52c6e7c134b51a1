"""Writing checkpoints beside the training (their form: `orchestration.checkpoints`).

`save` copies the state and returns; files are written, hashed and committed by a thread of each worker. The threads
use no collectives, which would get between those of the training: every writer notes in the attempt's folder what it
wrote, and the leader's thread commits when all notes are there. What happened is told by `news`, after it happened: a
checkpoint that was told of is committed.
"""

import json
import threading
import time
import uuid
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from safetensors import SafetensorError
from torch import Tensor

from md4.errors import UserError
from orchestration import checkpoints, holds, tensor_files
from orchestration.checkpoints import FORMAT, LATEST, MANIFEST, Checkpoint, committed_in, file_name
from orchestration.content_sums import content_sum
from pipelines.storage import Folder, Place

if TYPE_CHECKING:
    from orchestration.zero import EngineState

_STORAGE_ERRORS = (OSError, UserError, SafetensorError)
_PATIENCE = 1800.0  # s that the leader waits for the other writers' notes


@dataclass(frozen=True)
class Retention:
    """Which checkpoints stay: the newest `last`, those of every `every` steps, the `best` by validation bound."""

    last: int = 3
    every: int = 0
    best: int = 0

    def keeps(self, found: list[Checkpoint]) -> set[str]:
        """Names of the folders to keep, given all of them, the newest first."""
        kept = found[: self.last]
        if self.every:
            kept = kept + [one for one in found if one.step % self.every == 0]
        scored = [one for one in found if one.manifest.get("evaluation")]
        scored.sort(key=lambda one: one.manifest["evaluation"]["bits_per_token"])
        return {one.path.name for one in kept + scored[: self.best]}


@dataclass(frozen=True)
class News:
    """What became of one attempt."""

    step: int
    path: Folder
    seconds: float  # from the copy of the state to the commit
    blocked: float  # s that the training stood still for it
    error: str | None = None  # why there is no checkpoint


class Writer:
    """Writes the checkpoints of a run, one at a time. Methods marked *collective* are called by all workers in step.

    before_commit: of the leader, what has to be done for a checkpoint to count; called in a thread.
    """

    def __init__(self, directory: Place, retention: Retention, before_commit: Callable[[], None] = lambda: None):
        self._directory, self._retention, self._before_commit = Folder(directory), retention, before_commit
        self._rank, self._world = dist.get_rank(), dist.get_world_size()
        self._pool = ThreadPoolExecutor(2, "checkpoint")
        self._files: Future[str | None] | None = None  # of this worker; its result is why they were not written
        self._commit: Future[None] | None = None  # of the leader
        self._given_up = threading.Event()
        self._news: SimpleQueue[News] = SimpleQueue()

    def save(self, state: "EngineState", step: int, facts: Mapping[str, Any], *, hold: bool = False) -> None:
        """Copy the state of `step` and begin to write it; waits for the checkpoint before. *Collective.*

        facts: what else a reader needs (configuration, data fingerprint, seed, ...), as JSON values. hold: it stays
        until somebody releases it (`orchestration.holds`).
        """
        began = time.perf_counter()
        self.finish()
        suffix = [uuid.uuid4().hex[:6]]
        dist.broadcast_object_list(suffix, src=0)
        attempt = self._directory / f"step-{step:08d}-{suffix[0]}"
        writer_of = _deal(state.shapes, self._world)
        mine: dict[str, dict[str, Tensor]] = {kind: {} for kind in state.kinds}
        for name, kind, tensor in state.gather(writer_of):
            mine[kind][name] = tensor.cpu()
        self._given_up = threading.Event()
        self._files = self._pool.submit(self._write_files, attempt, mine)
        blocked = time.perf_counter() - began
        if self._rank == 0:
            manifest = {
                "format": FORMAT,
                "step": step,
                "created": datetime.now(UTC).isoformat(timespec="milliseconds"),
                "code_version": version("md4"),
                **facts,
                "writers": self._world,
                "kinds": list(state.kinds),
                "groups": [
                    {key: value for key, value in group.items() if isinstance(value, int | float | str | bool | tuple)}
                    for group in state.optimizer.param_groups
                ],
                "tensors": {
                    name: {"shape": list(shape), "dtype": "float32", "writer": writer_of[name]}
                    for name, shape in state.shapes.items()
                },
            }
            self._commit = self._pool.submit(self._commit_when_written, attempt, manifest, began, blocked, hold)

    def finish(self) -> None:
        """Wait until nothing is being written any more. *Collective.*"""
        if self._files is None:
            return
        trouble: list[Any] = [None] * self._world
        dist.all_gather_object(trouble, self._files.result())
        if any(trouble):
            self._given_up.set()  # a note is missing: the leader need not wait for it
        if self._commit is not None:
            self._commit.result()
        self._files = self._commit = None

    def news(self) -> list[News]:
        """What became of attempts since this was last asked; of the leader."""
        return [self._news.get() for _ in range(self._news.qsize())]

    # -- in threads ------------------------------------------------------------------------------------------------

    def _write_files(self, attempt: Folder, mine: dict[str, dict[str, Tensor]]) -> str | None:
        note: dict[str, Any] = {"files": {}, "sums": {}}
        try:
            for kind in list(mine):
                tensors = mine.pop(kind)  # its memory is free again when its file is written
                file = file_name(kind, self._rank, self._world)
                note["files"][file] = tensor_files.write(attempt, file, tensors)
                note["sums"][kind] = {name: int(content_sum(tensor)) for name, tensor in tensors.items()}
            attempt.write(_note(self._rank), json.dumps(note).encode())
        except _STORAGE_ERRORS as error:
            reason = f"worker {self._rank}: {error}"
            # The leader may be told before the next meeting of all workers; if the storage is gone, it is not.
            _try(lambda: attempt.write(_note(self._rank), json.dumps({"error": reason}).encode()))
            return reason
        return None

    def _commit_when_written(
        self, attempt: Folder, manifest: dict[str, Any], began: float, blocked: float, hold: bool
    ) -> None:
        step, error = manifest["step"], None
        try:
            notes = self._notes(attempt)
            manifest["files"] = {name: facts for note in notes for name, facts in note["files"].items()}
            for name, facts in manifest["tensors"].items():
                sums = notes[facts["writer"]]["sums"]
                facts["sums"] = {kind: sums[kind][name] for kind in manifest["kinds"]}
            self._before_commit()
            if hold:  # before it can be seen, and hence before it could be retired
                holds.put(self._directory, attempt.name)
            attempt.create(MANIFEST, json.dumps(manifest, indent=1).encode())
        except _STORAGE_ERRORS as failure:
            error = str(failure)
            _try(attempt.remove_all)
            _try(lambda: holds.release(self._directory, attempt.name))
        self._news.put(News(step, attempt, time.perf_counter() - began, blocked, error))
        if error is None:
            _try(lambda: self._directory.update(LATEST, lambda old: _newer(old, step, attempt.name)))
            _try(lambda: retire(self._directory, self._retention))

    def _notes(self, attempt: Folder) -> list[dict[str, Any]]:
        """The notes of all writers, as soon as they are there; OSError if one of them failed."""
        found: dict[int, dict[str, Any]] = {}
        pause, end = 0.02, time.monotonic() + _PATIENCE
        while len(found) < self._world:
            for rank in set(range(self._world)) - found.keys():
                try:
                    found[rank] = json.loads(attempt.read(_note(rank)))
                except FileNotFoundError:
                    continue
                if "error" in found[rank]:
                    raise OSError(found[rank]["error"])
            if len(found) < self._world:
                missing = ", ".join(map(str, sorted(set(range(self._world)) - found.keys())))
                if self._given_up.wait(pause):
                    raise OSError(f"worker {missing} could not write")
                if time.monotonic() > end:
                    raise OSError(f"nothing heard of worker {missing} for {_PATIENCE:.0f} s")
                pause = min(2 * pause, 1.0)
        return [found[rank] for rank in range(self._world)]


def _note(rank: int) -> str:
    return f"writer-{rank:05d}.json"


def _newer(old: bytes | None, step: int, folder: str) -> bytes | None:
    """The contents of LATEST, unless it tells of a later step: a worker that was given up may come back late."""
    try:
        if old is not None and json.loads(old)["step"] > step:
            return None
    except (ValueError, KeyError, TypeError):
        pass  # not ours, or torn by something else: replaced
    return json.dumps({"step": step, "folder": folder}).encode() + b"\n"


def _try(action: Callable[[], object]) -> None:
    """Do what is convenient and not necessary: a checkpoint is good without it, and the next one does it again."""
    with suppress(*_STORAGE_ERRORS):
        action()


def retire(directory: Place, retention: Retention) -> None:
    """Delete checkpoints that need not stay, manifest first, and older folders that no attempt completed."""
    directory = Folder(directory)
    committed = committed_in(directory)
    if not committed:
        return
    readable = []
    for folder in committed:
        try:
            readable.append(checkpoints.read(folder))
        except UserError:
            continue  # somebody may want to look at it
    kept = retention.keeps(readable) | set(holds.names(directory))
    for one in readable:
        if one.path.name not in kept:
            one.path.remove(MANIFEST)
            one.path.remove_all()
    names, newest = {folder.name for folder in committed}, committed[0].name
    for name in {path.split("/")[0] for path in directory.list()}:
        if name.startswith("step-") and name not in names and name[:13] < newest[:13]:
            (directory / name).remove_all()


def _deal(shapes: Mapping[str, torch.Size], writers: int) -> dict[str, int]:
    """Assign tensors to writers, largest first to the least loaded."""
    load = [0] * writers
    writer_of = {}
    for name in sorted(shapes, key=lambda name: (-shapes[name].numel(), name)):
        writer_of[name] = load.index(min(load))
        load[writer_of[name]] += shapes[name].numel()
    return writer_of
