"""The loop inside one Ray Train worker: stream -> loss -> DeepSpeed engine -> metrics, evaluation, checkpoints.

All workers run this function in step. What each computes follows from (configuration, seed, step, rank): the data by
`pipelines.stream`, times and masks by `md4.noise`. Only dropout depends on the layout, since each worker draws its own;
it is seeded by (seed, step, rank), so a resumed run repeats it exactly at the same number of workers.
"""

import math
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from typing import Any, cast

import numpy as np
import ray.train
import torch
import torch.distributed as dist
from ray.train.torch import get_device

from md4 import documents, noise
from md4.genmd4 import GenMD4
from md4.likelihood import mean_and_error, nelbo, ratio_and_error
from md4.model import build, drop_labels
from md4.objectives import MaskedDiffusion, bits_per_token
from orchestration import checkpoints, powers
from orchestration.checkpoint_writer import Retention, Writer
from orchestration.config import Config, validate
from orchestration.events import Events
from orchestration.leader import Leader, Orders
from orchestration.optimizer import AdamWithEma, learning_rate, parameter_groups
from orchestration.passes import Passes
from orchestration.runs import Run, rewind
from orchestration.tracking import Trackers
from orchestration.watchdog import Watchdog
from orchestration.zero import EngineState, initialize
from pipelines.ledger import Ledger
from pipelines.manifest import Manifest
from pipelines.plan import plan
from pipelines.shards import ShardSet
from pipelines.storage import Folder
from pipelines.stream import batches


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
        job: `config` (a plain tree) and `data` (paths or urls of the prepared data sets, in the configuration's order).

    Returns:
        `{"step": last step}`, or `{"error": message}` when going on makes no sense and a restart would not help.
    """
    config = validate(job["config"])
    torch.set_num_threads(config.train.threads)
    try:
        return {"step": _Training(config, [Folder(place) for place in job["data"]]).fit()}
    except Hopeless as error:
        return {"error": str(error)}


class Hopeless(Exception):
    """Going on makes no sense, and a restart would not help. Raised by all workers at the same step."""


class Preempted(Exception):
    """Some of the workers' machines will be taken away; everything up to now is in a checkpoint."""


class _Training:
    """One worker's part of a run, from the newest sound checkpoint to the last step."""

    def __init__(self, config: Config, data: list[Folder]):
        import deepspeed.ops
        from deepspeed import init_distributed

        self.config = config
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
        )
        self.model = cast(MaskedDiffusion, self.engine.module)
        self.state = EngineState(self.engine, self.optimizer)
        self.run = Run(config.directory)
        self.meter = _Meter()
        self.ledger = Ledger(self.order)
        kept = config.checkpoint
        self.writer = Writer(config.checkpoints, Retention(kept.keep, kept.keep_every, kept.keep_best))
        self.evaluated: dict[str, float] | None = None  # the last evaluation, if it was of this step
        self.step = self._restore()
        self.leader = Leader(config)
        self.events = Events(self.run.path)
        self.watchdog = Watchdog(config.train.patience, self._tell_hang)
        if self.rank == 0:
            rewind(self.run.metrics_file, self.step)
            self.trackers = Trackers(config, self.run, self.step)
            self._log("start", compute=str(dtype).removeprefix("torch."), workers=self.world, pid=os.getpid())
            self.events.add("workers", workers=self.world, step=self.step)

    def _restore(self) -> int:
        """Load the newest sound checkpoint, the same on every worker; 0 when there is none."""
        checkpoint = checkpoints.newest_together(self.config.checkpoints, self._tell_damage)
        if checkpoint is None:
            return 0
        checkpoints.restore(checkpoint, self.state)
        self.meter.load(checkpoint.manifest["meter"], self.rank)
        self.ledger = Ledger(self.order, checkpoint.manifest["ledger"])
        return checkpoint.step

    def fit(self) -> int:
        """Train to the last step; returns it."""
        train = self.config.train
        # Reading starts here and goes on beside the first evaluation.
        self.stream = stream = batches(self.data, "train", self.order, self.step, train.steps, self.rank, self.world)
        if self.step == 0 and self.config.evaluation.every:
            self._evaluate()
        self.meter.restart()
        for batch in stream:
            self._update(batch)
            self.watchdog.stepped()
            if self.step % train.log_every == 0 or self.step == train.steps:
                self._report()
            if self._due(self.config.evaluation.every):
                self._evaluate()
            self.watchdog.at("the end", self.step)
            self._follow(self.leader.orders(self.step))
            self.watchdog.at("waiting for data", self.step + 1)
        stream.close()
        self._finish_writing()
        self.watchdog.close()
        if self.rank == 0:
            self.trackers.close()
        return self.step

    def _tell_damage(self, reason: str) -> None:
        """Note a checkpoint that is passed over; of the leader. What workers print, a driver does not show."""
        Events(self.run.path).add("damaged", reason=reason)
        print(reason, flush=True)

    def _tell_hang(self, reason: str) -> None:
        self.events.add("hang", worker=self.rank, reason=reason)
        print(f"worker {self.rank} ends: {reason}", flush=True)

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
        self._tell_news()

    def _finish_writing(self) -> None:
        """Wait for the checkpoint that is being written. *Collective.*"""
        with self.meter.paused():
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

    def _update(self, batch: Any) -> None:
        """One optimizer update on this worker's slots of the global batch."""
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
        for number, (part, real) in enumerate(self.passes.parts(len(slots)), start=1):
            self.watchdog.at(f"pass {number}", step + 1)
            mine = part.to(self.device)
            loss = self.engine(tokens[mine], **{name: values[mine] for name, values in drawn.items()})
            self.engine.backward(self.passes.loss(bits_per_token(loss.optimised, length), real))
            self.meter.add(bits_per_token(loss.bound, length)[:real], 1 if self.end_of_rows is None else length)
            if number == self.passes.count and (step + 1) % train.log_every == 0:
                self.meter.gradient_norm = self._gradient_norm_before_step()
            self.watchdog.at(f"the update after pass {number}", step + 1)
            self.engine.step()
        self.ledger.add(batch.step, batch.slots, batch.sets, batch.rows)
        self.meter.steps += 1
        self.meter.tokens = self.meter.tokens + length * train.batch_size
        self.step += 1
        self.evaluated = None

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
        """Norm of the accumulated gradient where DeepSpeed itself computes none (stage 0)."""
        if self.config.train.zero_stage:
            return None
        return float(torch.nn.utils.get_total_norm(p.grad for p in self.model.parameters() if p.grad is not None))

    def _report(self) -> None:
        """One line of metrics: the mean bound since the last one, over all workers, and a learned schedule's powers."""
        norm = self.meter.gradient_norm
        if norm is None:
            known = self.engine.get_global_grad_norm()
            norm = None if known is None else float(known)
        seconds = self.meter.seconds()
        bits, learned = self.meter.mean(self.device), self._powers()
        self.ledger.settle(self._summed)
        reads = self._reads()
        if not math.isfinite(bits):
            raise Hopeless(
                f"the loss is {bits} at step {self.step}; the last checkpoint is untouched. "
                f"Try a lower optimizer.learning_rate (now {self.config.optimizer.learning_rate:g}) "
                "or optimizer.clip_norm=1"
            )
        if self.rank == 0:
            self._log(
                "train",
                bits_per_token=bits,
                gradient_norm=norm,
                learning_rate=self.optimizer.param_groups[0]["lr"],
                seconds_per_step=seconds,
                tokens_per_second=float(self.meter.tokens) / self.meter.steps / seconds,
                **self._epochs(),
                **reads,
                **({} if learned is None else _range_of(learned)),
                ledger=self.ledger.head,
                ledger_steps=self.ledger.digests,
            )
        self.ledger.take_digests()
        self.meter.clear()

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

    @torch.no_grad()
    def _evaluate(self) -> None:
        """Negative ELBO of some validation rows under the averaged weights, dealt out over the workers."""
        options = self.config.evaluation
        with self.meter.paused():
            rows = min(options.rows, self.validation.rows)
            # Every worker makes the same number of passes (ZeRO-3 gathers weights in each): short shares are filled
            # up with rows that are not counted.
            share = math.ceil(rows / self.world)
            places = torch.arange(share) * self.world + self.rank
            counted = places < rows
            ids = places.clamp(max=rows - 1) * self.validation.rows // rows  # evenly spaced over the split
            bits, weights = [], []
            with self.state.averaged():
                for part in ids.split(self.passes.size):
                    self.watchdog.at("the evaluation", self.step)
                    rows_of_part, labels = self.validation.read_labelled(part.numpy())
                    tokens = torch.as_tensor(rows_of_part, dtype=torch.int64, device=self.device)
                    real = None if self.end_of_rows is None else documents.no_padding(tokens, self.end_of_rows)
                    nats = nelbo(
                        self.model,
                        tokens,
                        draws=options.draws,
                        seed=noise.key(self.seed, "evaluation"),
                        ids=part.to(self.device),
                        estimator=options.estimator,
                        labels=self._labels(labels),
                        real=real,
                    )
                    # Of padded rows bits and tokens apart: the figure is the ratio of their sums.
                    bits.append(bits_per_token(nats.mean(1), tokens.shape[1] if real is None else 1).cpu())
                    weights.append(torch.ones(len(part)) if real is None else real.sum(1).cpu())
            everyone: list[Any] = [None] * self.world
            dist.all_gather_object(everyone, (torch.cat(bits)[counted], torch.cat(weights)[counted]))
            values, tokens = (torch.cat(column) for column in zip(*everyone, strict=True))
            if self.end_of_rows is None:
                mean, error = mean_and_error(values)
            else:
                mean, error = ratio_and_error(values, tokens, torch.arange(rows))
        self.evaluated = {"bits_per_token": mean, "standard_error": error}
        if self.rank == 0:
            self._log(
                "evaluation",
                bits_per_token=mean,
                standard_error=error,
                rows=rows,
                draws=options.draws,
                estimator=options.estimator,
            )

    def _save(self) -> None:
        with self.meter.paused():
            self.ledger.settle(self._summed)
            facts = {
                "run": self.config.name,
                "seed": self.seed,  # all random numbers are functions of it and the step
                "order": self.order.facts(),
                "ledger": self.ledger.dump(),
                "evaluation": self.evaluated,
                "config": self.config.model_dump(mode="json"),
                "meter": self.meter.dump(),
            }
            self.watchdog.at("saving", self.step)
            self.writer.save(self.state, self.step, facts)
            if isinstance(self.model, GenMD4):
                self._write_powers()

    @cached_property
    def token_names(self) -> powers.Names:
        return powers.token_names(self.config.data.tokens)

    def _write_powers(self) -> None:
        """The averaged powers, those that evaluation and sampling see, as a table and a picture. Collective."""
        with self.state.averaged():
            learned = self._powers()
        if self.rank == 0 and learned is not None:
            title = f"{self.config.name}: powers after {self.step} steps"
            powers.write(learned.tolist(), self.token_names, title, self.run.reports)

    def _log(self, kind: str, **figures: Any) -> None:
        self.trackers.log({"kind": kind, "step": self.step, "time": time.time(), **figures})


def _range_of(learned: torch.Tensor) -> dict[str, float]:
    return {
        "power_min": learned.min().item(),
        "power_mean": learned.mean().item(),
        "power_max": learned.max().item(),
    }


class _Meter:
    """Sums the loss between two lines of metrics, and the time spent in training steps alone."""

    def __init__(self) -> None:
        self.gradient_norm: float | None = None
        self.clear()

    def clear(self) -> None:
        self._bits: torch.Tensor | float = 0.0
        self._weight: torch.Tensor | float = 0
        self.steps = 0
        self.tokens: torch.Tensor | float = 0  # of all workers' steps, padding aside
        self.gradient_norm = None
        self.restart()

    def restart(self) -> None:
        """Time begins here, without the pauses so far."""
        self._began, self._idle = time.perf_counter(), 0.0

    def add(self, bits: torch.Tensor, weight: torch.Tensor | int) -> None:
        """Per-example bits `[n]`, each of that weight; summed in float64, on their device, without waiting for it."""
        self._bits = self._bits + bits.double().sum() * weight
        self._weight = self._weight + len(bits) * weight

    def seconds(self) -> float:
        """Per step, pauses left out."""
        return (time.perf_counter() - self._began - self._idle) / max(1, self.steps)

    def mean(self, device: torch.device) -> float:
        """Mean over all workers. Collective."""
        total = torch.stack([torch.as_tensor(float(v), dtype=torch.float64) for v in (self._bits, self._weight)]).to(
            device
        )
        dist.all_reduce(total)
        return float(total[0] / total[1])

    @contextmanager
    def paused(self) -> Iterator[None]:
        began = time.perf_counter()
        yield
        self._idle += time.perf_counter() - began

    def dump(self) -> list[list[float]]:
        """What each worker has summed so far, so that a resumed run writes the same next line. Collective."""
        everyone: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(everyone, [float(self._bits), float(self._weight)])
        return everyone

    def load(self, dumped: list[list[float]], rank: int) -> None:
        """Take up `dump`: one's own sums at the same number of workers, else all of them on the first."""
        if len(dumped) != dist.get_world_size():
            total = [float(sum(column)) for column in zip(*dumped, strict=True)]
            dumped = [total] + [[0.0, 0.0]] * (dist.get_world_size() - 1)
        self._bits, self._weight = dumped[rank]
