"""How a run is doing: read from its folder alone, whatever has become of its processes."""

import json
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from rich.table import Table
from rich.text import Text

from orchestration import checkpoints, progress
from orchestration.events import Events
from orchestration.goodput import Goodput
from orchestration.runs import Run
from pipelines.storage import Place

ALIVE_SECONDS = 15.0  # a first worker that lives says so every second; between two groups Ray notes its states
_DELAY_SECONDS = 20.0  # after which it is seen in S3, at most, if S3 is well
_EVENTS = 5
_HANG_SECONDS = 20.0  # at one place, from which on it is told


@dataclass(frozen=True)
class Status:
    """What is to be said of a run. Times in s since 1970; None where nothing is known."""

    run: str
    state: str  # waiting, running, restarting, finished, stopped, failed, silent
    why: str | None  # of that state
    step: int
    steps: int
    eta_seconds: float | None
    unit: str
    loss: float | None
    losses: list[float]  # all of them, for a curve
    loss_by_time: list[float | None]
    validation: float | None
    mask_ratio: float | None
    gradient_norm: float | None
    tokens_per_second: float | None
    seconds_per_step: float | None
    tflops: float | None
    mfu: float | None
    data_wait: float | None
    account: dict[str, Any] | None  # goodput, restarts, lost_steps, seconds by cause
    skipped: int
    workers: int | None
    checkpoint: str | None
    checkpoint_step: int | None
    checkpoint_age: float | None
    last_sign: float | None
    events: list[dict[str, Any]]

    @property
    def over(self) -> bool:
        """Nothing more will come, unless somebody resumes the run."""
        return self.state in ("finished", "stopped", "failed")

    def to_json(self) -> str:
        tree = asdict(self)
        tree.pop("losses")
        return json.dumps(tree, indent=1)


def status(folder: Place, now: float | None = None) -> Status:
    """Of the run in `folder`; UserError if there is none. now: s since 1970."""
    run = Run(folder)
    now = time.time() if now is None else now
    events, place = Events(run.place).read(), progress.read(run.place)
    rows = run.metrics()
    train = [row for row in rows if row["kind"] == "train"]
    last: Mapping[str, Any] = train[-1] if train else {}
    evaluations = [row for row in rows if row["kind"] == "evaluation"]
    steps = run.config.train.steps
    step = max(place["step"] if place else 0, last.get("step", 0))
    signs = [one["time"] for one in (place, events[-1] if events else None, rows[-1] if rows else None) if one]
    last_sign = max(signs, default=None)
    state, why = _state(events, place, last_sign, now, ALIVE_SECONDS + (_DELAY_SECONDS if run.place.remote else 0))
    per_step = last.get("seconds_per_step")
    goodput = Goodput.of(events, place)
    # A run that is over or silent is judged by the time until its last sign of life.
    end = place["time"] if place and state != "running" else now
    found = checkpoints.committed_in(run.checkpoints)
    kept = [row for row in rows if row["kind"] == "checkpoint"]
    newest = found[0].name if found else None
    told = next((row["time"] for row in reversed(kept) if row["path"] == newest), None)
    groups = [event["workers"] for event in events if event["kind"] == "workers"]
    return Status(
        run=str(run.place),
        state=state,
        why=why,
        step=step,
        steps=steps,
        eta_seconds=None if per_step is None or state != "running" else (steps - step) * per_step,
        unit="bits/dim" if run.config.data.has_images else "bits/token",
        loss=last.get("bits_per_token"),
        losses=[row["bits_per_token"] for row in train if row["bits_per_token"] is not None],
        loss_by_time=last.get("bits_by_time", []),
        validation=evaluations[-1]["bits_per_token"] if evaluations else None,
        mask_ratio=last.get("mask_ratio"),
        gradient_norm=last.get("gradient_norm"),
        tokens_per_second=last.get("tokens_per_second"),
        seconds_per_step=per_step,
        tflops=last.get("tflops"),
        mfu=last.get("mfu"),
        data_wait=last.get("data_wait"),
        account=None if goodput is None else goodput.at(end),
        skipped=place.get("skipped", 0) if place else 0,
        workers=groups[-1] if groups else None,
        checkpoint=newest,
        checkpoint_step=int(newest[5:13]) if newest else None,
        checkpoint_age=None if told is None else now - told,
        last_sign=last_sign,
        events=events[-_EVENTS:],
    )


def _state(
    events: list[dict[str, Any]], place: dict[str, Any] | None, last_sign: float | None, now: float, alive: float
) -> tuple[str, str | None]:
    """The state of a run, and what there is to say of it. alive: s for which a sign of life is one."""
    if last_sign is None:
        return "waiting", "nothing has happened yet"
    since = max(
        (i for i, event in enumerate(events) if event["kind"] == "driver" and event["did"] == "began"), default=0
    )
    recent = events[since:]
    ray = next((event["state"] for event in reversed(recent) if event["kind"] == "state"), None)
    if stopped := [event for event in recent if event["kind"] == "stopped"]:
        return "stopped", stopped[-1]["reason"]
    if ray == "FINISHED":
        return "finished", None
    if ray == "ERRORED":
        return "failed", "its workers failed too often; md4 train ... --resume goes on from the last checkpoint"
    quiet = now - last_sign
    if quiet > alive:
        return "silent", f"nothing has happened for {clock(quiet)}: if its processes are gone, resume it"
    if place is None or now - place["time"] > alive:
        return "restarting" if place else "waiting", f"the workers are being started ({ray or 'no state yet'})"
    still = now - place["moved"]
    return "running", f"at {place['phase']} for {clock(still)}" if still > _HANG_SECONDS else None


def clock(seconds: float) -> str:
    """12 s, 3:25, 1:02:03."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"


def table(found: Status) -> Table:
    """The figures as a table of two columns."""
    grid = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    grid.add_column(style="dim", no_wrap=True)
    grid.add_column(overflow="fold")
    for name, value in lines(found):
        grid.add_row(name, Text(value))
    return grid


def lines(found: Status) -> list[tuple[str, str]]:
    """What the table says."""
    rows = [("run", found.run), ("state", found.state + (f": {found.why}" if found.why else ""))]
    left = f", {clock(found.eta_seconds)} left" if found.eta_seconds is not None else ""
    rows.append(("step", f"{found.step:,} of {found.steps:,} ({found.step / found.steps:.0%}){left}"))
    if found.loss is not None:
        norm = "" if found.gradient_norm is None else f", gradient {found.gradient_norm:.3f}"
        rows.append(("loss", f"{found.loss:.4f} {found.unit}, {found.mask_ratio:.0%} hidden{norm}"))
    if any(value is not None for value in found.loss_by_time):
        rows.append(("by time", " ".join("-" if v is None else f"{v:.2f}" for v in found.loss_by_time)))
    if found.validation is not None:
        rows.append(("validation", f"<= {found.validation:.4f} {found.unit}"))
    if found.tokens_per_second is not None and found.seconds_per_step is not None:
        mfu = "" if found.mfu is None else f", {found.mfu:.1%} of the devices"
        rows.append(
            (
                "speed",
                f"{found.tokens_per_second:,.0f} tokens/s, {found.seconds_per_step:.3f} s a step, "
                f"{found.tflops:.3g} TFLOP/s{mfu}, {found.data_wait:.1%} waiting for data",
            )
        )
    if found.account is not None:
        account, seconds = found.account, found.account["seconds"]
        skipped = f", {found.skipped} skipped" if found.skipped else ""
        rows.append(("goodput", f"{account['goodput']:.1%} of {clock(seconds['total'])}"))
        parts = [f"{cause} {clock(seconds[cause])}" for cause in seconds if cause != "total" and seconds[cause] >= 0.5]
        rows.append(("time", ", ".join(parts) or "-"))
        rows.append(("restarts", f"{account['restarts']}, {account['lost_steps']} steps lost{skipped}"))
    if found.workers is not None:
        rows.append(("workers", str(found.workers)))
    if found.checkpoint is not None:
        age = "" if found.checkpoint_age is None else f", {clock(found.checkpoint_age)} old"
        rows.append(("checkpoint", f"{found.checkpoint}{age}"))
    for event in found.events:
        rows.append(("", f"{time.strftime('%H:%M:%S', time.localtime(event['time']))} {tell(event)}"))
    return rows


def tell(event: Mapping[str, Any]) -> str:
    """An event in words."""
    kind = event["kind"]
    if kind == "driver":
        return f"md4 train {event['did']}"
    if kind == "state":
        return f"Ray Train: {event['state'].lower()}"
    if kind == "workers":
        lost = f", {event['lost']} steps lost" if event.get("lost") else ""
        return f"{event['workers']} worker(s) from step {event['step']}{lost}"
    if kind == "hang":
        return f"worker {event['worker']} gave up: {event['reason']}"
    if kind == "spike":
        return f"step {event['step']} {event['action']}: {event['reason']}"
    if kind == "stopped":
        return f"stopped at step {event['step']}: {event['reason']}"
    facts = ", ".join(f"{name} {value}" for name, value in event.items() if name not in ("kind", "time"))
    return f"{kind}: {facts}" if facts else kind
