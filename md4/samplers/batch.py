"""Rows that are sampled together: they join, advance one network call at a time, and leave when they are done.

The rows of a batch are strangers: each has its own length, prompt, sampler, settings, seed and time, and gets the
tokens that it would get alone. Rows of equal length share their network calls, whatever their samplers.

Shapes: B rows, T tokens of a row, L tokens that the network sees, N positions looked at, V real tokens.
"""

from collections.abc import Iterable, Sequence
from time import perf_counter
from typing import Any, NamedTuple

import torch
from torch import Tensor

from md4 import noise
from md4.errors import UserError
from md4.inference import Prediction
from md4.objectives import MaskedDiffusion, evaluating
from md4.samplers.registry import sampler_class
from md4.samplers.rows import KNOWN, PENDING, Job, Rows, Samples
from md4.samplers.sampler import Ask, Sampler, Seen, Sight
from md4.samplers.saved import Saved
from md4.samplers.settings import SamplingConfig

_CHUNK = 1 << 22  # logits made at a time: 16 MB
_STEP = 4  # positions looked at together are a multiple of it, see md4.inference


def _classes(model: MaskedDiffusion) -> int:
    """How many classes the network learned; 0 = none."""
    conditioning: Any = getattr(model.network, "conditioning", None)
    return getattr(conditioning, "classes", 0)


def filled(model: MaskedDiffusion, settings: SamplingConfig) -> SamplingConfig:
    """`settings` with what is kept with the model in the place of its name. UserError for what isn't kept."""
    return (model.saved or Saved()).fill(settings, model.objective)


def check(model: MaskedDiffusion, job: Job) -> SamplingConfig:
    """The job's settings, resolved, if the model can sample it.

    Raises `UserError` if the canvas holds anything but tokens and the mask id, for settings or a sampler that are not
    for this model, for a stop token that is none, and for a label or a guidance without classes.
    """
    settings = filled(model, job.settings).resolve(model.objective)
    mask, classes = model.mask_id, _classes(model)
    sampler_class(model.objective, settings)
    if bool(((job.canvas < 0) | (job.canvas > mask)).any()):
        raise UserError(f"a canvas holds tokens 0..{mask - 1} and the mask id {mask}")
    if job.stop is not None and not 0 <= job.stop < mask:
        raise UserError(f"the stop token is {job.stop}; tokens are 0..{mask - 1}")
    if job.labels is not None and not bool(((job.labels >= -1) & (job.labels < classes)).all()):
        allowed = f"labels are 0..{classes - 1}, and -1 for none" if classes else "it has no classes"
        raise UserError(f"labels {sorted(set(job.labels.tolist()))} are not all of this model: {allowed}")
    if settings.guidance != 1 and (job.labels is None or bool((job.labels < 0).any())):
        wanted = "every row needs a label" if classes else "this model has no classes"
        raise UserError(f"guidance={settings.guidance} is towards a class: {wanted}")
    return settings


class Glance(NamedTuple):
    """How far a row has come, on the CPU."""

    number: int
    calls: int
    tokens: Tensor  # [T] int64: the mask id where still hidden


_Place = tuple[Sampler, int, int]  # sampler, length and view


class Batch:
    """Rows under way. `join` takes rows in, `advance` makes one network call for all, `leave` hands out the ended.

    Rows may also be taken out before they have ended (`remove`), or go on in another batch (`move`): those that stay
    and those that go get the same tokens in any case. A call of `advance` that fails changes none of its rows.

    A network that learned classes is shown those of the rows, and the null class for rows without one.
    """

    def __init__(self, model: MaskedDiffusion) -> None:
        self.model = model
        self.device = next((p.device for p in model.parameters()), torch.device("cpu"))
        self.network_calls = 0
        self.classes = _classes(model)
        self._samplers: dict[type[Sampler], Sampler] = {}
        self._rows: dict[_Place, Rows] = {}

    def __len__(self) -> int:
        return sum(map(len, self._rows.values()))

    def join(self, job: Job, numbers: Iterable[int]) -> None:
        """Take in the rows of a job; `numbers` name them when they leave. Raises `UserError` as `check` does."""
        settings = check(self.model, job)
        rows = self._enter(job, settings, numbers)
        kind = sampler_class(self.model.objective, settings)
        sampler = self._samplers.setdefault(kind, kind(self.model))
        rows.own = sampler.begin(rows, settings)
        self._put(sampler, rows)

    def _put(self, sampler: Sampler, rows: Rows) -> None:
        place = (sampler, rows.tokens.shape[1], int(rows.view[0]))
        self._rows[place] = Rows.join([self._rows[place], rows]) if place in self._rows else rows

    def rows(self, numbers: Iterable[int]) -> list[Rows]:
        """Those rows, as far as they are here, as they stand; the batch keeps its own."""
        return [rows.select(which) for _, rows, which in self._find(numbers)]

    def remove(self, numbers: Iterable[int]) -> None:
        """Take those rows out, as far as they are here, and forget them."""
        self._take(numbers)

    def move(self, numbers: Iterable[int], to: "Batch") -> None:
        """Hand those rows, as far as they are here, over to another batch of the same model, where they go on."""
        for sampler, rows in self._take(numbers):
            to._put(to._samplers.setdefault(type(sampler), sampler), rows)

    def _take(self, numbers: Iterable[int]) -> list[tuple[Sampler, Rows]]:
        taken = []
        for place, rows, which in self._find(numbers):
            taken.append((place[0], rows.select(which)))
            if bool(which.all()):
                del self._rows[place]
            else:
                self._rows[place] = rows.select(~which)
        return taken

    def _find(self, numbers: Iterable[int]) -> list[tuple[_Place, Rows, Tensor]]:
        """The places that have some of these rows, and which `[B]` (bool) of theirs they are."""
        wanted = torch.as_tensor(list(numbers), dtype=torch.int64, device=self.device)
        found = [(place, rows, torch.isin(rows.number, wanted)) for place, rows in self._rows.items()]
        return [(place, rows, which) for place, rows, which in found if bool(which.any())]

    def _enter(self, job: Job, settings: SamplingConfig, numbers: Iterable[int]) -> Rows:
        canvas, mask, count = job.canvas.to(self.device), self.model.mask_id, len(job)
        length = canvas.shape[1]

        def every(value: float, dtype: torch.dtype = torch.int64) -> Tensor:
            return torch.full((count,), value, dtype=dtype, device=self.device)

        return Rows(
            number=torch.as_tensor(list(numbers), dtype=torch.int64, device=self.device),
            tokens=canvas.clone(),
            event=torch.where(canvas == mask, PENDING, KNOWN),
            key=noise.derive(job.seeds.to(self.device), "sample"),
            calls=every(0),
            draws=every(0),
            temperature=every(settings.temperature, torch.float64),
            top_p=every(settings.top_p, torch.float64),
            top_k=every(settings.top_k or 0),
            guidance=every(settings.guidance, torch.float64),
            label=every(-1) if job.labels is None else job.labels.to(self.device),
            block=every(settings.block or length),
            stop=every(-1 if job.stop is None else job.stop),
            view=every(min(length, job.window or length)),
            broken=every(False, torch.bool),
        )

    def leave(self) -> list[Rows]:
        """Take out the rows that are finished or broken."""
        out = []
        for place, rows in list(self._rows.items()):
            sampler = place[0]
            finished = sampler.finished(rows)
            ended = finished | rows.broken | self._stopped(rows, finished, sampler.revises)
            if not bool(ended.any()):
                continue
            gone = rows.select(ended)
            gone.own = {name: gone.own[name] for name in sampler.counts}
            out.append(gone)
            if bool(ended.all()):
                del self._rows[place]
            else:
                self._rows[place] = rows.select(~ended)
        return out

    def _stopped(self, rows: Rows, finished: Tensor, revises: bool) -> Tensor:
        """Rows `[B]` with a stop token before which nothing is masked; what follows it becomes stop tokens too.

        Where tokens may change later (`revises`) finished rows alone.
        """
        if not bool((rows.stop >= 0).any()):
            return torch.zeros_like(rows.broken)
        masked = rows.tokens == self.model.mask_id
        first = (rows.tokens == rows.stop[:, None]) & rows.unknown & (masked.cumsum(dim=1) == 0)
        if revises:
            first &= finished[:, None]
        rest = (first.cumsum(dim=1) > 0) & rows.unknown
        rows.tokens = torch.where(rest, rows.stop[:, None], rows.tokens)
        return first.any(dim=1)

    def advance(self) -> None:
        """One network call for all rows of a length: every row makes its own next step."""
        asked = [(place, rows, place[0].ask(rows)) for place, rows in self._rows.items()]
        for view in {place[2] for place, *_ in asked}:
            self._call([(place[0], rows, ask) for place, rows, ask in asked if place[2] == view], view)

    def _call(self, asked: list[tuple[Sampler, Rows, Ask]], view: int) -> None:
        """Ask the network for rows that it sees `view` tokens of, and tell the samplers what it said."""
        mask = self.model.mask_id
        needs = [ask.wanted.any(dim=1) for _, _, ask in asked]
        starts = [rows.view_start(mask) for _, rows, _ in asked]
        index = torch.arange(view, device=self.device)
        z = torch.cat(
            [r.tokens.gather(1, s[:, None] + index)[n] for (_, r, _), s, n in zip(asked, starts, needs, strict=True)]
        )
        if len(z) == 0:
            return
        t = torch.cat([ask.time[need] for (_, _, ask), need in zip(asked, needs, strict=True)])
        label = torch.cat([rows.label[need] for (_, rows, _), need in zip(asked, needs, strict=True)])
        guidance = torch.cat([rows.guidance[need] for (_, rows, _), need in zip(asked, needs, strict=True)])
        guided = guidance != 1
        # Guided rows are asked a second time, as of no class in particular.
        null = torch.where(guided, len(z) + guided.cumsum(dim=0) - 1, 0)
        if bool(guided.any()):
            z, t = torch.cat([z, z[guided]]), torch.cat([t, t[guided]])
            label = torch.cat([label, torch.full_like(label[guided], -1)])
        prediction = Prediction(self.model, z, t, label if self.classes else None)
        self.network_calls += 1

        first = 0
        seen: list[Seen | None] = []
        for (sampler, rows, ask), start, need in zip(asked, starts, needs, strict=True):
            place = first + need.cumsum(dim=0) - 1  # of each row in the call
            first += int(need.sum())
            row, position = ask.wanted.nonzero(as_tuple=True)
            if len(row) == 0:
                seen.append(None)
                continue
            parts = []
            size = max(_STEP, _CHUNK // mask // _STEP * _STEP)
            for begin in range(0, len(row), size):
                r, p = row[begin : begin + size], position[begin : begin + size]
                seen_at, number = p - start[r], place[r]
                logits = prediction.logits(number, seen_at)
                if bool(guided[number].any()):
                    other, g = prediction.logits(null[number], seen_at), guidance[number, None].float()
                    logits = torch.where(guided[number, None], other + g * (logits - other), logits)
                parts.append(sampler.look(rows, Sight(r, p, self._sound(rows, r, logits))))
            values = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
            seen.append(Seen(row, position, values))
        # Only now, when all that needs much memory is done: an error before this line has changed no row.
        for (sampler, rows, _), need, what in zip(asked, needs, seen, strict=True):
            if what is not None:
                sampler.tell(rows, what)
                rows.calls += need

    @staticmethod
    def _sound(rows: Rows, row: Tensor, logits: Tensor) -> Tensor:
        """`logits`, but 0 where they are no prediction; their rows are marked as broken."""
        # -inf forbids a token; a NaN, +inf, or nothing but -inf is no prediction.
        finite = torch.isfinite(logits.amax(dim=1))
        if bool(finite.all()):
            return logits
        rows.broken[row[~finite]] = True
        return torch.where(finite[:, None], logits, 0.0)


def glance(parts: Sequence[Rows]) -> list[Glance]:
    """How far rows have come, in one copy from their device."""
    if not parts:
        return []
    tables = [torch.cat([rows.number[:, None], rows.calls[:, None], rows.tokens], dim=1) for rows in parts]
    flat = torch.cat([table.flatten() for table in tables]).cpu()
    pieces = flat.split([table.numel() for table in tables])
    found = []
    for table, piece in zip(tables, pieces, strict=True):
        copied = piece.view(table.shape)
        found += map(Glance, copied[:, 0].tolist(), copied[:, 1].tolist(), copied[:, 2:])
    return found


def collect(model: MaskedDiffusion, job: Job, ended: Sequence[Rows], network_calls: int, seconds: float) -> Samples:
    """The result of a job: `ended` are its rows as they left a batch, numbered in the job's order.

    network_calls, seconds: of what the job was part of.
    """
    rows = Rows.join(ended)
    rows = rows.select(rows.number.argsort())
    known = job.canvas.to(rows.tokens.device) != model.mask_id
    if not torch.equal(rows.tokens[known], job.canvas.to(rows.tokens.device)[known]):
        raise AssertionError("a known token was touched")
    return Samples(
        tokens=rows.tokens.cpu(),
        event=rows.event.cpu(),
        calls=rows.calls.cpu(),
        row_draws=rows.draws.cpu(),
        broken=rows.broken.cpu(),
        settings=filled(model, job.settings).resolve(model.objective),
        network_calls=network_calls,
        seconds=seconds,
        counted={name: value.cpu() for name, value in rows.own.items()},
    )


def _drain(batch: Batch, jobs: Sequence[Job], batch_size: int) -> list[Rows]:
    """Pass the rows of all jobs through `batch`, numbered in the jobs' order; the rows as they ended."""
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
        ended += out
        if not out:
            batch.advance()
    return ended


def run(model: MaskedDiffusion, jobs: Sequence[Job], batch_size: int = 64) -> list[Samples]:
    """Sample the rows of all jobs, at most `batch_size` at a time; results in the jobs' order.

    A row that ends makes room for the next one. Tokens don't depend on `batch_size` or on the other jobs.
    Raises `UserError` for a canvas or settings that can't be sampled or a batch size below 1.
    """
    if batch_size < 1:
        raise UserError(f"batch_size is {batch_size}; at least 1 is needed")
    began = perf_counter()
    batch = Batch(model)
    with evaluating(model.network):  # once, rather than in every call
        ended = _drain(batch, jobs, batch_size)
    results, start = [], 0
    for job in jobs:
        own = [(rows.number >= start) & (rows.number < start + len(job)) for rows in ended]
        parts = [rows.select(which) for rows, which in zip(ended, own, strict=True) if bool(which.any())]
        start += len(job)
        results.append(collect(model, job, parts, batch.network_calls, perf_counter() - began))
    return results
