"""Rows that are sampled together: they join, advance one network call at a time, and leave when they are done.

The rows of a batch have one length and are otherwise strangers: each has its own prompt, settings, seed and time, and
gets the tokens that it would get alone. Nothing of the size of the vocabulary is kept for a row.

Shapes: B rows in the batch now, L positions, V real tokens, N positions revealed by one call.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from time import perf_counter

import torch
from torch import Tensor

from md4 import inference, noise
from md4.errors import UserError
from md4.objectives import MD4, MaskedDiffusion
from md4.samplers.ancestral import ancestral_plan
from md4.samplers.draws import draw_tokens
from md4.samplers.plans import Plan
from md4.samplers.settings import SamplingConfig


@dataclass
class Rows:
    """The state of some rows, one entry of every tensor for each."""

    number: Tensor  # [B] int64: names the row to the caller
    tokens: Tensor  # [B, L] int64: the mask id where still hidden
    event: Tensor  # [B, L] int64: the plan, see plans.Plan
    time: Tensor  # [B, L] float64
    key: Tensor  # [B] int64: the row's noise
    temperature: Tensor  # [B] float64
    top_p: Tensor  # [B] float64
    greedy_from: Tensor  # [B] int64: events from here on take the most probable token
    label: Tensor  # [B] int64: class, of class-conditional models
    calls: Tensor  # [B] int64: network calls so far
    broken: Tensor  # [B] bool: the network's answer was no prediction (NaN); the row stopped there

    def __len__(self) -> int:
        return self.number.shape[0]

    def select(self, which: Tensor) -> "Rows":
        """The rows at a bool mask `[B]` or at indices, in that order."""
        return Rows(**{field.name: getattr(self, field.name)[which] for field in fields(Rows)})

    @staticmethod
    def join(parts: Sequence["Rows"]) -> "Rows":
        """All rows of some parts, one after the other."""
        return Rows(**{field.name: torch.cat([getattr(part, field.name) for part in parts]) for field in fields(Rows)})


@dataclass(frozen=True)
class Job:
    """Rows that share their settings."""

    canvas: Tensor  # [B, L] int64: known tokens, the mask id where one is wanted
    seeds: Tensor  # [B] int64: a row's tokens are a function of its canvas, its seed and the settings
    settings: SamplingConfig
    labels: Tensor | None = None  # [B] int64, for class-conditional models

    def __post_init__(self) -> None:
        if self.canvas.ndim != 2 or 0 in self.canvas.shape:
            raise UserError(f"a canvas has the shape [rows >= 1, length >= 1], not {list(self.canvas.shape)}")
        for name, values in {"seeds": self.seeds, "labels": self.labels}.items():
            if values is not None and values.shape != self.canvas.shape[:1]:
                raise UserError(f"{len(self.canvas)} rows need as many {name}, not the shape {list(values.shape)}")

    def __len__(self) -> int:
        return self.canvas.shape[0]

    def part(self, start: int, stop: int) -> "Job":
        """Rows start..stop-1, as far as there are so many."""
        labels = None if self.labels is None else self.labels[start:stop]
        return Job(self.canvas[start:stop], self.seeds[start:stop], self.settings, labels)


@dataclass(frozen=True)
class Samples:
    """The result of a job, rows in its order."""

    tokens: Tensor  # [B, L] int64
    event: Tensor  # [B, L] int64: the step that revealed a position (-1: known from the start; >= steps: leftover)
    calls: Tensor  # [B] int64: network calls that the row needed
    broken: Tensor  # [B] bool: not sampled to the end, the network's answer was no prediction (NaN)
    mode: str  # how tokens were drawn, see SamplingConfig.mode
    network_calls: int  # forward passes of the run that this job was part of
    seconds: float  # of that run

    @property
    def draws(self) -> int:
        """Categorical draws made: one for each token."""
        return int((self.event >= 0).sum())


class Batch:
    """Rows under way. `join` takes rows in, `advance` makes one network call for all, `leave` hands out the ended."""

    def __init__(self, model: MaskedDiffusion) -> None:
        if not isinstance(model, MD4):
            raise UserError("a model of objective genmd4 can't be sampled: its tokens have no common schedule")
        self.model = model
        self.device = next((p.device for p in model.parameters()), torch.device("cpu"))
        self.network_calls = 0
        self._rows: Rows | None = None

    def __len__(self) -> int:
        return 0 if self._rows is None else len(self._rows)

    def join(self, job: Job, numbers: Iterable[int]) -> None:
        """Take in the rows of a job; `numbers` name them when they leave.

        Raises `UserError` if the canvas holds anything but tokens and the mask id, or is of another length than the
        rows that are under way, or if only one of both has labels.
        """
        canvas, settings, mask = job.canvas.to(self.device), job.settings, self.model.mask_id
        if bool(((canvas < 0) | (canvas > mask)).any()):
            raise UserError(f"a canvas holds tokens 0..{mask - 1} and the mask id {mask}")
        if self._rows is not None:
            length, labelled = self._rows.tokens.shape[1], bool((self._rows.label >= 0).all())
            if canvas.shape[1] != length:
                raise UserError(f"rows of length {canvas.shape[1]} can't join rows of length {length}")
            if labelled != (job.labels is not None):
                raise UserError("rows with a class label can't share a batch with rows without one")
        key = noise.derive(job.seeds.to(self.device), "sample")
        plan = ancestral_plan(self.model.schedule, canvas == mask, key, settings)
        greedy_from = settings.steps if settings.leftovers == "argmax" else torch.iinfo(torch.int64).max

        def every(value: float, dtype: torch.dtype) -> Tensor:
            return torch.full((len(job),), value, dtype=dtype, device=self.device)

        rows = Rows(
            number=torch.as_tensor(list(numbers), dtype=torch.int64, device=self.device),
            tokens=canvas.clone(),
            event=plan.event,
            time=plan.time,
            key=noise.derive(key, "token"),
            temperature=every(settings.temperature, torch.float64),
            top_p=every(settings.top_p, torch.float64),
            greedy_from=every(greedy_from, torch.int64),
            label=every(-1, torch.int64) if job.labels is None else job.labels.to(self.device),
            calls=every(0, torch.int64),
            broken=every(False, torch.bool),
        )
        self._rows = rows if self._rows is None else Rows.join([self._rows, rows])

    def leave(self) -> Rows | None:
        """Take out the rows that are finished or broken; None if there are none."""
        if self._rows is None:
            return None
        ended = ~(self._rows.tokens == self.model.mask_id).any(dim=1) | self._rows.broken
        if not bool(ended.any()):
            return None
        out = self._rows.select(ended)
        self._rows = None if bool(ended.all()) else self._rows.select(~ended)
        return out

    def advance(self) -> None:
        """One network call: every row makes its own next step."""
        rows = self._rows
        if rows is None:
            return
        masked = rows.tokens == self.model.mask_id
        call = Plan(rows.event, rows.time).next(masked)
        labels = rows.label if bool((rows.label >= 0).all()) else None
        logits = inference.logits(self.model, rows.tokens, call.time, labels)
        row, position = call.reveal.nonzero(as_tuple=True)
        logits = logits[row, position]

        # -inf forbids a token; a NaN, +inf, or nothing but -inf is no prediction.
        finite = torch.isfinite(logits.amax(dim=1))
        rows.broken[row[~finite]] = True
        row, position, logits = row[finite], position[finite], logits[finite]

        event = call.event[row]
        keys = noise.derive(noise.derive(rows.key[row], event), position)
        tokens = draw_tokens(logits, keys, rows.temperature[row], rows.top_p[row])
        greedy = event >= rows.greedy_from[row]
        rows.tokens[row, position] = torch.where(greedy, logits.argmax(dim=-1), tokens)
        rows.calls += masked.any(dim=1)
        self.network_calls += 1


def run(model: MaskedDiffusion, jobs: Sequence[Job], batch_size: int = 64) -> list[Samples]:
    """Sample the rows of all jobs (of one length), at most `batch_size` at a time; results in the jobs' order.

    A row that ends makes room for the next one. Tokens don't depend on `batch_size` or on the other jobs.
    Raises `UserError` for a canvas that can't be sampled or a batch size below 1.
    """
    if batch_size < 1:
        raise UserError(f"batch_size is {batch_size}; at least 1 is needed")
    began = perf_counter()
    batch = Batch(model)
    waiting = [(job, index) for job in jobs for index in range(len(job))]
    entered = 0
    ended: list[Rows] = []
    while entered < len(waiting) or len(batch):
        while entered < len(waiting) and len(batch) < batch_size:
            job, index = waiting[entered]
            part = job.part(index, index + batch_size - len(batch))
            batch.join(part, range(entered, entered + len(part)))
            entered += len(part)
        out = batch.leave()
        if out is None:
            batch.advance()
        else:
            ended.append(out)
    if not ended:
        return []
    rows = Rows.join(ended)
    rows = rows.select(rows.number.argsort())
    results, start = [], 0
    for job in jobs:
        own = rows.select(torch.arange(start, start + len(job), device=rows.number.device))
        start += len(job)
        known = job.canvas != model.mask_id
        if not torch.equal(own.tokens.cpu()[known.cpu()], job.canvas[known].cpu()):
            raise AssertionError("a known token was touched")
        results.append(
            Samples(
                tokens=own.tokens.cpu(),
                event=own.event.cpu(),
                calls=own.calls.cpu(),
                broken=own.broken.cpu(),
                mode=job.settings.mode,
                network_calls=batch.network_calls,
                seconds=perf_counter() - began,
            )
        )
    return results
