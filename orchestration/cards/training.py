"""How a run was trained, from its configuration, its metrics, its events and its checkpoint."""

import statistics
from typing import Any

from orchestration.cards.facts import TrainingFacts
from orchestration.checkpoints import newest
from orchestration.events import Events
from orchestration.goodput import Goodput
from orchestration.progress import read as read_progress
from orchestration.runs import Loaded, Run


def training_of(run: Run, loaded: Loaded) -> TrainingFacts:
    """What is known of the training up to the step of the loaded model."""
    config = loaded.config
    rows = [row for row in run.metrics("train") if row["step"] <= loaded.step]
    starts = run.metrics("start")
    account, progress = None, read_progress(run.place)
    if (goodput := Goodput.of(Events(run.place).read(), progress)) is not None and progress is not None:
        account = goodput.at(progress["time"])
    checkpoint = newest(run.checkpoints, lambda _: None)
    manifest = {} if checkpoint is None else checkpoint.manifest
    return TrainingFacts(
        steps=loaded.step,
        batch_size=config.train.batch_size,
        tokens=loaded.step * config.train.batch_size * config.model.length,
        epochs=rows[-1].get("epochs") if rows else None,
        optimizer=config.optimizer.model_dump(mode="json", exclude_none=True),
        seed=config.seed,
        workers=starts[-1].get("workers") if starts else None,
        precision=starts[-1].get("compute") if starts else None,
        averaged=loaded.averaged,
        seconds=None if account is None else account["seconds"]["total"],
        productive=None if account is None else account["goodput"],
        tokens_per_second=statistics.median(row["tokens_per_second"] for row in rows) if rows else None,
        operations=_operations(rows),
        restarts=None if account is None else account["restarts"],
        skipped_steps=rows[-1].get("skipped_steps") if rows else None,
        code_version=manifest.get("code_version"),
        ended=manifest.get("created"),
    )


def _operations(rows: list[dict[str, Any]]) -> float | None:
    """Floating-point operations of logged steps: rate times time of each stretch between two rows."""
    if not rows or any(row.get("tflops") is None for row in rows):
        return None
    before = [0, *(row["step"] for row in rows)]
    return 1e12 * sum(
        row["tflops"] * row["seconds_per_step"] * (row["step"] - last)
        for row, last in zip(rows, before[:-1], strict=True)
    )
