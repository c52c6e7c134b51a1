"""Where a version's weights come from, as far as its run's folder or the exported folder says."""

import json
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from md4.errors import UserError
from md4.weights import Card
from pipelines.config import DataConfig
from pipelines.storage import Folder


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class DataSet(_Part):
    """A prepared set that the run was trained on."""

    name: str
    fingerprint: str | None = None
    rows: int | None = Field(default=None, description="of its training split")


class Lineage(_Part):
    """What `lineage.json` says. None: it is not known."""

    source: str = Field(description="the folder that was added, as it was called")
    run: str | None = None
    step: int | None = None
    averaged: bool | None = Field(default=None, description="are the weights the moving average?")
    weights_hash: str | None = Field(
        default=None, description="of the checkpoint's tensors, as the run's reports call them"
    )
    weights_sha256: str = Field(description="of model.safetensors")
    trained_at: str | None = Field(default=None, description="when the checkpoint was written")
    seed: int | None = None
    data: tuple[DataSet, ...] = ()
    code_version: str | None = Field(default=None, description="of the program that trained")
    exported_by: str | None = Field(default=None, description="version of the program that wrote the folder")
    config: dict[str, Any] | None = Field(default=None, description="the run's resolved configuration")
    parent: dict[str, Any] | None = Field(default=None, description="the checkpoint of another run that it began from")


def of_export(source: str, card: Card) -> Lineage:
    """What an exported folder says of itself."""
    facts = card.source
    return Lineage(
        source=source,
        run=facts.get("run"),
        step=facts.get("step"),
        averaged=facts.get("averaged"),
        weights_hash=facts.get("weights_hash"),
        weights_sha256=card.sha256,
        exported_by=card.code_version,
    )


def of_run(source: str, card: Card) -> Lineage:
    """What a run says of the checkpoint that `card` was exported from."""
    from orchestration import checkpoints
    from orchestration.runs import Run

    base, run = of_export(source, card), Run(source)
    kind = "ema" if base.averaged else "weights"
    for folder in checkpoints.committed_in(run.checkpoints):
        try:
            found = checkpoints.read(folder)
        except UserError:
            continue  # a damaged one, which was not exported
        if found.step == base.step and kind in found.kinds and found.weights_hash(kind) == base.weights_hash:
            return base.model_copy(update=_checkpoint_facts(found.manifest, run.config.data))
    raise UserError(f"{source}: its checkpoint of step {base.step} was removed meanwhile: add it again")


def _checkpoint_facts(manifest: dict[str, Any], data: DataConfig) -> dict[str, Any]:
    names = data.names() if data.mixture else [data.source]
    sets = manifest.get("order", {}).get("sets") or [{}] * len(names)
    return {
        "trained_at": manifest.get("created"),
        "seed": manifest.get("seed"),
        "data": tuple(
            DataSet(name=name, fingerprint=one.get("fingerprint"), rows=one.get("rows"))
            for name, one in zip(names, sets, strict=True)
        ),
        "code_version": manifest.get("code_version"),
        "config": manifest["config"],
        "parent": manifest.get("origin"),
    }


def reports(folder: Folder, below: str, hashes: tuple[str, ...]) -> dict[str, bytes]:
    """The reports in a folder below `folder` that were made of weights with one of these hashes, by file name."""
    found = {}
    for path in folder.list(below):
        name = path.removeprefix(f"{below}/")
        if "/" in name or not name.endswith(".json"):
            continue
        data = folder.read(path)
        try:
            tree = json.loads(data)
        except ValueError:
            continue
        model = tree.get("model") if isinstance(tree, dict) else None
        if isinstance(model, dict) and model.get("weights_hash") in hashes:
            found[name] = data
    return found
