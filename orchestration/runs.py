"""A run's folder (contract C6): what is in it, how it is made, continued and read.

runs/NAME/config.yaml  metrics.jsonl  checkpoints/  samples/  reports/  grids/

A run whose vocabulary is a file keeps a copy of it, `tokenizer.json`, and uses that: the file may move or change.
"""

import json
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from md4 import weights
from md4.errors import UserError
from md4.model import build
from md4.objectives import MaskedDiffusion
from md4.samplers.saved import Saved, read_folder
from orchestration import checkpoints
from orchestration.config import Config, read_yaml, validate
from pipelines.storage import Folder, alone
from pipelines.vocabularies import TOKENIZER, Trained, Vocabulary, keep

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

    def __init__(self, path: str | Path):
        self.path = Path(path)
        if not (self.path / "config.yaml").is_file():
            near = sorted(p.parent.name for p in self.path.parent.glob("*/config.yaml"))
            known = f"; runs there: {', '.join(near)}" if near else ""
            raise UserError(f"{self.path} is not a run's folder (it has no config.yaml){known}")
        tree = read_yaml((self.path / "config.yaml").read_text("utf-8"), f"{self.path}/config.yaml")
        for part, names in _PAST.items():
            for name in names:
                tree.get(part, {}).pop(name, None)
        kept = self.path / TOKENIZER
        self.config: Config = validate(_with_vocabulary(tree, str(kept.absolute())) if kept.is_file() else tree)

    @property
    def checkpoints(self) -> Folder:
        """Its checkpoints, which move with the run unless they were put elsewhere."""
        return (
            Folder(self.path / "checkpoints") if self.config.checkpoint.directory is None else self.config.checkpoints
        )

    @property
    def reports(self) -> Path:
        return self.path / "reports"

    @property
    def samples(self) -> Path:
        return self.path / "samples"

    @property
    def metrics_file(self) -> Path:
        return self.path / "metrics.jsonl"

    def metrics(self, kind: str | None = None) -> list[dict[str, Any]]:
        """Rows of `metrics.jsonl`, of one kind ("train", "evaluation", "checkpoint", "suite") or all."""
        return [row for row in _rows(self.metrics_file) if kind is None or row["kind"] == kind]

    @classmethod
    def create(cls, config: Config) -> "Run":
        """Make the folder of a new run; UserError when it is taken (run folders are never shared)."""
        path = config.directory
        if (path / "config.yaml").exists():
            raise UserError(f"run {path} exists already: continue it with --resume, or choose another name=...")
        path.mkdir(parents=True, exist_ok=True)
        keep(config.data.tokens, path)
        cls._write_config(path, config)
        return cls(path)

    @classmethod
    def resume(cls, config: Config, report: Callable[[str], None]) -> "Run":
        """The existing run of `config`, to be continued; its stored configuration must agree where it matters."""
        run = cls(config.directory)
        stored, given = (
            dict(_leaves(_with_vocabulary(c.model_dump(mode="json"), c.data.vocabulary_name)))
            for c in (run.config, config)
        )
        changed = [key for key in dict.fromkeys([*given, *stored]) if given.get(key) != stored.get(key)]
        fixed = [key for key in changed if not key.startswith(_FREE) and not _FREE_IN_MIXTURE.fullmatch(key)]
        if fixed:
            lines = [f"{key}: the run has {stored.get(key)!r}, given is {given.get(key)!r}" for key in fixed]
            raise UserError(f"run {run.path} can't be resumed with another configuration:\n" + "\n".join(lines))
        if changed:
            report(f"resuming with changed {', '.join(changed)}")
            cls._write_config(run.path, config)
        return cls(run.path)

    @staticmethod
    def _write_config(path: Path, config: Config) -> None:
        temporary = path / ".config.yaml"
        temporary.write_text(config.to_yaml(), encoding="utf-8")
        temporary.rename(path / "config.yaml")


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


def _rows(path: Path) -> Iterator[dict[str, Any]]:
    """Rows of a JSON-lines file; a torn last line (its writer was killed) is passed over."""
    if not path.exists():
        return
    with path.open(encoding="utf-8") as file:
        for line in file:
            if line.endswith("\n"):
                yield json.loads(line)


def rewind(path: Path, step: int) -> None:
    """Cut `metrics.jsonl` back to `step`: later rows are of work that the resumed run does again."""
    if not path.exists():
        return
    with alone(path.parent):
        kept = [row for row in _rows(path) if row["step"] <= step]
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
    path: Path
    averaged: bool = False  # whether the weights are the moving average
    model_version: int | None = None  # in the registry, of what comes from there


def load_model(
    path: str | Path,
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
        raise UserError(f"run {run.path} has no sound checkpoint of step {step}; there are those of {known}")
    if checkpoint is None:
        raise UserError(f"run {run.path} has no sound checkpoint yet")
    kind = "ema" if ema and "ema" in checkpoint.kinds else "weights"
    model = build(run.config.model, compute=compute)
    model.load_state_dict(checkpoint.tensors(kind))
    model.saved = Saved.of(read_folder(run.path))
    return Loaded(
        model=model.eval(),
        vocabulary=run.config.data.tokens,
        config=run.config,
        step=checkpoint.step,
        weights_hash=checkpoint.weights_hash(kind),
        path=run.path,
        averaged=kind == "ema",
    )


def export(path: str | Path, folder: str | Path, *, ema: bool = True, report: Callable[[str], None] = print) -> Path:
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
        saved=read_folder(loaded.path),
        source={
            "run": loaded.config.name,
            "step": loaded.step,
            "averaged": loaded.averaged,
            "weights_hash": loaded.weights_hash,
        },
    )
