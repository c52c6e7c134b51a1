"""The loop inside one Ray Train worker: stream -> loss -> DeepSpeed engine -> metrics, evaluation, checkpoints.

All workers run this function in step. What each computes follows from (configuration, seed, step, rank): the data by
`pipelines.stream`, times and masks by `md4.noise`. Only dropout depends on the layout, since each worker draws its own;
it is seeded by (seed, step, rank), so a resumed run repeats it exactly at the same number of workers.
"""

import json
import math
import os
import time
from collections.abc import Iterator
from contextlib import suppress
from functools import cached_property
from typing import Any, cast

import numpy as np
import ray.train
import torch
import torch.distributed as dist
from ray.train.torch import get_device

from md4 import documents, noise
from md4.errors import UserError
from md4.flops import PassFlops
from md4.genmd4 import GenMD4
from md4.model import build, drop_labels
from md4.objectives import MaskedDiffusion, bits_per_token
from orchestration import checkpoints, forks, powers, progress, spares
from orchestration.checkpoint_writer import Retention, Writer
from orchestration.clock import Clock
from orchestration.devices import peak_flops
from orchestration.events import Events
from orchestration.goodput import Goodput, handover
from orchestration.leader import Leader, Orders
from orchestration.meter import Meter, Step
from orchestration.optimizer import AdamWithEma, learning_rate, parameter_groups
from orchestration.passes import Passes
from orchestration.policies import Preempted
from orchestration.run_mirror import Mirror
from orchestration.runs import METRICS, Run, rewind
from orchestration.spikes import Spikes
from orchestration.tracking import Trackers
from orchestration.validation import validate
from orchestration.watchdog import Watchdog
from orchestration.zero import EngineState, initialize
from pipelines.ledger import Ledger
from pipelines.manifest import Manifest
from pipelines.plan import plan
from pipelines.shards import ShardSet
from pipelines.storage import Folder, write_atomically
from pipelines.stream import Batch, batches

_EVENTS_SECONDS = 5.0  # that are waited, where it matters, for events to arrive in S3
_LAST_SECONDS = 10.0  # the same of what a run that fails has written last
_REST_LOOK_SECONDS = 0.1  # between two questions whether a group that waits for its end is to go on


def compute_dtype(precision: str, device: torch.device) -> torch.dtype:
    """What `train.precision` means on `device`: "auto" is bfloat16 where the hardware multiplies it natively."""
    if precision != "auto":
        return getattr(torch, precision)
    if device.type == "cuda":
        native = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        native = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return torch.bfloat16 if native else torch.float32


def run(job: dict[str, Any]) -> dict[str, Any]:
    """Entry point of each Ray Train worker.

    Args:
        job: paths or urls: `run`, the run's folder; `checkpoints`, where they go; `data`, the prepared data sets in the
            configuration's order.

    Returns:
        `{"step": last step}`, or `{"error": message}` when going on makes no sense and a restart would not help.
    """
    run = Run(job["run"])
    torch.set_num_threads(run.config.train.threads)
    try:
        training = _Training(run, Folder(job["checkpoints"]), [Folder(place) for place in job["data"]])
        return {"step": training.fit()}
    except Hopeless as error:
        return {"error": str(error)}


class Hopeless(Exception):
    """Going on makes no sense, and a restart would not help. Raised by all workers at the same step."""


class _Training:
    """One worker's part of a run, from the newest sound checkpoint to the last step."""

    def __init__(self, run: Run, place: Folder, data: list[Folder]):
        import deepspeed.ops
        from deepspeed import init_distributed

        self.run, self.config = run, run.config
        self.checkpoints, config = place, run.config
        context = ray.train.get_context()
        self.rank, self.world = context.get_world_rank(), context.get_world_size()
        self.device = get_device()
        self.data = data
        self.validation = ShardSet(data[0], "validation")
        self.seed, train = config.seed, config.train
        manifests = [Manifest.load(path) for path in data]
        self.order = plan(config.data, manifests, train.batch_size, train.slices, config.seed)
        self.end_of_rows = self.validation.end_of_rows  # the same for all sets of a mixture
        self.passes = Passes(train.batch_size, train.slices, self.world, train.micro_batch)

        # DeepSpeed would compile a shared-memory collective here (half a minute); gloo serves as well on CPUs.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        init_distributed(auto_mpi_discovery=False)

        dtype = compute_dtype(config.train.precision, self.device)
        model = build(config.model, compute=dtype, seed=config.seed).to(self.device)
        options = config.optimizer
        self.optimizer = AdamWithEma(
            parameter_groups(model, options),
            lr=options.learning_rate,
            betas=(options.beta1, options.beta2),
            eps=options.eps,
            ema=options.ema,
            fused=True,
        )
        self.engine = initialize(
            model,
            self.optimizer,
            stage=config.train.zero_stage,
            micro_batch=self.passes.size,
            accumulation=self.passes.count,
            clip_norm=options.clip_norm,
            offload=train.offload,
        )
        self.model = cast(MaskedDiffusion, self.engine.module)
        self.state = EngineState(self.engine, self.optimizer)
        self.events = Events(run.place, patience=0)  # a step waits for none of them
        if self.rank == 0:
            self.mirror = Mirror(run.place, self.events)
        self.meter, self.spikes, self.clock = Meter(), Spikes(train.spike), Clock()
        self.ledger = Ledger(self.order)
        kept = config.checkpoint
        self.writer = Writer(place, Retention(kept.keep, kept.keep_every, kept.keep_best), self._bring_metrics)
        self.evaluated: dict[str, float] | None = None  # the last evaluation, if it was of this step
        self.origin: dict[str, Any] | None = None  # the checkpoint of another run that this one began from
        self.step = self.saved = self._restore()
        self.leader = Leader(config)
        self.watchdog = Watchdog(config.train.patience, self._tell_hang)
        self.peak = train.peak_tflops * 1e12 if train.peak_tflops else peak_flops(self.device, dtype)
        self.flops: PassFlops | None = None  # of one pass, once there was one
        self.stopped: str | None = None  # why the run ends with this step, whose update was not made
        pids: list[Any] = [None] * self.world
        dist.all_gather_object(pids, os.getpid())
        if self.rank == 0:
            events, before = self.events.read(), progress.read(run.place)
            lost = handover(events, before, self.step, self.clock.spent(), time.time())
            self.events.add("workers", workers=self.world, step=self.step, pids=pids, **lost)
            self.events.flush(_EVENTS_SECONDS)
            self.goodput = cast(Goodput, Goodput.of(self.events.read(), None))
            self.progress = progress.Progress(self.mirror.folder, self.step, self._tell_progress)
            rewind(self.mirror.folder / METRICS, self.step)
            self.trackers = Trackers(config, self.mirror.folder, self.step)
            self._log("start", compute=str(dtype).removeprefix("torch."), workers=self.world, pid=os.getpid(), **lost)

    def _restore(self) -> int:
        """Load the newest sound checkpoint, or the one to start from, the same on every worker; 0 if there is none."""
        checkpoint = checkpoints.newest_together(self.checkpoints, self._tell_damage)
        own = checkpoint is not None
        if checkpoint is None:
            if self.config.train.start_from is None:
                return 0
            checkpoint = checkpoints.read_together(self.config.train.start_from)
        checkpoints.restore(checkpoint, self.state)
        ledger = checkpoint.manifest["ledger"]
        if own:
            self.origin = checkpoint.manifest.get("origin")
            self.meter = Meter(checkpoint.manifest["meter"])
            self.clock = Clock(checkpoint.manifest["spent"])
        else:  # what the other run measured since its last line of metrics, and its time, are its own
            self.origin = forks.origin(checkpoint)
            ledger = {**ledger, "digests": ""}
        self.spikes = Spikes(self.config.train.spike, checkpoint.manifest["spikes"])
        self.ledger = Ledger(self.order, ledger)
        return checkpoint.step

    def fit(self) -> int:
        """Train to the last step; returns it."""
        try:
            step = self._fit()
        except BaseException as error:
            if self.rank == 0:
                if isinstance(error, Hopeless):
                    self.events.add("stopped", step=self.step, reason=str(error))
                    self.progress.close()
                with suppress(UserError):  # what ends the run is the error
                    self.mirror.close(_LAST_SECONDS)
            self.events.flush(_EVENTS_SECONDS)
            raise
        if self.rank == 0:
            self._close_mirror()
        return step

    def _fit(self) -> int:
        train = self.config.train
        # Reading starts here and goes on beside the first evaluation.
        self.stream = stream = batches(self.data, "train", self.order, self.step, train.steps, self.rank, self.world)
        if self.step == 0 and self.config.evaluation.every:
            self._evaluate()
        self._start_timing()
        spare_at = time.monotonic() + spares.AFTER_SECONDS if train.spare else None
        for batch, waited in self._timed(stream):
            orders = self._update(batch, waited)
            self.watchdog.stepped()
            if spare_at is not None and time.monotonic() > spare_at:
                spares.ask()
                spare_at = None
            if self.stopped is not None:
                self._finish_writing()
                raise Hopeless(self.stopped)
            if self.rank == 0:
                self.progress.finished(self.step)
            if self.step % train.log_every == 0 or self.step == train.steps:
                self._report()
            if self._due(self.config.evaluation.every):
                self._evaluate()
            self.watchdog.at("the end", self.step)
            self._follow(orders)
        stream.close()
        self._finish_writing()
        self.watchdog.close()
        if self.rank == 0:
            self.progress.close()
            self.trackers.close()
        return self.step

    def _timed(self, stream: Iterator[Batch]) -> Iterator[tuple[Batch, float]]:
        """Batches, each with the seconds that this worker waited for it."""
        while True:
            self.watchdog.at("waiting for data", self.step + 1)
            began = time.perf_counter()
            with self.clock.spending("data"):
                batch = next(stream, None)
            if batch is None:
                return
            yield batch, time.perf_counter() - began

    def _start_timing(self) -> None:
        """The next line of metrics tells of time from now on."""
        self.meter.clear_timing()
        self.spent_before = self.clock.spent()

    def _tell_progress(self) -> dict[str, Any]:
        return {
            "phase": self.watchdog.place,
            "workers": self.world,
            "spent": self.clock.spent(),
            "skipped": self.spikes.skipped,
        }

    def _tell_damage(self, reason: str) -> None:
        """Note a checkpoint that is passed over; of the leader. What workers print, a driver does not show."""
        self.events.add("damaged", reason=reason)
        print(reason, flush=True)

    def _tell_hang(self, reason: str) -> None:
        self.events.add("hang", worker=self.rank, reason=reason)
        self.events.flush(_EVENTS_SECONDS)
        print(f"worker {self.rank} ends: {reason}", flush=True)

    def _bring_metrics(self) -> None:
        """A run that goes on from a checkpoint, wherever, finds the metrics up to it; of the leader."""
        self.mirror.push(METRICS)

    def _close_mirror(self) -> None:
        try:
            self.mirror.close()
        except UserError as error:
            raise Hopeless(f"step {self.step}, the last, is saved, but {error}") from None
        self.events.flush(_EVENTS_SECONDS)

    def _follow(self, orders: Orders) -> None:
        """Do what the leader has decided for the end of this step. *Collective.*"""
        if orders & Orders.SAVE:
            self._save()
        if orders & Orders.LOOK and (info := ray.train.get_preemption_info()):
            if not orders & Orders.SAVE:
                self._save()
            self.writer.finish()
            self._tell_news()
            if self.rank == 0:
                self.events.add("preempted", workers=info.preempted_ranks, step=self.step)
            raise Preempted(f"workers {info.preempted_ranks} will lose their machines; step {self.step} is saved")
        if orders & Orders.STOP:
            raise Hopeless(
                f"the last {self.config.checkpoint.failures} checkpoints could not be written: {self.leader.trouble}"
            )
        if orders & Orders.REST:
            self.writer.finish()
            self._tell_news()
            while self.leader.resting():
                self.watchdog.at("the rest before the end", self.step)
                time.sleep(_REST_LOOK_SECONDS)
        self._tell_news()

    def _finish_writing(self) -> None:
        """Wait for the checkpoint that is being written. *Collective.*"""
        with self.clock.spending("checkpoint"):
            self.writer.finish()
        self._tell_news()
        trouble = [self.leader.trouble]
        dist.broadcast_object_list(trouble, src=0)
        if trouble[0]:
            raise Hopeless(f"the last checkpoint could not be written: {trouble[0]}")

    def _tell_news(self) -> None:
        """Log what became of checkpoints; of the leader."""
        for news in self.writer.news():
            self.leader.heard(news)
            facts = {"path": news.path.name, "seconds": news.seconds, "blocked": news.blocked}
            kind = "checkpoint"
            if news.error is not None:
                kind, facts["error"] = "checkpoint failed", news.error
            self.trackers.log({"kind": kind, "step": news.step, "time": time.time(), **facts})

    def _due(self, every: int) -> bool:
        return bool(every) and (self.step % every == 0 or self.step == self.config.train.steps)

    def _update(self, batch: Batch, waited: float) -> Orders:
        """One optimizer update on this worker's slots of the global batch; returns the orders for the end of the step.

        All workers know the loss of the whole batch before any of them changes a weight. (DeepSpeed waits for the
        gradient's norm at that place, so it costs no device its time, except in stage 0.)
        """
        options, step = self.config.optimizer, self.step
        rate = learning_rate(step, options.learning_rate, options.warmup, self.config.train.steps, options.schedule)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        slots = torch.as_tensor(batch.slots, device=self.device)
        tokens = torch.as_tensor(batch.tokens, device=self.device)
        train = self.config.train
        length: torch.Tensor | int = tokens.shape[1]
        drawn = self.model.noise(self.seed, step, slots, train.batch_size, train.slices, length)
        if (labels := self._labels(batch.labels)) is not None:
            drawn["labels"] = drop_labels(labels, self.config.model.label_dropout, self.seed, step, slots)
        torch.manual_seed(noise.key(self.seed, "dropout", step, self.rank))

        if self.end_of_rows is not None:
            drawn["real"] = documents.no_padding(tokens, self.end_of_rows)
            length = self._tokens_of_a_row(drawn["real"])
        self.engine.train()
        self.meter.begin(waited, self.device)
        bounds, orders = [], Orders.NOTHING
        for number, (part, real) in enumerate(self.passes.parts(len(slots)), start=1):
            self.watchdog.at(f"pass {number}", step + 1)
            mine = part.to(self.device)
            loss = self._forward(tokens[mine], {name: values[mine] for name, values in drawn.items()})
            self.engine.backward(self.passes.loss(bits_per_token(loss.optimised, length), real))
            bounds.append(bits_per_token(loss.bound, length)[:real])
            weight = 1 if self.end_of_rows is None else length
            times = drawn["t"][mine][:real]
            self.meter.add(bounds[-1], loss.hidden[:real], times, weight, length, self.model.times.density(times))
            self.watchdog.at(f"the update after pass {number}", step + 1)
            if number == self.passes.count:
                orders = self._finish_update(batch, drawn["t"], torch.cat(bounds))
            else:
                self.engine.step()
        self.ledger.add(batch.step, batch.slots, batch.sets, batch.rows)
        self.step += 1
        self.evaluated = None
        return orders

    def _forward(self, tokens: torch.Tensor, drawn: dict[str, torch.Tensor]) -> Any:
        """The loss of one pass; of the first one the operations are counted."""
        if self.flops is not None:
            return self.engine(tokens, **drawn)
        with PassFlops(self.model.network) as flops:
            loss = self.engine(tokens, **drawn)
        self.flops = flops
        return loss

    def _finish_update(self, batch: Batch, times: torch.Tensor, bounds: torch.Tensor) -> Orders:
        """Apply the gradient, unless the step is a spike. The same on all workers. *Collective.*"""
        orders, everyone = self.leader.orders(self.step + 1, self.meter.own())
        total, waited = self.meter.together(everyone)
        self.clock.shift(waited - float(everyone[self.rank, 0]), "train", "data")
        reason = self.spikes.of_loss(total.loss)
        norm = self._gradient_norm_before_step()
        if norm is not None and not math.isfinite(norm):
            reason = reason or f"the norm of the gradient is {norm}"
        self.optimizer.idle = reason is not None
        self.engine.step()
        self.optimizer.idle = False
        if norm is None:
            known = self.engine.get_global_grad_norm()
            norm = None if known is None else float(known)
        if reason is None and not self.engine.was_step_applied():  # DeepSpeed leaves such a step out by itself
            reason = "the norm of the gradient is not finite"
        self.meter.gradient_norm = norm if norm is not None and math.isfinite(norm) else None
        flops = self._flops(total)
        if reason is None:
            self.spikes.made(total.loss)
            self.meter.take(total, waited, flops)
        else:
            self.state.count_update()
            self.spikes.skip()
            self.meter.skip(total, waited, flops)
            self._tell_spike(batch, times, bounds, total.loss, reason)
        return orders

    def _flops(self, total: Step) -> float:
        """Operations of one step of all workers."""
        assert self.flops is not None
        return self.flops.of_training(self.passes.size, total.rows, total.hidden * self.model.masks_per_example)

    def _tell_spike(self, batch: Batch, times: torch.Tensor, bounds: torch.Tensor, loss: float, reason: str) -> None:
        """Write down the whole global batch of a step that was left out, and end the run if the rule says so.
        *Collective.*"""
        step, rule = self.step + 1, self.config.train
        stop = rule.on_spike == "stop" or self.spikes.in_a_row >= rule.skips
        mine = [
            {"slot": int(slot), "set": int(which), "row": int(row), "t": t, "bits_per_token": finite(bits)}
            for slot, which, row, t, bits in zip(
                batch.slots, batch.sets, batch.rows, times.tolist(), bounds.tolist(), strict=True
            )
        ]
        everyone: list[Any] = [None] * self.world
        dist.all_gather_object(everyone, mine)
        name = f"reports/batch-{step}.json"
        file = self.run.place.path(name)
        if stop:
            saved = "the last checkpoint is untouched"
            way = "go on without such steps with train.on_spike=skip, or try a lower optimizer.learning_rate"
            if rule.on_spike == "skip":
                way = f"{self.spikes.in_a_row} steps in a row were skipped (train.skips={rule.skips})"
            self.stopped = f"{reason} at step {step} (global batch {step - 1}, rows in {file}); {saved}; {way}"
        if self.rank == 0:
            facts = {"action": "stopped" if stop else "skipped", "reason": reason, "loss": finite(loss)}
            facts |= {"gradient_norm": self.meter.gradient_norm, "median": self.spikes.usual}
            rows = sorted((row for part in everyone for row in part), key=lambda row: row["slot"])
            known = {"step": step, "global_batch": step - 1, **facts, "sets": self.config.data.names(), "rows": rows}
            write_atomically(self.mirror.folder / name, json.dumps(known, indent=1, allow_nan=False).encode() + b"\n")
            self.trackers.log({"kind": "spike", "step": step, "time": time.time(), **facts, "batch": file})
            self.events.add("spike", step=step, **facts)

    def _tokens_of_a_row(self, real: torch.Tensor) -> torch.Tensor:
        """How many tokens a row of the global batch has on average, padding aside: float64 `[]`. Collective.

        A row's bits divided by it, and averaged over rows, are bits per token of the whole batch, however its tokens
        are spread over rows and workers.
        """
        total = real.sum()
        dist.all_reduce(total)
        return total.double() / self.config.train.batch_size

    def _labels(self, labels: np.ndarray | None) -> torch.Tensor | None:
        """The classes `[n]` of some rows, for a class-conditional model; None for others, whatever the data have."""
        if not self.config.model.classes or labels is None:
            return None
        return torch.as_tensor(labels, dtype=torch.int64, device=self.device)

    def _gradient_norm_before_step(self) -> float | None:
        """Norm of the accumulated gradient in stage 0, where DeepSpeed computes none and applies whatever it is."""
        if self.config.train.zero_stage:
            return None
        return float(torch.nn.utils.get_total_norm(p.grad for p in self.model.parameters() if p.grad is not None))

    def _report(self) -> None:
        """One line of metrics: what was measured since the last one, over all workers, and a learned schedule."""
        learned = self._powers()
        self.ledger.settle(self._summed)
        reads = self._reads()
        if self.rank == 0:
            self._log(
                "train",
                **self.meter.figures(),
                gradient_norm=self.meter.gradient_norm,
                learning_rate=self.optimizer.param_groups[0]["lr"],
                **self._speed(),
                **self._epochs(),
                **reads,
                **({} if learned is None else _range_of(learned)),
                ledger=self.ledger.head,
                ledger_steps=self.ledger.digests,
            )
        self.ledger.take_digests()
        self.meter.clear()
        self._start_timing()

    def _speed(self) -> dict[str, Any]:
        """Where the time since the last line of metrics went, and since the beginning of the run."""
        meter, spent = self.meter, self.clock.spent()
        seconds = {cause: spent[cause] - before for cause, before in self.spent_before.items()}
        training = seconds["train"] + seconds["data"]
        flops = meter.flops / training
        account = self.goodput.at(time.time(), spent)
        return {
            "seconds_per_step": training / max(1, meter.timed_steps),
            "tokens_per_second": meter.timed_tokens / training,
            "tflops": flops / 1e12,
            "mfu": None if self.peak is None else flops / (self.peak * self.world),
            "data_wait": meter.waited / training,
            "checkpoint_seconds": seconds["checkpoint"],
            "evaluation_seconds": seconds["evaluation"],
            "goodput": account["goodput"],
            "restarts": account["restarts"],
            "lost_steps": account["lost_steps"],
            "skipped_steps": self.spikes.skipped,
        }

    def _summed(self, sums: torch.Tensor) -> torch.Tensor:
        """Over all workers; int64, which wraps. Collective."""
        total = sums.to(self.device)
        dist.all_reduce(total)
        return total.cpu()

    def _epochs(self) -> dict[str, float]:
        """How often the training rows have been seen; of a mixture, those of each set."""
        seen = self.order.epochs(self.step)
        if len(seen) == 1:
            return {"epochs": seen[0]}
        return {f"epochs_{name}": value for name, value in zip(self.config.data.names(), seen, strict=True)}

    def _reads(self) -> dict[str, float]:
        """What was read of the shards since this attempt began, over all workers. Collective.

        Rows of row groups for each row delivered: one for lanes; the full order decodes all of them once, at most.
        """
        reads = self.stream.reads
        mine = torch.tensor([reads.bytes, reads.rows_read, reads.rows_given, len(self.stream.damages)])
        size, read, given, rebuilt = self._summed(mine).tolist()
        figures = {"bytes_read": size, "reads_per_row": read / max(1, given)}
        return figures | ({"decoded_rows_rebuilt": rebuilt} if rebuilt else {})

    @torch.no_grad()
    def _powers(self) -> torch.Tensor | None:
        """The powers of a learned schedule, `[V]` on the CPU; None where there is none. Collective."""
        return self.model.schedule().cpu() if isinstance(self.model, GenMD4) else None

    def _evaluate(self) -> None:
        """Negative ELBO of some validation rows under the averaged weights, dealt out over the workers."""
        options = self.config.evaluation
        with self.clock.spending("evaluation"):
            found = validate(
                self.model, self.state, self.validation, options, self.passes.size, self.seed, self.device,
                self._labels, lambda: self.watchdog.at("the evaluation", self.step),
            )  # fmt: skip
        self.evaluated = {"bits_per_token": found.mean, "standard_error": found.error}
        if self.rank == 0:
            rows = min(options.rows, self.validation.rows)
            self._log("evaluation", **self.evaluated, rows=rows, draws=options.draws, estimator=options.estimator)

    def _save(self) -> None:
        with self.clock.spending("checkpoint"):
            self.ledger.settle(self._summed)
            facts = {
                "run": self.config.name,
                "seed": self.seed,  # all random numbers are functions of it and the step
                "order": self.order.facts(),
                "ledger": self.ledger.dump(),
                "evaluation": self.evaluated,
                "config": self.config.model_dump(mode="json"),
                "meter": self.meter.dump(),
                "spikes": self.spikes.dump(),
                "spent": self.clock.spent(),
                "origin": self.origin,
            }
            self.watchdog.at("saving", self.step)
            self.writer.save(self.state, self.step, facts, hold=self._is_for_the_suite())
            self.saved = self.step
            if isinstance(self.model, GenMD4):
                self._write_powers()

    def _is_for_the_suite(self) -> bool:
        """Is this the first checkpoint after so many steps, or the last of the run?"""
        options = self.config.evaluation
        if options.suite is None:
            return False
        every = options.suite_every
        return self.step == self.config.train.steps or bool(every and self.step // every > self.saved // every)

    @cached_property
    def token_names(self) -> powers.Names:
        return powers.token_names(self.config.data.tokens)

    def _write_powers(self) -> None:
        """The averaged powers, those that evaluation and sampling see, as a table and a picture. Collective."""
        with self.state.averaged():
            learned = self._powers()
        if self.rank == 0 and learned is not None:
            title = f"{self.config.name}: powers after {self.step} steps"
            powers.write(learned.tolist(), self.token_names, title, self.mirror.folder / "reports")

    def _log(self, kind: str, **figures: Any) -> None:
        self.trackers.log({"kind": kind, "step": self.step, "time": time.time(), **figures})


def finite(value: float) -> float | None:
    """The value; None for what JSON has no number for."""
    return value if math.isfinite(value) else None


def _range_of(learned: torch.Tensor) -> dict[str, float]:
    return {
        "power_min": learned.min().item(),
        "power_mean": learned.mean().item(),
        "power_max": learned.max().item(),
    }
