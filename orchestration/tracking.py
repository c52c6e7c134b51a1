"""Where metrics go: one protocol, one small class for each backend.

`metrics.jsonl` in the run's folder is always written and is what everything else reads; TensorBoard and W&B are
copies for people who like them, Prometheus comes and asks.
"""

import json
import os
import uuid
from pathlib import Path
from typing import Any, Protocol

from md4.errors import UserError
from orchestration.config import Config
from orchestration.prometheus import Prometheus
from orchestration.runs import METRICS

Row = dict[str, Any]


class Tracker(Protocol):
    """Takes rows of metrics: `kind` ("train", "evaluation", "checkpoint", "suite"), `step`, and figures."""

    def log(self, row: Row) -> None: ...

    def close(self) -> None: ...


def _figures(row: Row) -> dict[str, float]:
    """The numbers of a row, named `kind/figure`."""
    figures = {}
    for name, value in row.items():
        parts = {f"{name}/{i}": part for i, part in enumerate(value)} if isinstance(value, list) else {name: value}
        figures |= {
            f"{row['kind']}/{key}": number
            for key, number in parts.items()
            if key != "step" and isinstance(number, int | float) and not isinstance(number, bool)
        }
    return figures


class JsonLines:
    """`metrics.jsonl`: one line a row, on the disk before `log` returns."""

    def __init__(self, path: Path):
        self._file = path.open("a", encoding="utf-8")

    def log(self, row: Row) -> None:
        self._file.write(json.dumps(row) + "\n")
        self._file.flush()

    def close(self) -> None:
        self._file.close()


class TensorBoard:
    """Event files below the run's `tensorboard/`."""

    def __init__(self, path: Path, first_step: int | None):
        from torch.utils.tensorboard import SummaryWriter

        # purge_step hides what an earlier attempt logged beyond the step that this one starts from, if it does.
        self._writer = SummaryWriter(str(path), purge_step=None if first_step is None else first_step + 1)

    def log(self, row: Row) -> None:
        for name, value in _figures(row).items():
            self._writer.add_scalar(name, value, row["step"])

    def close(self) -> None:
        self._writer.close()


class WeightsAndBiases:
    """One W&B run for the whole life of our run, in mode "offline" (no account, no network) or "online".

    Its id is drawn once and kept in the run's folder: whoever goes on with the run goes on with it there. (A name alone
    would mix a run with another one of that name, of last week or of a colleague.) Offline every start of workers has a
    folder of its own, as W&B wants it; they have one id, and `wandb sync` of all of them, in their order, makes one
    run. Steps that were lost and made again are in it twice: figures are drawn over `step`, not over W&B's own count.
    """

    def __init__(self, config: Config, path: Path):
        # W&B's helper process must die with this one: one inherited from a driver that uses W&B itself would go on
        # holding the run of a killed worker, and refuse the run to the next.
        os.environ.pop("WANDB_SERVICE", None)
        os.environ.setdefault("WANDB_SILENT", "true")
        import wandb

        file = path / "wandb" / "run-id"
        if not file.exists():
            file.parent.mkdir(exist_ok=True)
            file.write_text(f"{config.name}-{uuid.uuid4().hex[:8]}\n", encoding="utf-8")
        try:
            self._run = wandb.init(
                project=config.tracking.project,
                id=file.read_text("utf-8").strip(),
                name=config.name,
                resume="allow" if config.tracking.wandb == "online" else None,
                mode=config.tracking.wandb,
                dir=str(path),
                config=config.model_dump(mode="json"),
            )
        except wandb.Error as error:
            raise UserError(f"tracking.wandb={config.tracking.wandb!r}: {error}") from None
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")

    def log(self, row: Row) -> None:
        self._run.log({"step": row["step"], **_figures(row)})

    def close(self) -> None:
        self._run.finish()


class Trackers:
    """All the trackers a configuration asks for, as one; their files go into `folder`."""

    def __init__(self, config: Config, folder: Path, first_step: int):
        self._all: list[Tracker] = [JsonLines(folder / METRICS)]
        if config.tracking.tensorboard:
            self._all.append(TensorBoard(folder / "tensorboard", first_step))
        if config.tracking.wandb != "disabled":
            self._all.append(WeightsAndBiases(config, folder))
        if config.tracking.prometheus_port:
            self._all.append(Prometheus(config, config.tracking.prometheus_port))

    def log(self, row: Row) -> None:
        for tracker in self._all:
            tracker.log(row)

    def close(self) -> None:
        for tracker in self._all:
            tracker.close()
