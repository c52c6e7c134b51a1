"""How many trials a cluster can hold at once, with the numbers.

Tune reserves nothing for the trainers that its trials start: those ask for their workers themselves, all at once (a
placement group). Trials that held logical CPUs of their own while they wait for those of their workers could take them
from each other for ever. Hence a trial's own process takes none, as Ray Train's controller and the reading tasks take
none: what a trial holds is its workers, all of them or none, and as many trials run as have room for their workers.
"""

import os
from dataclasses import dataclass
from typing import Any

from md4.errors import UserError
from orchestration.config import Config
from orchestration.train import scaling


@dataclass(frozen=True)
class Packing:
    """So many trials at a time, and why."""

    need: dict[str, float]  # of one trial
    workers: int
    room: dict[str, float]  # of the cluster
    fits: int
    asked: int | None
    concurrent: int

    def describe(self) -> str:
        need, room = (", ".join(f"{count:g} {name}" for name, count in one.items()) for one in (self.need, self.room))
        bound = f"; {self.asked} were asked for" if self.asked is not None and self.asked > self.concurrent else ""
        return (
            f"a trial needs {need} for its {self.workers} worker(s); its driver, controller and readers take none; "
            f"there are {room}: {self.fits} fit, {self.concurrent} at a time{bound}"
        )


def need(config: Config) -> dict[str, float]:
    """Logical resources that a trial's workers ask Ray for."""
    return {name: float(count) for name, count in scaling(config).total_resources.items()}


def pack(config: Config, room: dict[str, float], asked: int | None, trials: int, population: bool) -> Packing:
    """How many trials of this layout run at a time.

    Args:
        room: logical resources, CPU, GPU and others, of the whole cluster.
        asked: `search.concurrent`.
        population: all trials have to run at once.

    Raises:
        UserError: one trial does not fit, or a population does not, with the numbers.
    """
    wanted = need(config)
    for name, count in wanted.items():
        if room.get(name, 0.0) < count:
            raise UserError(
                f"a trial needs {count:g} {name} for train.workers={config.train.workers}, the cluster has "
                f"{room.get(name, 0.0):g}: it would wait for ever. Take fewer workers, or a larger cluster"
            )
    fits = min(int(room[name] / count) for name, count in wanted.items())
    if population and min(fits, asked or fits) < trials:
        limit = f"search.concurrent={asked}" if asked is not None and asked < trials else f"{fits} fit"
        each = ", ".join(f"{count:g} {name}" for name, count in wanted.items())
        raise UserError(
            f"pbt trains its {trials} trials at the same time, {each} each, and {limit}: take fewer search.trials, "
            "fewer train.workers, or a larger cluster"
        )
    held = {name: room[name] for name in wanted}
    return Packing(wanted, config.train.most_workers, held, fits, asked, min(fits, asked or fits, trials))


def local_room(config: Config, asked: int | None, trials: int, population: bool) -> dict[str, float]:
    """Logical resources of the private cluster that a search starts where there is none.

    Its logical CPUs are what the trials ask for, or, if nothing is said, as many as there are cores for; its GPUs are
    this machine's.
    """
    import torch

    cores = os.cpu_count() or 1
    each = config.train.most_workers * config.train.threads
    wanted = trials if population else min(trials, asked or max(1, cores // each))
    room = {"CPU": float(max(2, wanted * config.train.most_workers))}
    if torch.cuda.is_available():
        room["GPU"] = float(torch.cuda.device_count())
    return room


def cluster_room(ray: Any) -> dict[str, float]:
    """Of the cluster that this process is connected to."""
    return {name: float(count) for name, count in ray.cluster_resources().items()}
