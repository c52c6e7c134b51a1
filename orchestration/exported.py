"""An exported folder (`md4.weights`), or a version in the registry, which is one, as a model ready to sample: as
`orchestration.runs.load_model` gives it of a run."""

import re
from pathlib import Path
from typing import Any

from md4 import weights
from md4.errors import UserError
from md4.weights import Pretrained
from orchestration.config import validate
from orchestration.runs import Loaded
from pipelines.storage import Folder, Place
from pipelines.vocabularies import Vocabulary, vocabulary


def is_exported(folder: Folder) -> bool:
    """Is this an exported folder of this machine, and not a run's?"""
    return not folder.remote and folder.exists(weights.CONFIG)


def words_of(found: Pretrained, path: Place) -> Vocabulary | None:
    """The vocabulary of the model's tokens, if its folder says what it is."""
    return None if found.card.vocabulary is None else vocabulary(found.card.vocabulary, path)


def step_of(found: Pretrained) -> int | None:
    """The training step of the weights, where the folder says it."""
    step = found.card.source.get("step")
    return step if isinstance(step, int) else None


def _name(path: Path) -> str:
    """The folder's, with hyphens for what the name of a run can't have in it."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", path.absolute().name).lstrip("-._") or "exported"


def loaded(found: Pretrained, path: Path) -> Loaded:
    """The model with a configuration that says of data and training no more than the folder does.

    UserError if it doesn't say what its tokens are.
    """
    words = words_of(found, path)
    if words is None:
        raise UserError(f"{path} doesn't say what the model's tokens are: it can't be sampled in words")
    model = found.card.model
    data: dict[str, Any] = {"source": "text", "vocabulary": found.card.vocabulary, "length": model.length}
    if model.shape is not None:
        data = {"source": "npz", "shape": model.shape, "levels": words.size}
    elif found.card.tokenizer_sha256 is not None:
        data["vocabulary"] = str(path.absolute())
    config = validate(
        {
            "name": _name(path),
            "data": data,
            "model": model.model_dump(mode="json"),
            "train": {"steps": max(1, step_of(found) or 1), "batch_size": 1, "slices": 1},
            "evaluation": {"estimator": "continuous" if model.objective == "genmd4" else "mask_count"},
            "sampling": found.card.sampling.model_dump(mode="json"),
        }
    )
    return Loaded(
        model=found.model,
        vocabulary=words,
        config=config,
        step=step_of(found) or 0,
        weights_hash=found.card.sha256[:16],
        path=path,
        averaged=bool(found.card.source.get("averaged", False)),
    )
