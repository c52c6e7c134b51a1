"""Checkpoints: complete or absent, verified when read, independent of workers and ZeRO stage (contract C4).

    checkpoints/step-00000500-3f9a1c/
        weights-00000-of-00002.safetensors      float32 weights, whole tensors by parameter name
        ema-00000-of-00002.safetensors          their moving average
        exp_avg-..., exp_avg_sq-...             the optimizer's moments
        manifest.json                           written last: with it the checkpoint exists, without it it does not

Every writer holds whole tensors, dealt out by size, so a file is readable by safetensors alone and the number of
files says nothing about who may read them. The suffix of the folder is drawn anew for each attempt: a folder that a
killed attempt left behind is never written to again.
"""

import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from md4.errors import UserError

if TYPE_CHECKING:
    from orchestration.zero import EngineState

FORMAT = 1
MANIFEST = "manifest.json"


@dataclass(frozen=True)
class Checkpoint:
    """A committed checkpoint: its folder and its manifest."""

    path: Path
    manifest: dict[str, Any]

    @property
    def step(self) -> int:
        """Updates made."""
        return self.manifest["step"]

    def verify(self) -> None:
        """Compare every file with the manifest; UserError that names the first damaged one."""
        for name, facts in self.manifest["files"].items():
            file = self.path / name
            if not file.is_file():
                raise UserError(f"checkpoint {self.path}: file {name} is missing")
            if file.stat().st_size != facts["bytes"]:
                raise UserError(f"checkpoint {self.path}: {name} has {file.stat().st_size} bytes, not {facts['bytes']}")
            if _sha256(file) != facts["sha256"]:
                raise UserError(f"checkpoint {self.path}: {name} is damaged (its sha256 differs from the manifest's)")

    def weights_hash(self, kind: str) -> str:
        """Short hash that identifies the tensors of one kind ("weights" or "ema")."""
        digests = [facts["sha256"] for name, facts in sorted(self.manifest["files"].items()) if _kind(name) == kind]
        return hashlib.sha256("".join(digests).encode()).hexdigest()[:16]

    def tensors(self, kind: str, device: str = "cpu") -> dict[str, Tensor]:
        """All tensors of one kind by parameter name."""
        with self.reader(device) as read:
            return {name: read(name, kind) for name in self.manifest["tensors"]}

    def reader(self, device: str = "cpu") -> "_Reader":
        """A context that gives `read(name, kind) -> Tensor`; each file is mapped once, a tensor read when asked for."""
        return _Reader(self, device)

    @property
    def kinds(self) -> set[str]:
        return {_kind(name) for name in self.manifest["files"]}


class _Reader:
    def __init__(self, checkpoint: Checkpoint, device: str):
        self._checkpoint, self._device, self._stack = checkpoint, device, ExitStack()
        self._open: dict[str, Any] = {}

    def __enter__(self) -> Callable[[str, str], Tensor]:
        return self._read

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def _read(self, name: str, kind: str) -> Tensor:
        manifest = self._checkpoint.manifest
        file = _file_name(kind, manifest["tensors"][name]["writer"], manifest["writers"])
        if file not in self._open:
            handle = safe_open(str(self._checkpoint.path / file), "pt", device=self._device)
            self._open[file] = self._stack.enter_context(handle)
        return self._open[file].get_tensor(name)


def _file_name(kind: str, writer: int, writers: int) -> str:
    return f"{kind}-{writer:05d}-of-{writers:05d}.safetensors"


def _kind(file: str) -> str:
    return file.rsplit("-", 3)[0]


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync(path: Path) -> None:
    """Force a file or a folder's entries to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _deal(shapes: Mapping[str, torch.Size], writers: int) -> dict[str, int]:
    """Assign tensors to writers, largest first to the least loaded."""
    load = [0] * writers
    writer_of = {}
    for name in sorted(shapes, key=lambda name: (-shapes[name].numel(), name)):
        writer_of[name] = load.index(min(load))
        load[writer_of[name]] += shapes[name].numel()
    return writer_of


def save(directory: Path, state: "EngineState", step: int, facts: Mapping[str, Any], keep: int) -> Path:
    """Write the checkpoint of `step` and retire all but the newest `keep`. Collective over the worker group.

    Args:
        directory: the run's `checkpoints` folder.
        facts: what else a reader needs (configuration, data fingerprint, seed, ...), as JSON values.

    Raises:
        RuntimeError: on every worker, when any of them could not write; what was there before is untouched.
    """
    rank, world = dist.get_rank(), dist.get_world_size()
    suffix = [uuid.uuid4().hex[:6]]
    dist.broadcast_object_list(suffix, src=0)
    folder = directory / f"step-{step:08d}-{suffix[0]}"
    writer_of = _deal(state.shapes, world)

    written: dict[str, dict] = {}
    mine: dict[str, dict[str, Tensor]] = {kind: {} for kind in state.kinds}
    for name, kind, tensor in state.gather(writer_of):
        mine[kind][name] = tensor.cpu()
    failure = None
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for kind, tensors in mine.items():
            file = folder / _file_name(kind, rank, world)
            save_file(tensors, str(file))
            file.chmod(0o644)  # safetensors makes it private; weights are there to be shared
            _sync(file)
            written[file.name] = {"bytes": file.stat().st_size, "sha256": _sha256(file)}
    except (OSError, SafetensorError) as error:
        failure = f"worker {rank}: {error}"
    reports: list[Any] = [None] * world
    dist.all_gather_object(reports, (written, failure))
    failures = [failure for _, failure in reports if failure]
    if failures:
        if rank == 0:
            shutil.rmtree(folder, ignore_errors=True)
        raise RuntimeError(f"checkpoint of step {step} not written: {'; '.join(failures)}")

    if rank == 0:
        manifest = {
            "format": FORMAT,
            "step": step,
            "created": datetime.now(UTC).isoformat(timespec="milliseconds"),
            "code_version": version("md4"),
            **facts,
            "writers": world,
            "kinds": list(state.kinds),
            "groups": [
                {key: value for key, value in group.items() if isinstance(value, int | float | str | bool | tuple)}
                for group in state.optimizer.param_groups
            ],
            "tensors": {
                name: {"shape": list(shape), "dtype": "float32", "writer": writer_of[name]}
                for name, shape in state.shapes.items()
            },
            "files": {name: facts for files, _ in reports for name, facts in files.items()},
        }
        temporary = folder / f".{MANIFEST}"
        temporary.write_text(json.dumps(manifest, indent=1), encoding="utf-8")
        _sync(temporary)
        _sync(folder)
        temporary.rename(folder / MANIFEST)
        _sync(folder)
        _sync(directory)
        _retire(directory, keep)
    dist.barrier()
    return folder


def _retire(directory: Path, keep: int) -> None:
    """Delete all but the newest `keep` checkpoints, manifest first, and folders that no attempt completed."""
    committed = committed_in(directory)
    for old in committed[keep:]:
        (old / MANIFEST).unlink()
        shutil.rmtree(old, ignore_errors=True)
    newest = committed[0].name if committed else ""
    for folder in directory.glob("step-*"):
        if not (folder / MANIFEST).exists() and folder.name < newest:
            shutil.rmtree(folder, ignore_errors=True)


def committed_in(directory: Path) -> list[Path]:
    """Folders with a manifest, newest first: by step, then by the time of commit."""
    folders = [manifest.parent for manifest in directory.glob(f"step-*/{MANIFEST}")]
    return sorted(folders, key=lambda folder: (folder.name[:13], (folder / MANIFEST).stat().st_mtime_ns), reverse=True)


def read(folder: Path) -> Checkpoint:
    """The checkpoint in `folder`, its manifest checked, its files not yet; UserError when it can't be used."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        found = manifest["format"]
        missing = {"step", "writers", "kinds", "tensors", "files", "config"} - manifest.keys()
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"checkpoint {folder}: its manifest is damaged ({error})") from None
    if found != FORMAT:
        raise UserError(f"checkpoint {folder} has format {found}; this version reads format {FORMAT}")
    if missing:
        raise UserError(f"checkpoint {folder}: its manifest lacks {', '.join(sorted(missing))}")
    return Checkpoint(folder, manifest)


def sound(directory: Path, report: Callable[[str], None]) -> Iterator[Checkpoint]:
    """Verified checkpoints, newest first. A damaged one is reported by name and passed over."""
    for folder in committed_in(directory):
        try:
            checkpoint = read(folder)
            checkpoint.verify()
        except UserError as error:
            report(str(error))
            continue
        yield checkpoint


def newest(directory: Path, report: Callable[[str], None]) -> Checkpoint | None:
    """The newest sound checkpoint, or None when there is none."""
    return next(sound(directory, report), None)


def restore(checkpoint: Checkpoint, state: "EngineState") -> None:
    """Load `checkpoint` into a running engine of any worker count and ZeRO stage. Collective.

    Raises:
        UserError: its tensors are not those of the engine's network, or it lacks a kind of state.
    """
    stored = {name: tuple(facts["shape"]) for name, facts in checkpoint.manifest["tensors"].items()}
    wanted = {name: tuple(shape) for name, shape in state.shapes.items()}
    if stored != wanted:
        different = sorted(name for name in stored.keys() | wanted.keys() if stored.get(name) != wanted.get(name))
        name = different[0]
        raise UserError(
            f"checkpoint {checkpoint.path} is of another network: {len(different)} tensors differ, the first is {name} "
            f"(stored {stored.get(name)}, network {wanted.get(name)})"
        )
    if lacking := set(state.kinds) - checkpoint.kinds:
        raise UserError(f"checkpoint {checkpoint.path} lacks {', '.join(sorted(lacking))}")
    with checkpoint.reader() as read_tensor:
        state.load(read_tensor, checkpoint.step)
