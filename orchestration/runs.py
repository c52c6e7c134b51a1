"""A run's folder (contract C6): what is in it, how it is made, continued and read.

runs/NAME/config.yaml  metrics.jsonl  checkpoints/  samples/  reports/  grids/

It is on this machine or in S3, where it is read file by file; how a file gets there that is written line by line says
`orchestration.run_mirror`. A run whose vocabulary is a file keeps a copy of it, `tokenizer.json`, and uses that: the
file may move or change.
"""

import hashlib
import json
import os
import re
import socket
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from md4 import weights
from md4.errors import UserError
from md4.model import build
from md4.objectives import MaskedDiffusion
from md4.samplers import saved
from orchestration import checkpoints
from orchestration.config import Config, read_yaml, validate
from pipelines.row_cache import private_folder
from pipelines.storage import Folder, Place, alone, local, location, write_atomically
from pipelines.vocabularies import TOKENIZER, Trained, Vocabulary, keep

CONFIG, METRICS = "config.yaml", "metrics.jsonl"

# What may differ between a run and its continuation: it changes neither the data, the model nor the updates. (The rule
# for spikes does, but a run that it has stopped could not be continued if the rule had to stay.)
_FREE = ("train.workers", "train.zero_stage", "train.micro_batch", "train.precision", "train.device", "train.threads")
_FREE += ("train.log_every", "train.max_restarts", "evaluation.", "checkpoint.", "tracking.", "sampling.", "serving.")
_FREE += ("card.",)
_FREE += (
    "runs",
    "data.directory",
    "train.patience",
    "train.peak_tflops",
    "train.spike",
    "train.on_spike",
    "train.skips",
)
# Settings that there are no more: of runs that were written when there were.
_PAST = {"serving": ("max_batch_size", "batch_wait_ms", "max_rows")}
_FREE_IN_MIXTURE = re.compile(r"data\.mixture\.\d+\.(directory|name)")


class Run:
    """The folder of one run, which exists."""

    def __init__(self, place: Place):
        self.place = Folder(place)
        try:
            text = self.place.read(CONFIG).decode("utf-8")
        except (FileNotFoundError, NotADirectoryError):
            near = [] if self.place.remote else sorted(p.parent.name for p in self.path.parent.glob(f"*/{CONFIG}"))
            known = f"; runs there: {', '.join(near)}" if near else ""
            raise UserError(f"{self.place} is not a run's folder (it has no {CONFIG}){known}") from None
        tree = read_yaml(text, self.place.path(CONFIG))
        for part, names in _PAST.items():
            for name in names:
                tree.get(part, {}).pop(name, None)
        kept = _kept_vocabulary(self.place)
        self.config: Config = validate(_with_vocabulary(tree, str(kept)) if kept else tree)

    @property
    def path(self) -> Path:
        """The folder, if it is one of this machine; UserError for one in S3."""
        return local(self.place)

    @property
    def address(self) -> str:
        """The folder's path or url, for processes with another working directory."""
        return address(self.place)

    @property
    def checkpoints(self) -> Folder:
        """Its checkpoints, which move with the run unless they were put elsewhere."""
        return self.place / "checkpoints" if self.config.checkpoint.directory is None else self.config.checkpoints

    @property
    def reports(self) -> Path:
        return self.path / "reports"

    @property
    def samples(self) -> Path:
        return self.path / "samples"

    @property
    def metrics_file(self) -> Path:
        return self.path / METRICS

    def metrics(self, kind: str | None = None) -> list[dict[str, Any]]:
        """Rows of `metrics.jsonl`, of one kind ("train", "evaluation", "checkpoint", "suite") or all."""
        try:
            lines = self.place.read(METRICS)
        except FileNotFoundError:
            return []
        return [row for row in _rows(lines) if kind is None or row["kind"] == kind]

    @classmethod
    def create(cls, config: Config) -> "Run":
        """Make the folder of a new run; UserError when it is taken (run folders are never shared)."""
        refuse_taken(config)
        try:
            # Of several that make it at the same time, perhaps of equal settings, one goes on: whose first line it is.
            config.place.create(CONFIG, f"{_signature()}\n{config.to_yaml()}".encode())
        except FileExistsError:
            raise _taken(config) from None
        keep(config.data.tokens, config.place)
        return cls(config.place)

    @classmethod
    def resume(cls, config: Config, report: Callable[[str], None]) -> "Run":
        """The existing run of `config`, to be continued; its stored configuration must agree where it matters."""
        run = cls(config.place)
        if fixed := differences(run.config, config):
            lines = [f"{key}: the run has {before!r}, given is {now!r}" for key, before, now in fixed]
            raise UserError(f"run {run.place} can't be resumed with another configuration:\n" + "\n".join(lines))
        if changed := [key for key, *_ in _all_differences(run.config, config)]:
            report(f"resuming with changed {', '.join(changed)}")
            run.place.write(CONFIG, config.to_yaml().encode())
        if not run.place.exists(TOKENIZER):  # whoever made the run may have been killed just then
            keep(config.data.tokens, run.place)
        return cls(run.place)


def address(place: Place) -> str:
    """The path or url of a folder, for processes with another working directory."""
    folder = Folder(place)
    return folder.url if folder.remote else str(local(folder).resolve())


def refuse_taken(config: Config) -> None:
    """UserError if there is a run of this name."""
    if config.place.exists(CONFIG):
        raise _taken(config)


def _taken(config: Config) -> UserError:
    return UserError(f"run {config.place} exists already: continue it with --resume, or choose another name=...")


def _signature() -> str:
    """A comment that no other process writes."""
    made = datetime.now(UTC).isoformat(timespec="seconds")
    return f"# made {made} on {socket.gethostname()} by process {os.getpid()}, {uuid.uuid4().hex[:12]}"


def check_writable(place: Folder) -> None:
    """UserError if files can't be written in S3: said before anything starts. What is local is seen soon enough."""
    if place.remote:
        trial = f".trial-{uuid.uuid4().hex[:12]}"
        place.write(trial, b"")
        place.remove(trial)


def _kept_vocabulary(place: Folder) -> Path | None:
    """The file of this machine with the vocabulary that a run keeps, if it keeps one; brought here if it is in S3."""
    try:
        entry = place.entry(TOKENIZER)
    except (FileNotFoundError, NotADirectoryError):
        return None
    if not place.remote:
        return Path(place.absolute().path(TOKENIZER))
    version = hashlib.sha256(f"{place} {entry}".encode()).hexdigest()[:16]
    file = private_folder("runs") / f"vocabulary-{version}" / TOKENIZER
    if not file.exists():
        write_atomically(file, place.read(TOKENIZER))
    return file


def differences(stored: Config, given: Config) -> list[tuple[str, Any, Any]]:
    """Settings by dotted key, with both values, that differ and change data, model or updates."""
    everything = _all_differences(stored, given)
    return [one for one in everything if not one[0].startswith(_FREE) and not _FREE_IN_MIXTURE.fullmatch(one[0])]


def _all_differences(stored: Config, given: Config) -> list[tuple[str, Any, Any]]:
    before, now = (
        dict(_leaves(_with_vocabulary(one.model_dump(mode="json"), one.data.vocabulary_name)))
        for one in (stored, given)
    )
    everything = dict.fromkeys([*now, *before])
    return [(key, before.get(key), now.get(key)) for key in everything if now.get(key) != before.get(key)]


def _with_vocabulary(tree: dict[str, Any], name: str) -> dict[str, Any]:
    """The tree of a configuration whose data, all sets of a mixture, have the vocabulary called `name`."""
    data = {**tree["data"], "vocabulary": name}
    data["mixture"] = [{**item, "vocabulary": name} for item in data.get("mixture") or ()]
    return {**tree, "data": data}


def _leaves(tree: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, list) and value and all(isinstance(item, dict) for item in value):
            value = dict(enumerate(value))
        if isinstance(value, dict):
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def _rows(lines: bytes) -> Iterator[dict[str, Any]]:
    """Rows of a JSON-lines file; a torn last line (its writer was killed) is passed over."""
    for line in lines.splitlines(keepends=True):
        if line.endswith(b"\n"):
            yield json.loads(line)


def rewind(path: Path, step: int) -> None:
    """Cut `metrics.jsonl` back to `step`: later rows are of work that the resumed run does again."""
    if not path.exists():
        return
    with alone(path.parent):
        kept = [row for row in _rows(path.read_bytes()) if row["step"] <= step]
        temporary = path.with_suffix(".tmp")
        temporary.write_text("".join(json.dumps(row) + "\n" for row in kept), encoding="utf-8")
        os.replace(temporary, path)


def add_metrics(path: Path, row: dict[str, Any]) -> None:
    """Append a row to `metrics.jsonl`, of somebody else than the workers, who may be about to cut it back."""
    with alone(path.parent), path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")


@dataclass(frozen=True)
class Loaded:
    """A trained model, ready to sample and evaluate."""

    model: MaskedDiffusion
    vocabulary: Vocabulary
    config: Config
    step: int
    weights_hash: str
    path: Path | Folder  # of its run
    averaged: bool = False  # whether the weights are the moving average
    model_version: int | None = None  # in the registry, of what comes from there


def load_model(
    path: Place,
    *,
    ema: bool = True,
    compute: torch.dtype = torch.float32,
    report: Callable[[str], None] = print,
    step: int | None = None,
) -> Loaded:
    """The model of a run's newest sound checkpoint, or of that of a step, in eval mode, with averaged weights if there
    are any.

    Raises:
        UserError: not a run, or no (such) sound checkpoint in it.
    """
    run = Run(path)
    checkpoint = checkpoints.newest(run.checkpoints, report, step)
    if checkpoint is None and step is not None:
        steps = sorted({int(one.name[5:13]) for one in checkpoints.committed_in(run.checkpoints)})
        known = ", ".join(map(str, steps)) or "none"
        raise UserError(f"run {run.place} has no sound checkpoint of step {step}; there are those of {known}")
    if checkpoint is None:
        raise UserError(f"run {run.place} has no sound checkpoint yet")
    kind = "ema" if ema and "ema" in checkpoint.kinds else "weights"
    model = build(run.config.model, compute=compute)
    model.load_state_dict(checkpoint.tensors(kind))
    model.saved = saved.Saved.of(read_saved(run.place))
    return Loaded(
        model=model.eval(),
        vocabulary=run.config.data.tokens,
        config=run.config,
        step=checkpoint.step,
        weights_hash=checkpoint.weights_hash(kind),
        path=location(run.place.url),
        averaged=kind == "ema",
    )


def read_saved(place: Place) -> list[saved.SavedSettings]:
    """The sampling settings that are kept in the folder `grids` of a run or an exported model; UserError if damaged."""
    folder = Folder(place)
    files = [name for name in folder.list(saved.FOLDER) if name.endswith(".json")]
    return [saved.SavedSettings.read(folder.path(name), folder.read(name)) for name in files]


def export(path: Place, folder: str | Path, *, ema: bool = True, report: Callable[[str], None] = print) -> Path:
    """Write the model of a run's newest sound checkpoint to a new `folder` that `md4.load` reads; returns it.

    Raises:
        UserError: not a run, no sound checkpoint in it, or the folder is taken.
    """
    loaded = load_model(path, ema=ema, report=report)
    return weights.export(
        folder,
        loaded.model,
        loaded.config.model,
        sampling=loaded.config.sampling,
        vocabulary=loaded.vocabulary.name,
        symbols=getattr(loaded.vocabulary, "symbols", None),
        tokenizer=loaded.vocabulary.content if isinstance(loaded.vocabulary, Trained) else None,
        saved=read_saved(path),
        source={
            "run": loaded.config.name,
            "step": loaded.step,
            "averaged": loaded.averaged,
            "weights_hash": loaded.weights_hash,
        },
    )
