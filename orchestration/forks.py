"""A run that begins where another one was: `train.start_from` names a run, or one of its checkpoints.

The new run goes on with the weights, their average and the moments, and with the next rows of the same data, at the
step of the checkpoint. What may differ are the settings that make another training of the same network: the optimizer,
dropout, the masking schedule, the density of times, and the number of steps. The checkpoint is found once, when the run
is made, and stands in its configuration and, as `origin`, in each of its checkpoints.
"""

from collections.abc import Callable
from typing import Any

from md4.errors import UserError
from orchestration import checkpoints
from orchestration.checkpoints import Checkpoint
from orchestration.config import Config, validate
from orchestration.runs import CONFIG, Run, differences
from pipelines.storage import Folder

CHANGEABLE = ("optimizer.", "model.network.dropout", "model.label_dropout", "model.schedule", "model.times.")
_OWN = ("name", "train.start_from", "train.steps")


def pinned(config: Config, resume: bool, report: Callable[[str], None]) -> Config:
    """`config` with `train.start_from` as the absolute place of one checkpoint; as it is, if nothing is given.

    Of a run that is resumed: the one that it began from.

    Raises:
        UserError: nothing sound lies there, it is of another network or other data, or the run began elsewhere.
    """
    given = config.train.start_from
    if resume:
        began = Run(config.place).config.train.start_from
        if given is not None and not f"{began or ''}/".startswith(f"{Folder(given).absolute().url.rstrip('/')}/"):
            raise UserError(f"train.start_from={given}: run {config.place} began from {began or 'nothing'}")
        return _with_origin(config, began)
    if given is None:
        return config
    found = _find(Folder(given), report)
    stored = validate(found.manifest["config"])
    differ = [one for one in differences(stored, config) if not one[0].startswith((*_OWN, *CHANGEABLE))]
    if differ:
        lines = [f"{key}: it has {before!r}, given is {now!r}" for key, before, now in differ]
        raise UserError(f"train.start_from={given}: a run can't go on from there with\n" + "\n".join(lines))
    if found.step >= config.train.steps:
        raise UserError(
            f"train.start_from={given} is at step {found.step}: with train.steps={config.train.steps} there is nothing "
            "to train"
        )
    report(f"beginning from {found.path} at step {found.step}")
    return _with_origin(config, found.path.absolute().url)


def _with_origin(config: Config, place: str | None) -> Config:
    return config.model_copy(update={"train": config.train.model_copy(update={"start_from": place})})


def _find(place: Folder, report: Callable[[str], None]) -> Checkpoint:
    """The sound checkpoint in `place`, or the newest one of the run there."""
    if place.exists(checkpoints.MANIFEST):
        checkpoint = checkpoints.read(place)
        checkpoint.verify()
        return checkpoint
    if not place.exists(CONFIG):
        raise UserError(f"train.start_from={place}: neither a run's folder nor a checkpoint's lies there")
    newest = checkpoints.newest(Run(place).checkpoints, report)
    if newest is None:
        raise UserError(f"train.start_from={place}: the run has no sound checkpoint yet")
    return newest


def origin(checkpoint: Checkpoint) -> dict[str, Any]:
    """What a run that begins from `checkpoint` keeps of it, and of what that one began from."""
    facts = {"run": checkpoint.manifest["run"], "step": checkpoint.step, "checkpoint": checkpoint.path.url}
    return facts | {
        "weights_hash": checkpoint.weights_hash("weights"),
        "origin": checkpoint.manifest.get("origin"),
    }


def first_step(config: Config) -> int:
    """Updates that a run did not make itself; of a configuration that is `pinned`."""
    place = config.train.start_from
    return 0 if place is None else checkpoints.step_of(Folder(place))
