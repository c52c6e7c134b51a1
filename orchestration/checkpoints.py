"""Checkpoints: complete or absent, verified when read, independent of workers and ZeRO stage (contract C4).

    checkpoints/latest.json                 the newest one's folder and step: a hint for who asks often
    checkpoints/step-00000500-3f9a1c/
        weights-00000-of-00002.safetensors      float32 weights, whole tensors by parameter name
        ema-00000-of-00002.safetensors          their moving average
        exp_avg-..., exp_avg_sq-...             the optimizer's moments
        writer-00000.json                       what the first writer wrote
        manifest.json                           written last: with it the checkpoint exists, without it it does not

Every writer holds whole tensors, dealt out by size, so a file is readable by safetensors alone and the number of
files says nothing about who may read them. A reader takes its own part of each tensor by ranges of bytes. The suffix of
the folder is drawn anew for each attempt: a folder that a killed attempt left behind is never written to again. The
folder may be in S3. Writing is in `orchestration.checkpoint_writer`.
"""

import hashlib
import json
import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch.distributed as dist
from torch import Tensor

from md4.errors import UserError
from orchestration.tensor_files import TensorFile
from pipelines.storage import Folder, Place

if TYPE_CHECKING:
    from orchestration.zero import EngineState

FORMAT = 2
MANIFEST = "manifest.json"
LATEST = "latest.json"
_LISTS = ("kinds", "tensors", "files", "config", "step", "writers")


@dataclass(frozen=True)
class Checkpoint:
    """A committed checkpoint: its folder and its manifest."""

    path: Folder
    manifest: dict[str, Any]

    @property
    def step(self) -> int:
        """Updates made."""
        return self.manifest["step"]

    @property
    def kinds(self) -> list[str]:
        """What is kept of each parameter: "weights", "ema"..."""
        return self.manifest["kinds"]

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: tuple(facts["shape"]) for name, facts in self.manifest["tensors"].items()}

    def verify(self, files: Sequence[str] | None = None) -> None:
        """Compare files, by default all, with the manifest; UserError that names the first damaged one."""
        for name in files if files is not None else self.manifest["files"]:
            facts = self.manifest["files"][name]
            try:
                size = self.path.size(name)
                found = size == facts["bytes"] and self._sha256(name)
            except FileNotFoundError:
                raise UserError(f"checkpoint {self.path}: file {name} is missing") from None
            except OSError as error:
                raise UserError(f"checkpoint {self.path}: {name} can't be read ({error})") from None
            if size != facts["bytes"]:
                raise UserError(f"checkpoint {self.path}: {name} has {size} bytes, not {facts['bytes']}")
            if found != facts["sha256"]:
                raise UserError(f"checkpoint {self.path}: {name} is damaged (its sha256 differs from the manifest's)")

    def _sha256(self, name: str) -> str:
        if self.path.remote:
            return hashlib.sha256(self.path.read(name)).hexdigest()
        with open(self.path.path(name), "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

    def weights_hash(self, kind: str) -> str:
        """Short hash that identifies the tensors of one kind ("weights" or "ema")."""
        sums = {name: facts["sums"][kind] for name, facts in sorted(self.manifest["tensors"].items())}
        return hashlib.sha256(json.dumps(sums).encode()).hexdigest()[:16]

    def tensors(self, kind: str) -> dict[str, Tensor]:
        """All tensors of one kind by parameter name, on the CPU."""
        wanted = [(name, 0, math.prod(shape)) for name, shape in self.shapes.items()]
        return {name: part.reshape(self.shapes[name]) for (name, *_), part in self.read(kind, wanted)}

    def read(self, kind: str, wanted: Sequence[tuple[str, int, int]]) -> Iterator[tuple[tuple[str, int, int], Tensor]]:
        """Elements `start .. start + count - 1` of tensors, given as (name, start, count): each with its float32
        `[count]`. Nothing else is read, and no more than one file's parts are held."""
        by_file: dict[str, list[tuple[str, int, int]]] = defaultdict(list)
        for part in wanted:
            by_file[file_name(kind, self.manifest["tensors"][part[0]]["writer"], self.manifest["writers"])].append(part)
        for file, parts in by_file.items():
            yield from zip(parts, self._open(file).read(parts), strict=True)

    @cached_property
    def _opened(self) -> dict[str, TensorFile]:
        return {}

    def _open(self, file: str) -> TensorFile:
        if file not in self._opened:
            try:
                self._opened[file] = TensorFile(self.path, file)
            except (ValueError, OSError) as error:
                raise UserError(f"checkpoint {self.path}: {file} can't be read ({error})") from None
        return self._opened[file]


def file_name(kind: str, writer: int, writers: int) -> str:
    return f"{kind}-{writer:05d}-of-{writers:05d}.safetensors"


# -- found and verified ----------------------------------------------------------------------------------------------


def committed_in(directory: Place) -> list[Folder]:
    """Folders with a manifest, newest first: by step, then by the time of commit."""
    directory = Folder(directory)
    found = [
        (path.split("/")[0], entry.written)
        for path, entry in directory.list().items()
        if path.startswith("step-") and path.endswith(f"/{MANIFEST}") and path.count("/") == 1
    ]
    return [directory / name for name, _ in sorted(found, key=lambda one: (one[0][:13], one[1]), reverse=True)]


def step_of(folder: Folder) -> int:
    """The step that the name of a checkpoint's folder says."""
    return int(folder.name[5:13])


def read(folder: Place) -> Checkpoint:
    """The checkpoint in `folder`, its manifest checked, its files not yet; UserError when it can't be used."""
    folder = Folder(folder)
    try:
        manifest = json.loads(folder.read(MANIFEST))
        found = manifest["format"]
        missing = set(_LISTS) - manifest.keys()
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"checkpoint {folder}: its manifest is damaged ({error})") from None
    if found != FORMAT:
        raise UserError(f"checkpoint {folder} has format {found}; this version reads format {FORMAT}")
    if missing:
        raise UserError(f"checkpoint {folder}: its manifest lacks {', '.join(sorted(missing))}")
    return Checkpoint(folder, manifest)


def sound(directory: Place, report: Callable[[str], None], step: int | None = None) -> Iterator[Checkpoint]:
    """Verified checkpoints, newest first, perhaps of one step. A damaged one is reported by name and passed over."""
    for folder in committed_in(directory):
        if step is not None and not folder.name.startswith(f"step-{step:08d}-"):
            continue
        try:
            checkpoint = read(folder)
            checkpoint.verify()
        except UserError as error:
            report(str(error))
            continue
        yield checkpoint


def newest(directory: Place, report: Callable[[str], None], step: int | None = None) -> Checkpoint | None:
    """The newest sound checkpoint, perhaps of a step, or None when there is none."""
    return next(sound(directory, report, step), None)


def newest_together(directory: Place, report: Callable[[str], None]) -> Checkpoint | None:
    """The same, found by a group of workers, each of which verifies its share of the files. *Collective.*"""
    rank = dist.get_rank()
    folders: list[Any] = [[folder.url for folder in committed_in(directory)] if rank == 0 else None]
    dist.broadcast_object_list(folders, src=0)
    for place in folders[0]:
        try:
            return read_together(place)
        except UserError as error:
            if rank == 0:
                report(str(error))
    return None


def read_together(place: Place) -> Checkpoint:
    """The checkpoint in `place`, of which each worker verifies a share of the files; UserError, for all of them, that
    says what is wrong with it. *Collective.*"""
    rank, world = dist.get_rank(), dist.get_world_size()
    checkpoint, trouble = None, None
    try:
        checkpoint = read(place)
        checkpoint.verify(sorted(checkpoint.manifest["files"])[rank::world])
    except UserError as error:
        trouble = str(error)
    everyone: list[Any] = [None] * world
    dist.all_gather_object(everyone, trouble)
    if found := list(dict.fromkeys(one for one in everyone if one)):
        raise UserError("\n".join(found))
    assert checkpoint is not None
    return checkpoint


# -- loaded ----------------------------------------------------------------------------------------------------------


def restore(checkpoint: Checkpoint, state: "EngineState") -> None:
    """Load `checkpoint` into a running engine of any worker count and ZeRO stage. *Collective.*

    Ends with a comparison: the state of all workers together, and the weights that the network computes with, have
    the bits that were written.

    Raises:
        UserError: its tensors are not those of the engine's network, or it lacks a kind of state.
        RuntimeError: what was loaded is not what was written.
    """
    stored, wanted = checkpoint.shapes, {name: tuple(shape) for name, shape in state.shapes.items()}
    if stored != wanted:
        different = sorted(name for name in stored.keys() | wanted.keys() if stored.get(name) != wanted.get(name))
        name = different[0]
        raise UserError(
            f"checkpoint {checkpoint.path} is of another network: {len(different)} tensors differ, the first is {name} "
            f"(stored {stored.get(name)}, network {wanted.get(name)})"
        )
    if lacking := set(state.kinds) - set(checkpoint.kinds):
        raise UserError(f"checkpoint {checkpoint.path} lacks {', '.join(sorted(lacking))}")
    state.load(checkpoint.read, checkpoint.step)
    _compare(checkpoint, state)


def _compare(checkpoint: Checkpoint, state: "EngineState") -> None:
    noted = {
        (name, kind): facts["sums"][kind]
        for name, facts in checkpoint.manifest["tensors"].items()
        for kind in state.kinds
    }
    for what, sums in (("state", state.sums()), ("network", state.network_sums())):
        wrong = [key for key, value in sums.items() if value != noted[key]]
        if wrong:
            name, kind = wrong[0]
            raise RuntimeError(
                f"checkpoint {checkpoint.path}: {len(wrong)} tensors of the {what} are not what was written after "
                f"loading, the first is {kind} of {name}"
            )
